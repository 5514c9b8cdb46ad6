/** Asking, following and stopping a turn over HTTP; a turn is followed over as many connections as it takes. */

const STALL_MS = 50_000; // the server says something every 15 s: three silences mean a dead connection
const TRIES = 10; // in a row without progress: about a minute
const ENDS = new Set(["done", "error"]);

/** An answer of the server that is not a stream: its problem details (RFC 9457). */
export class Problem extends Error {
  constructor({ title, status, detail, retryable }) {
    super(title);
    Object.assign(this, { title, status, detail, retryable: retryable ?? (status === 429 || status >= 500) });
  }
}

/** The connection broke too often. */
export class Lost extends Error {}

/** Open a turn, *grounding* says by what it is to be grounded: {grounded?, collection?}; answers the response with its stream and the turn's id. Throws Problem, or TypeError without a network. */
export async function ask(messages, model, grounding, signal) {
  const body = JSON.stringify({ messages, stream: true, ...(model === "auto" ? {} : { model }), ...grounding });
  const headers = { "Content-Type": "application/json", Accept: "text/event-stream" };
  const response = await accepted(await fetch("/api/chat", { method: "POST", headers, body, signal }));
  return { response, turn: response.headers.get("X-Capibara-Turn") };
}

/** Ask the server to stop *turn*; survives the page being closed. Throws Problem, or TypeError without a network. */
export const cancel = async (turn) => accepted(await fetch(address(turn), { method: "DELETE", keepalive: true }));

/** The models that answer here: [{id, scripted?}]. */
export async function models() {
  const response = await accepted(await fetch("/v1/models"));
  return (await response.json()).data;
}

/**
 * Follow *turn* to its end: through *response* if there is one, else from its first event.
 *
 * Calls sink.event(name, data, id) for each event and sink.broke() when a connection broke: events after the last
 * one with an id will come again. Throws Problem (the server does not know the turn), Lost, or the signal's reason.
 */
export async function follow({ turn, response, sink, signal }) {
  let last = null;
  for (let failures = 0; ; ) {
    try {
      response ??= await reopen(turn, last, signal);
      for await (const { name, data, id } of events(response.body, signal)) {
        sink.event(name, JSON.parse(data), id);
        if (ENDS.has(name)) return;
        if (id) [last, failures] = [id, 0];
      }
    } catch (error) {
      if (signal.aborted || (error instanceof Problem && !error.retryable)) throw error;
    }
    response = null;
    if (++failures > TRIES) throw new Lost();
    sink.broke();
    await pause(failures, signal);
  }
}

const address = (turn) => `/api/chat/${encodeURIComponent(turn)}`;

function reopen(turn, last, signal) {
  const url = `${address(turn)}/events`;
  const headers = { Accept: "text/event-stream" };
  const asked = last === null ? fetch(`${url}?after=0`, { headers, signal }) : fetch(url, { headers: { ...headers, "Last-Event-ID": last }, signal });
  return asked.then(accepted);
}

/** *response* if it is a good one; throws Problem. */
export async function accepted(response) {
  if (response.ok) return response;
  const details = await response.json().catch(() => ({})); // a proxy's error page is no JSON
  throw new Problem({ title: response.statusText, detail: "", ...(details.error ?? details), status: response.status });
}

/** Wait before trying again: 0.25 s, doubling up to 8 s, with some chance; a network that comes back ends the wait. */
function pause(failures, signal) {
  const wait = Math.min(8000, 125 * 2 ** failures) * (0.75 + Math.random() / 2);
  return new Promise((resolve, reject) => {
    const timer = setTimeout(resolve, wait);
    addEventListener("online", resolve, { once: true, signal });
    signal.addEventListener("abort", () => (clearTimeout(timer), reject(signal.reason)), { once: true });
  });
}

/** The events of a text/event-stream *body*, as https://html.spec.whatwg.org/multipage/server-sent-events.html has it. */
async function* events(body, signal) {
  let event = { name: "message", data: [], id: null };
  for await (const line of lines(chunks(body, signal))) {
    if (line === "") {
      if (event.data.length) yield { ...event, data: event.data.join("\n") };
      event = { name: "message", data: [], id: null };
    } else {
      take(event, line);
    }
  }
}

function take(event, line) {
  const colon = line.indexOf(":");
  const field = colon < 0 ? line : line.slice(0, colon);
  const value = colon < 0 ? "" : line.slice(colon + (line[colon + 1] === " " ? 2 : 1));
  if (field === "event") event.name = value;
  else if (field === "data") event.data.push(value);
  else if (field === "id") event.id = value;
}

/** The complete lines of *texts*, however they end; what follows the last line end is dropped. */
async function* lines(texts) {
  let rest = "";
  for await (const piece of texts) {
    rest += piece;
    const held = rest.endsWith("\r") ? 1 : 0; // its line feed may still be on the way
    const found = rest.slice(0, rest.length - held).split(/\r\n|\n|\r/);
    rest = found.pop() + (held ? "\r" : "");
    yield* found;
  }
}

/** What *body* brings, as text; throws when it brings nothing for too long. */
async function* chunks(body, signal) {
  const reader = body.getReader();
  const decoder = new TextDecoder();
  const close = () => reader.cancel().catch(() => {}); // cancelling what is already broken is no news
  signal.addEventListener("abort", close, { once: true });
  try {
    for (;;) {
      const { done, value } = await inTime(reader.read());
      signal.throwIfAborted();
      if (done) return;
      yield decoder.decode(value, { stream: true });
    }
  } finally {
    signal.removeEventListener("abort", close);
    close();
  }
}

function inTime(promise) {
  let timer;
  const late = new Promise((_, reject) => (timer = setTimeout(() => reject(new Error("the stream is silent")), STALL_MS)));
  return Promise.race([promise, late]).finally(() => clearTimeout(timer));
}
