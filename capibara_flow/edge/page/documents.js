/** The documents over HTTP: list, remove, search, and bring one with its progress. All throw Problem, or TypeError without a network. */

import { accepted, follow, Problem } from "./stream.js";

const PAGE = 200;
const BASE = "/api/rag/documents";

const query = (fields) => new URLSearchParams(Object.entries(fields).filter(([, value]) => value !== "" && value !== null)).toString();

/** All documents of *collection*, by id: [{id, title, address, language, passages, updated}]. */
export async function documents(collection) {
  const found = [];
  for (let after = ""; after !== null; ) {
    const response = await accepted(await fetch(`${BASE}?${query({ collection, limit: PAGE, after })}`));
    const page = await response.json();
    found.push(...page.documents);
    after = page.next;
  }
  return found;
}

/** Remove a document from every store. */
export const remove = async (id, collection) =>
  accepted(await fetch(`${BASE}/${encodeURIComponent(id)}?${query({ collection })}`, { method: "DELETE" }));

/** What has most to do with *words*: {sources, related}; an answer rests on them where they are related enough. */
export async function search(words, collection, limit = 8) {
  const headers = { "Content-Type": "application/json" };
  const body = JSON.stringify({ query: words, collection, limit });
  const response = await accepted(await fetch("/api/rag/search", { method: "POST", headers, body }));
  return response.json();
}

/** Bring *file*; sent(bytes) tells how far it got, taking() that all of it is there. Answers {document, how, title, passages}. */
export async function bring(file, collection, { sent, taking }) {
  const [{ turn }] = (await post(file, collection, sent)).documents;
  taking();
  let ingested = null;
  let failed = null;
  const sink = {
    event(name, data) {
      if (name === "ingested") ingested = data;
      if (name === "error") failed = data;
    },
    broke() {},
  };
  await follow({ turn, sink, signal: new AbortController().signal });
  if (failed) throw new Problem(failed);
  if (ingested === null) throw new Problem({ title: "cancelled", status: 409, detail: "" });
  return ingested;
}

/** Fetch cannot tell how much of a body has been sent; XMLHttpRequest can. */
function post(file, collection, sent) {
  return new Promise((resolve, reject) => {
    const request = new XMLHttpRequest();
    request.open("POST", `${BASE}?${query({ collection, name: file.name })}`);
    request.setRequestHeader("Content-Type", file.type || "application/octet-stream");
    request.upload.addEventListener("progress", ({ loaded }) => sent(loaded));
    request.addEventListener("error", () => reject(new TypeError("no connection")));
    request.addEventListener("load", () => {
      const told = parsed(request.responseText);
      if (request.status < 300 && told.documents) resolve(told);
      else reject(new Problem({ title: request.statusText, detail: "", ...told, status: request.status }));
    });
    request.send(file);
  });
}

function parsed(words) {
  try {
    return JSON.parse(words) ?? {};
  } catch {
    return {}; // a proxy's error page is no JSON
  }
}
