/** What an answer rests on: its sources under it, and the numbers in its words linked to them. All words of documents stay mere text. */

import { counted, number, text } from "./texts.js";

const CITATION = /\[\s*(\d{1,4}(?:\s*[,;–-]\s*\d{1,4})*)\s*\]/g;
const UNTOUCHED = "a, code, pre, kbd";

/** Fill *list* with *sources*; *cited* are the numbers that the answer cites, null as long as nobody knows; ids begin with *prefix*. */
export function fillSources(list, sources, cited, prefix) {
  const open = new Set([...list.querySelectorAll("details[open]")].map((each) => each.closest("li").id));
  list.replaceChildren(...sources.map((each) => item(each, cited, prefix, open)));
}

function item(source, cited, prefix, open) {
  const entry = element("li", "source");
  entry.id = `${prefix}-${source.n}`;
  entry.tabIndex = -1;
  entry.value = source.n;
  if (cited) entry.dataset.cited = String(cited.has(source.n));
  const head = element("p", "head");
  head.append(titled(source), ...facts(source));
  entry.append(head, passage(source, open.has(entry.id)));
  return entry;
}

/** The title, as a link where it has an address on the web. */
function titled({ title, url }) {
  const name = title || url || text("untitled");
  const address = onTheWeb(url);
  if (address === null) return element("strong", "", name);
  const link = element("a", "", name);
  Object.assign(link, { href: address, target: "_blank", rel: "noopener noreferrer nofollow" });
  return link;
}

/** *url* if following it does nothing but ask a web server, else null. */
export function onTheWeb(url) {
  try {
    const { protocol, href } = new URL(url);
    return protocol === "http:" || protocol === "https:" ? href : null;
  } catch {
    return null;
  }
}

function facts({ title, url, date, score }) {
  const where = url && url !== title ? [element("span", "where", url)] : [];
  const when = date ? [element("time", "", date)] : [];
  return [...where, ...when, element("span", "score", text("score", number(score, 2)))];
}

function passage({ text: words }, open) {
  const box = element("details", "");
  box.open = open;
  box.append(element("summary", "", text("passage")), element("blockquote", "", words));
  return box;
}

/** Make the citations in the words of *box* lead to the *sources* whose ids begin with *prefix*; those that no source has are marked. */
export function linkCitations(box, sources, prefix) {
  const known = new Set(sources.map(({ n }) => n));
  for (const node of textsOf(box)) {
    const pieces = cut(node.data, known, prefix);
    if (pieces.length > 1) node.replaceWith(...pieces);
  }
}

function textsOf(box) {
  const walker = document.createTreeWalker(box, NodeFilter.SHOW_TEXT);
  const found = [];
  while (walker.nextNode()) if (!walker.currentNode.parentElement.closest(UNTOUCHED)) found.push(walker.currentNode);
  return found;
}

function cut(words, known, prefix) {
  const pieces = [];
  let end = 0;
  for (const match of words.matchAll(CITATION)) {
    pieces.push(words.slice(end, match.index), citation(match[1].split(/(\s*[,;–-]\s*)/), known, prefix));
    end = match.index + match[0].length;
  }
  return [...pieces, words.slice(end)];
}

/** *parts* are numbers, and what stands between them at the odd places. */
function citation(parts, known, prefix) {
  const group = element("span", "cites");
  group.append("[", ...parts.map((part, place) => (place % 2 ? part : one(Number(part), known.has(Number(part)), prefix))), "]");
  return group;
}

function one(n, isKnown, prefix) {
  const node = element(isKnown ? "a" : "span", isKnown ? "cite" : "cite unknown", String(n));
  node.title = text(isKnown ? "citation" : "unknownCitation", n);
  if (!isKnown) return node;
  node.href = `#${prefix}-${n}`;
  node.addEventListener("click", (event) => (event.preventDefault(), show(document.getElementById(`${prefix}-${n}`))));
  return node;
}

function show(entry) {
  if (entry === null) return;
  entry.closest("details.sources").open = true;
  entry.querySelector("details").open = true;
  entry.focus({ preventScroll: true });
  entry.scrollIntoView({ block: "nearest" });
}

/** How many sources there are and are cited, in words. */
export const heading = (sources, cited) =>
  [counted("sources", sources.length), cited && counted("cited", cited.size)].filter(Boolean).join(" · ");

function element(tag, className, words = "") {
  const node = document.createElement(tag);
  node.textContent = words;
  if (className) node.className = className;
  return node;
}
