/** The conversation: asks, follows, stops, keeps. */

import { Library } from "./library.js";
import { ask, cancel, follow, models, Lost, Problem } from "./stream.js";
import { load, save } from "./store.js";
import { choose, current, text, translate } from "./texts.js";
import { ended, fail, fresh, reduce, restart, rollback, stop } from "./turn.js";
import { TurnView } from "./view.js";

const STOP_GRACE_MS = 5000; // how long the server may take to say that it has stopped
const $ = (id) => document.getElementById(id);

const page = { turns: [], running: null, scripted: new Set(), sticky: true };

// --- a turn ------------------------------------------------------------------------------------------------------

function addTurn(question, state) {
  const turn = { question, state, committed: state, phase: null, stopper: null };
  turn.view = new TurnView(question, {
    again: () => again(turn),
    isScripted: (model) => page.scripted.has(model),
    beforePaint: () => (page.sticky = atEnd()),
    afterPaint: () => page.sticky && toEnd(),
  });
  page.turns.push(turn);
  $("turns").append(turn.view.root);
  $("welcome").hidden = true;
  turn.view.show(state);
  return turn;
}

function removeTurn(turn) {
  page.turns.splice(page.turns.indexOf(turn), 1);
  turn.view.root.remove();
}

function update(turn, state, phase = turn.phase) {
  const before = turn.state;
  Object.assign(turn, { state, phase });
  turn.view.show(state, phase);
  const worthKeeping = state.turn !== before.turn || state.firstAt !== before.firstAt || ended(state);
  if (worthKeeping) save(page.turns);
}

const sinkOf = (turn) => ({
  event(name, data, id) {
    const phase = turn.phase === "reconnecting" ? null : turn.phase;
    const stopped = phase === "stopping" && name === "error"; // however it ended, the person wanted it to
    update(turn, stopped ? stop(turn.state, Date.now()) : reduce(turn.state, name, data, Date.now()), phase);
    if (id) turn.committed = turn.state;
  },
  broke() {
    update(turn, rollback(turn.state, turn.committed), turn.phase ?? "reconnecting");
    turn.committed = turn.state;
  },
});

/** Follow *turn* with what *open*(signal) answers: {turn, response?}; whatever happens, the turn has an end afterwards. */
async function run(turn, open) {
  const stopper = new AbortController();
  Object.assign(turn, { stopper, phase: null });
  setRunning(turn);
  try {
    const opened = await open(stopper.signal);
    update(turn, { ...turn.state, turn: opened.turn });
    turn.committed = turn.state;
    await follow({ ...opened, sink: sinkOf(turn), signal: stopper.signal });
  } catch (error) {
    if (page.turns.includes(turn)) update(turn, ending(turn, error), null);
  } finally {
    if (page.running === turn) setRunning(null);
  }
  announce(turn);
}

function ending({ state, stopper }, error) {
  const now = Date.now();
  if (stopper.signal.aborted) return stop(state, now);
  return fail(state, problemOf(error, state), now);
}

function problemOf(error, state) {
  if (error instanceof Problem) {
    const { title, status, detail, retryable } = error;
    return { kind: state.turn === null ? "refused" : "server", title, status, detail, retryable: retryable || status === 404 || status === 410 };
  }
  if (error instanceof Lost) return { kind: "lost", retryable: true };
  if (error instanceof TypeError && state.turn === null) return { kind: "network", retryable: true };
  throw error;
}

// --- what a person does ------------------------------------------------------------------------------------------

function send(question, model) {
  const messages = [...history(), { role: "user", content: question }];
  const turn = addTurn(question, fresh(model, Date.now()));
  save(page.turns);
  toEnd();
  return run(turn, (signal) => ask(messages, model, grounding(), signal));
}

/** What the answer is to be grounded by; what is usual is not said. */
function grounding() {
  const chosen = { auto: {}, always: { grounded: true }, never: { grounded: false } }[$("grounding").value];
  return page.library.collection === "default" ? chosen : { ...chosen, collection: page.library.collection };
}

/** What was said so far: answers that failed are no part of it. */
function history() {
  const said = page.turns.filter(({ state }) => state.text !== "" && (state.status === "done" || state.status === "stopped"));
  return said.flatMap(({ question, state }) => [
    { role: "user", content: question },
    { role: "assistant", content: state.text },
  ]);
}

function again(turn) {
  if (page.running) return;
  if (turn.state.problem?.kind === "lost") {
    resume(turn);
    return;
  }
  removeTurn(turn);
  send(turn.question, turn.state.model);
}

function resume(turn) {
  update(turn, restart(turn.state), null);
  turn.committed = turn.state;
  return run(turn, async () => ({ turn: turn.state.turn }));
}

async function stopRunning() {
  const turn = page.running;
  if (!turn || turn.phase === "stopping") return;
  const { stopper } = turn;
  if (turn.state.turn === null) {
    stopper.abort();
    return;
  }
  update(turn, turn.state, "stopping");
  setTimeout(() => stopper.abort(), STOP_GRACE_MS);
  try {
    await cancel(turn.state.turn);
  } catch {
    stopper.abort(); // not to be had: at least nobody reads on
  }
}

function startAnew() {
  const { running } = page;
  Object.assign(page, { turns: [], running: null });
  if (running) {
    running.stopper.abort();
    if (running.state.turn !== null) cancel(running.state.turn).catch(() => {}); // unheard, it goes on to its own end
  }
  $("turns").replaceChildren();
  $("welcome").hidden = false;
  save([]);
  setRunning(null);
  $("question").focus();
}

/** Show what was kept; an answer that was being written goes on. */
function restore() {
  for (const { question, state } of load()) {
    const turn = addTurn(question, state);
    if (ended(state)) continue;
    if (state.turn === null) update(turn, fail(state, { kind: "unsent", retryable: true }, Date.now()));
    else resume(turn);
  }
  toEnd();
}

// --- the frame ---------------------------------------------------------------------------------------------------

function setRunning(turn) {
  page.running = turn;
  const hadFocus = document.activeElement === $("send") || document.activeElement === $("stop");
  $("send").hidden = turn !== null;
  $("stop").hidden = turn === null;
  if (hadFocus) $(turn === null ? "send" : "stop").focus();
  refreshSend();
}

function announce(turn) {
  $("status").textContent = text(`said.${turn.state.status}`) ?? "";
}

const log = $("log");
const atEnd = () => log.scrollHeight - log.scrollTop - log.clientHeight < 60;

function toEnd() {
  log.scrollTop = log.scrollHeight;
}

function refreshSend() {
  $("send").disabled = $("question").value.trim() === "";
}

function grow() {
  const area = $("question");
  area.style.height = "auto";
  area.style.height = `${Math.min(area.scrollHeight, 220)}px`;
  refreshSend();
}

function submit() {
  const area = $("question");
  const question = area.value.trim();
  if (question === "" || page.running) return;
  area.value = "";
  grow();
  send(question, $("model").value);
}

function speak() {
  document.documentElement.lang = current();
  translate(document);
  for (const button of document.querySelectorAll("[data-language]")) {
    button.setAttribute("aria-pressed", String(button.dataset.language === current()));
  }
  $("ideas").replaceChildren(...text("ideas").map(idea));
  for (const { view } of page.turns) view.retranslate();
  page.library.retranslate();
  nameModels();
}

function idea(words) {
  const [item, button] = [document.createElement("li"), document.createElement("button")];
  button.type = "button";
  button.textContent = words;
  button.addEventListener("click", () => page.running || send(words, $("model").value));
  item.append(button);
  return item;
}

function nameModels() {
  for (const option of $("model").options) {
    const name = option.value === "auto" ? text("auto") : option.value;
    option.textContent = page.scripted.has(option.value) ? `${name} · ${text("scripted")}` : name;
  }
}

async function fillModels() {
  const picker = $("model");
  picker.replaceChildren(new Option("", "auto"));
  nameModels();
  try {
    const known = await models();
    page.scripted = new Set(known.filter(({ scripted }) => scripted).map(({ id }) => id));
    picker.append(...known.filter(({ id }) => id !== "auto").map(({ id }) => new Option(id, id)));
  } catch {
    picker.addEventListener("focus", fillModels, { once: true }); // "auto" works without the list; ask for it again when wanted
  }
  nameModels();
  for (const { view } of page.turns) view.retranslate();
}

function listen() {
  $("composer").addEventListener("submit", (event) => (event.preventDefault(), submit()));
  $("question").addEventListener("input", grow);
  $("question").addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    submit();
  });
  $("stop").addEventListener("click", stopRunning);
  $("new").addEventListener("click", startAnew);
  $("down").addEventListener("click", toEnd);
  log.addEventListener("scroll", () => ($("down").hidden = atEnd()), { passive: true });
  for (const button of document.querySelectorAll("[data-language]")) {
    button.addEventListener("click", () => (choose(button.dataset.language), speak()));
  }
}

page.library = new Library();
listen();
speak();
fillModels();
restore();
grow();
$("question").focus();
