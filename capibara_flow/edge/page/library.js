/** The panel of documents: brings, lists, removes and searches them. */

import { bring, documents, remove, search } from "./documents.js";
import { fillSources, onTheWeb } from "./sources.js";
import { Problem } from "./stream.js";
import { counted, number, text } from "./texts.js";

const AT_ONCE = 2;
const $ = (id) => document.getElementById(id);

export class Library {
  #waiting = [];
  #running = 0;
  #listed = 0;
  #shown = [];
  #found = null;

  constructor() {
    const [panel, drop] = [$("library"), $("drop")];
    $("documents").addEventListener("click", () => this.open());
    $("close").addEventListener("click", () => panel.close());
    $("files").addEventListener("change", ({ target }) => (this.add(target.files), (target.value = "")));
    $("collection").addEventListener("change", () => this.refresh());
    $("seek").addEventListener("submit", (event) => (event.preventDefault(), this.seek($("sought").value.trim())));
    for (const name of ["dragover", "dragleave", "drop"]) panel.addEventListener(name, (event) => this.#drag(event, drop));
  }

  /** The part of the documents that is in use. */
  get collection() {
    const given = $("collection").value.trim();
    return $("collection").validity.valid && given !== "" ? given : "default";
  }

  open() {
    $("library").showModal();
    return this.refresh();
  }

  #drag(event, drop) {
    event.preventDefault(); // or the browser would leave this page for the file
    drop.classList.toggle("over", event.type === "dragover");
    if (event.type === "drop") this.add(event.dataTransfer.files);
  }

  /** Bring *files*, a few at a time; each tells how it fares in a line of its own. */
  add(files) {
    for (const file of files) this.#waiting.push({ file, row: uploadRow(file.name) });
    while (this.#running < AT_ONCE && this.#waiting.length) this.#next();
  }

  async #next() {
    this.#running++;
    while (this.#waiting.length) await this.#bring(this.#waiting.shift());
    this.#running--;
    await this.refresh();
  }

  async #bring({ file, row }) {
    const [bar, says] = [row.querySelector("progress"), row.querySelector(".says")];
    const sent = (bytes) => {
      bar.value = file.size ? bytes / file.size : 1;
      says.textContent = text("upload.sending");
    };
    const taking = () => {
      bar.removeAttribute("value");
      says.textContent = text("upload.taking");
    };
    try {
      const { how, passages } = await bring(file, this.collection, { sent, taking });
      finish(row, "done", `${text(`upload.${how}`) ?? how} · ${counted("passages", passages)}`);
    } catch (error) {
      finish(row, "failed", wordsOf(error));
    }
  }

  /** Show what is there now. */
  async refresh() {
    const asked = ++this.#listed;
    try {
      const found = await documents(this.collection);
      if (asked === this.#listed) this.#show(found, "");
    } catch (error) {
      if (asked === this.#listed) this.#show([], wordsOf(error));
    }
  }

  #show(found, problem) {
    this.#shown = found;
    this.#say(problem);
    $("shelf").replaceChildren(...found.map((each) => this.#row(each)));
    $("count").textContent = problem ? "" : counted("documents", found.length);
  }

  #say(problem) {
    $("trouble").hidden = problem === "";
    $("trouble").textContent = problem;
  }

  #row({ id, title, address, passages, updated }) {
    const row = element("li");
    const words = element("div", "words");
    const name = title || address || text("untitled");
    const link = onTheWeb(address);
    const shown = element(link ? "a" : "strong", "", name);
    if (link) Object.assign(shown, { href: link, target: "_blank", rel: "noopener noreferrer nofollow" });
    const day = updated ? new Date(updated * 1000).toISOString().slice(0, 10) : "";
    words.append(shown, element("span", "where", [address !== name && address, day, counted("passages", passages)].filter(Boolean).join(" · ")));
    const button = element("button", "quiet", text("remove"));
    button.type = "button";
    button.setAttribute("aria-label", text("removeThis", name));
    button.addEventListener("click", () => this.#remove(button, id));
    row.append(words, button);
    return row;
  }

  async #remove(button, id) {
    if (!button.dataset.sure) {
      button.dataset.sure = "yes";
      button.textContent = text("removeSure");
      return;
    }
    button.disabled = true;
    try {
      await remove(id, this.collection);
    } catch (error) {
      if (!(error instanceof Problem && error.status === 404)) {
        button.disabled = false;
        this.#say(wordsOf(error));
        return;
      }
    }
    await this.refresh();
    $("close").focus();
  }

  /** Show the sources for *words*. */
  async seek(words) {
    if (words === "") return;
    $("found").replaceChildren();
    try {
      this.#found = await search(words, this.collection);
      this.#showFound();
    } catch (error) {
      $("foundSay").textContent = wordsOf(error);
    }
  }

  #showFound() {
    if (this.#found === null) return;
    const { sources, related } = this.#found;
    $("foundSay").textContent = !sources.length ? text("nothingFound") : related === false ? text("unrelated") : "";
    fillSources($("found"), sources, null, "found");
  }

  /** The language has changed. */
  retranslate() {
    if ($("library").open) this.#show(this.#shown, $("trouble").textContent);
    this.#showFound();
  }
}

function uploadRow(name) {
  const row = element("li");
  const bar = element("progress");
  bar.setAttribute("aria-label", name);
  bar.max = 1;
  bar.value = 0;
  row.append(element("strong", "", name), bar, element("span", "says", text("upload.waiting")));
  $("uploads").prepend(row);
  return row;
}

function finish(row, status, words) {
  row.dataset.status = status;
  row.querySelector("progress").remove();
  row.querySelector(".says").textContent = words;
}

/** What went wrong, in words. */
function wordsOf(error) {
  if (error instanceof TypeError) return text("problem.network");
  if (!(error instanceof Problem)) return text("problem.lost");
  const title = text(`upload.refusals.${error.status}`) ?? text(`titles.${error.title}`) ?? error.title;
  return [title, error.detail].filter(Boolean).join(": ");
}

function element(tag, className = "", words = "") {
  const node = document.createElement(tag);
  node.textContent = words;
  if (className) node.className = className;
  return node;
}
