/**
 * What is known of one turn, as an object that is never changed, and how an event of its stream changes it.
 *
 * status: "waiting" (nothing said yet), "streaming", and the three ends: "done", "stopped", "failed".
 * sources are what the answer may rest on, lacking why there are fewer than there should be, citations {cited, unknown} once it has ended.
 * held is the reason why nothing goes on for now, loading the model that is being loaded {expert, eta_s},
 * queued the place in its line {expert, position, eta_s}, until something does.
 * epoch grows whenever text that was already shown is taken back; while it stays, text only grows.
 * asked, firstAt, endedAt are milliseconds since 1970, so that they outlive a reload.
 */
export const fresh = (model, asked) => ({
  status: "waiting", turn: null, model, epoch: 0, text: "", reasoning: "", tools: [], routed: null, usage: null, done: null, problem: null,
  sources: [], lacking: null, citations: null, resets: 0, held: null, loading: null, queued: null, asked, firstAt: null, endedAt: null,
});

/** The same turn, to be told again from its first event. */
export const restart = (state) => ({
  ...fresh(state.model, state.asked), turn: state.turn, firstAt: state.firstAt, epoch: state.epoch + 1,
});

/** *committed* again, after what came later turned out to be half a batch. */
export const rollback = (state, committed) =>
  state === committed ? state : { ...committed, firstAt: state.firstAt, epoch: state.epoch + 1 };

/** Whether nothing more will come. */
export const ended = (state) => state.status === "done" || state.status === "stopped" || state.status === "failed";

const CANCELLED = new Set(["cancelled", "canceled", "stopped", "abandoned"]);

const EVENTS = {
  turn: (state, data) => ({ ...state, turn: data.turn }),
  routed: (state, data) => ({ ...state, routed: data }),
  sources: (state, data) => ({ ...state, sources: data.sources ?? [], lacking: data.problem ?? null }),
  citations: (state, data) => ({ ...state, citations: { cited: data.cited ?? [], unknown: data.unknown ?? [] } }),
  token: (state, data, now) => ({
    ...state,
    status: "streaming",
    held: null,
    loading: null,
    queued: null,
    text: state.text + (data.text ?? ""),
    reasoning: state.reasoning + (data.reasoning ?? ""),
    firstAt: state.firstAt ?? now,
  }),
  tool: (state, data, now) => ({
    ...state, status: "streaming", held: null, loading: null, queued: null, tools: withFragment(state.tools, data), firstAt: state.firstAt ?? now,
  }),
  reset: (state) => ({ ...state, text: "", reasoning: "", tools: [], citations: null, resets: state.resets + 1, epoch: state.epoch + 1 }),
  waiting: (state, data) => ({ ...state, held: { title: data.title, reason: data.reason ?? "" }, loading: null, queued: null }),
  loading: (state, data) => ({ ...state, held: null, loading: data, queued: null }),
  queued: (state, data) => ({ ...state, held: null, loading: null, queued: data }),
  usage: (state, data) => ({ ...state, usage: data }),
  done: (state, data, now) => ({ ...state, status: CANCELLED.has(data.finish_reason) ? "stopped" : "done", done: data, endedAt: now }),
  error: (state, data, now) => fail(state, { kind: "server", ...data }, now),
};

/** *state* after the event *name*; events that we do not know change nothing. */
export function reduce(state, name, data, now) {
  return Object.hasOwn(EVENTS, name) ? EVENTS[name](state, data, now) : state;
}

/** *state*, ended by *problem*: {kind, title, status, detail, retryable}. */
export const fail = (state, problem, now) => ({ ...state, status: "failed", problem, endedAt: now });

/** *state*, ended by the person. */
export const stop = (state, now) => ({ ...state, status: "stopped", endedAt: now });

function withFragment(tools, { index, id, name, arguments: fragment = "" }) {
  const known = tools[index] ?? { id: null, name: null, arguments: "" };
  const next = [...tools];
  next[index] = { id: id ?? known.id, name: name ?? known.name, arguments: known.arguments + fragment };
  return next;
}
