/** One question and its answer on the page. */

import { GrowingMarkdown } from "./markdown.js";
import { fillSources, heading, linkCitations } from "./sources.js";
import { counted, duration, number, percent, text, translate } from "./texts.js";
import { ended } from "./turn.js";

const REST = 4; // after a rendering of n ms, rest 4 n ms: drawing never takes more than a fifth of the time

let views = 0;

export class TurnView {
  #prefix = `source-${++views}`;
  #sourced = null;
  #state;
  #epoch = -1;
  #shown = { text: 0, reasoning: 0 };
  #finished = null;
  #cost = 0;
  #awaited = false;
  #isScripted;

  /** *again*() is called when the person asks to try again; *isScripted*(model id) tells whether a model recites. */
  constructor(question, { again, isScripted, beforePaint, afterPaint }) {
    this.root = document.getElementById("turn").content.cloneNode(true).firstElementChild;
    this.#isScripted = isScripted;
    this.#find();
    this.hooks = { beforePaint, afterPaint };
    this.root.querySelector(".ask").textContent = question;
    this.problem.querySelector(".again").addEventListener("click", again);
    this.copy.addEventListener("click", () => copy(this.copy, this.#state.text));
    translate(this.root);
  }

  #find() {
    const one = (selector) => this.root.querySelector(selector);
    this.answer = one(".answer");
    this.waiting = one(".waiting");
    this.thought = one(".thought");
    this.calls = one(".calls");
    this.sources = one(".sources");
    this.problem = one(".problem");
    this.chips = one(".chips");
    this.more = one(".more");
    this.copy = one(".copy");
    this.box = one(".text");
    this.markdown = new GrowingMarkdown(this.box);
  }

  /** Show *state*, soon; *phase* is what the page is busy with: "reconnecting", "stopping" or null. An end is shown at once. */
  show(state, phase = null) {
    this.#state = state;
    this.phase = phase;
    if (ended(state)) this.#paint();
    else this.#soon();
  }

  /** The language has changed. */
  retranslate() {
    translate(this.root);
    this.#finished = null;
    this.#paint();
  }

  #soon() {
    if (this.#awaited) return;
    this.#awaited = true;
    setTimeout(() => requestAnimationFrame(() => this.#awaited && this.#paint()), this.#cost * REST);
  }

  #paint() {
    const began = performance.now();
    this.#awaited = false;
    this.hooks.beforePaint();
    this.answer.dataset.status = this.#state.status;
    this.answer.setAttribute("aria-busy", String(!ended(this.#state)));
    this.#paintWords();
    this.#paintWaiting();
    this.#paintSources();
    this.#paintCalls();
    this.#paintProblem();
    this.#paintFacts();
    this.hooks.afterPaint();
    this.#cost = performance.now() - began;
  }

  #paintWords() {
    const { epoch, reasoning, text: words } = this.#state;
    const thoughts = this.thought.querySelector("p");
    if (epoch !== this.#epoch) {
      this.markdown.clear();
      thoughts.textContent = "";
      this.#shown = { text: 0, reasoning: 0 };
      this.#finished = null;
      this.#epoch = epoch;
    }
    if (ended(this.#state)) this.#finishWords(words);
    else if (words.length > this.#shown.text) this.markdown.append(words.slice(this.#shown.text));
    if (reasoning.length > this.#shown.reasoning) thoughts.append(reasoning.slice(this.#shown.reasoning));
    this.thought.hidden = reasoning === "";
    this.#shown = { text: words.length, reasoning: reasoning.length };
  }

  #finishWords(words) {
    if (this.#finished === words) return;
    this.#finished = words;
    this.markdown.finish(words);
    const { sources = [], citations } = this.#state;
    if (sources.length || citations?.unknown.length) linkCitations(this.box, sources, this.#prefix);
    for (const block of this.box.querySelectorAll("pre")) addCopyButton(block);
    for (const table of this.box.querySelectorAll("table")) makeScrollable(table);
  }

  #paintSources() {
    const { sources = [], lacking, citations } = this.#state;
    const cited = citations && new Set(citations.cited);
    this.sources.hidden = !sources.length && !lacking && !citations?.unknown.length;
    this.sources.querySelector("summary").textContent = heading(sources, cited);
    const notes = [lacking && text("lacking", lacking), citations?.unknown.length && text("unknownCitations", citations.unknown.join(", "))];
    this.sources.querySelector(".lacking").textContent = notes.filter(Boolean).join(" ");
    const known = JSON.stringify([sources.map(({ n }) => n), citations?.cited, document.documentElement.lang]);
    if (known === this.#sourced) return; // what a person has opened stays open, and nothing is drawn again for each word
    this.#sourced = known;
    fillSources(this.sources.querySelector("ol"), sources, cited, this.#prefix);
  }

  #paintWaiting() {
    const { status, text: words } = this.#state;
    const phase = this.#phase();
    this.waiting.hidden = ended(this.#state) || phase === null;
    this.waiting.querySelector(".phase").textContent = phase ?? "";
    this.box.classList.toggle("growing", status === "streaming" && words !== "");
  }

  /** What goes on while no words come, in words; null while they do. */
  #phase() {
    const { status, text: words, reasoning, held, loading, queued } = this.#state;
    if (this.phase !== null) return text(`phase.${this.phase}`);
    if (held) return text("phase.held", text(`titles.${held.title}`) ?? held.reason);
    if (loading) return text(loading.eta_s ? "phase.loadingFor" : "phase.loading", loading.expert, duration((loading.eta_s ?? 0) * 1000));
    if (queued) return text(queued.eta_s ? "phase.queuedFor" : "phase.queued", queued.position, duration((queued.eta_s ?? 0) * 1000));
    if (status === "waiting") return text("phase.waiting");
    return words === "" && reasoning !== "" ? text("phase.thinking") : null;
  }

  #paintCalls() {
    this.calls.replaceChildren(...this.#state.tools.filter(Boolean).map(call));
  }

  #paintProblem() {
    const { problem, text: words } = this.#state;
    this.problem.hidden = problem === null;
    if (problem === null) return;
    const title = text(`titles.${problem.title}`) ?? problem.title;
    const said = [title, problem.status && `(${problem.status})`].filter(Boolean).join(" ");
    const why = [said, problem.detail].filter(Boolean).join(": ");
    this.problem.querySelector("strong").textContent = text(`problem.${problem.kind}`);
    this.problem.querySelector("p").textContent = [why && `${why}.`.replace(/\.\.$/, "."), words && text("problem.incomplete")].filter(Boolean).join(" ");
    const again = this.problem.querySelector(".again");
    again.textContent = text(problem.kind === "lost" ? "reconnect" : "again");
    again.hidden = !problem.retryable;
  }

  #paintFacts() {
    const chips = this.#chips().filter(({ label }) => label);
    this.chips.replaceChildren(...chips.map(chip));
    const facts = this.#facts().filter(([, value]) => value !== undefined && value !== null && value !== "");
    this.more.querySelector("dl").replaceChildren(...facts.flatMap(([name, value]) => [element("dt", name), element("dd", value)]));
    this.more.hidden = !ended(this.#state) || facts.length === 0;
    this.copy.hidden = !ended(this.#state) || this.#state.text === "" || !navigator.clipboard;
  }

  #chips() {
    const { routed, done, usage, firstAt, endedAt, asked } = this.#state;
    const model = done?.model_id ?? routed?.model_id;
    return [
      { kind: "model", label: model },
      { kind: "scripted", label: model && this.#isScripted(model) && text("scripted"), title: text("scriptedMore") },
      { kind: "route", label: routed && text("route", routed.route_name) },
      { kind: "first", label: firstAt && text("first", duration(firstAt - asked)) },
      { kind: "total", label: endedAt && text("total", duration(endedAt - asked)) },
      { kind: "tokens", label: usage && counted("tokens", usage.completion_tokens) },
      { kind: "finish", label: this.#ending() },
    ];
  }

  #ending() {
    const { status, done } = this.#state;
    if (status === "failed") return text("incomplete");
    if (status === "stopped") return text("finish.cancelled");
    return done && (text(`finish.${done.finish_reason}`) ?? done.finish_reason);
  }

  #facts() {
    const { routed, usage, done, turn, model, resets } = this.#state;
    const timings = Object.entries(done?.timings ?? {}).map(([name, seconds]) => [text(`fact.${name}`) ?? name, duration(seconds * 1000)]);
    return [
      [text("fact.requested"), model === "auto" ? text("auto") : model],
      [text("fact.route"), routed?.route_name],
      [text("fact.complexity"), routed && (text(`complexity.${routed.complexity}`) ?? routed.complexity)],
      [text("fact.confidence"), routed && percent(routed.confidence)],
      [text("fact.why"), routed?.reasoning],
      [text("fact.plan"), routed?.plan?.join(" → ")],
      [text("fact.prompt"), usage && number(usage.prompt_tokens, 0)],
      [text("fact.burnt"), usage?.burnt_tokens ? number(usage.burnt_tokens, 0) : null],
      [text("fact.attempts"), usage && number(usage.attempts, 0)],
      [text("fact.rate"), this.#rate()],
      [text("fact.resets"), resets ? number(resets, 0) : null],
      ...timings,
      [text("fact.turn"), turn],
    ];
  }

  #rate() {
    const { usage, firstAt, endedAt } = this.#state;
    return usage && endedAt > firstAt && usage.completion_tokens > 1 ? number(((usage.completion_tokens - 1) * 1000) / (endedAt - firstAt)) : null;
  }
}

function element(tag, words, className = "") {
  const node = document.createElement(tag);
  node.textContent = words;
  if (className) node.className = className;
  return node;
}

function chip({ kind, label, title }) {
  const node = element("li", label, kind);
  if (title) node.title = title;
  return node;
}

function call({ name, arguments: given }) {
  const box = element("details", "", "call");
  box.append(element("summary", text("tool", name ?? "…")), element("pre", given));
  return box;
}

/** A wide table scrolls in its own frame instead of widening the page. */
function makeScrollable(table) {
  const frame = element("div", "", "wide");
  frame.tabIndex = 0;
  table.replaceWith(frame);
  frame.append(table);
}

function addCopyButton(block) {
  const code = block.querySelector("code") ?? block;
  const frame = element("div", "", "code");
  const bar = element("div", "", "bar");
  bar.append(element("span", /language-(\S+)/.exec(code.className)?.[1] ?? ""));
  block.replaceWith(frame);
  frame.append(bar, block);
  block.tabIndex = 0;
  if (!navigator.clipboard) return;
  const button = element("button", text("copy"), "quiet");
  button.type = "button";
  button.dataset.text = "copy";
  button.addEventListener("click", () => copy(button, code.textContent));
  bar.append(button);
}

async function copy(button, words) {
  await navigator.clipboard.writeText(words);
  button.textContent = text("copied");
  setTimeout(() => (button.textContent = text("copy")), 1500);
}
