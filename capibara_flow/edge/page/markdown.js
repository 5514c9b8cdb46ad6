/** Markdown that nobody vouches for becomes nodes that do no harm; a growing text is rendered block by block. */

import { Marked } from "./vendor/marked.js";
import DOMPurify from "./vendor/purify.js";

const escaped = (text) => text.replace(/[&<>"]/g, (letter) => `&#${letter.charCodeAt(0)};`);

const marked = new Marked({
  gfm: true,
  breaks: true,
  renderer: {
    // Loading an image would tell its address's owner what was said: a link leaves that to the reader.
    image: ({ href, text }) => `<a href="${escaped(href)}">${escaped(text || href)}</a>`,
    checkbox: ({ checked }) => (checked ? "☑ " : "☐ "),
  },
});

const RULES = {
  ALLOWED_TAGS: [
    "a", "abbr", "b", "blockquote", "br", "code", "del", "details", "em", "h1", "h2", "h3", "h4", "h5", "h6", "hr", "i", "kbd", "li", "mark", "ol", "p",
    "pre", "s", "small", "span", "strong", "sub", "summary", "sup", "table", "tbody", "td", "th", "thead", "tr", "u", "ul",
  ],
  ALLOWED_ATTR: ["href", "title", "align", "start", "class", "colspan", "rowspan"],
  ADD_URI_SAFE_ATTR: ["align", "start", "colspan", "rowspan"],
  ALLOWED_URI_REGEXP: /^(?:https?:|mailto:|#)/i,
  ALLOW_DATA_ATTR: false,
  ALLOW_ARIA_ATTR: false,
  RETURN_DOM_FRAGMENT: true,
};

DOMPurify.addHook("afterSanitizeAttributes", (node) => {
  // Only a code block's language may be a class: an answer must not be able to dress up as the page.
  if (node.hasAttribute("class") && !/^language-[\w+#.-]+$/.test(node.className)) node.removeAttribute("class");
  if (node.tagName === "A") {
    node.target = "_blank";
    node.rel = "noopener noreferrer nofollow";
  }
});

/** *source* as safe nodes. */
export const render = (source) => DOMPurify.sanitize(marked.parse(source), RULES);

/** A text that grows inside *box*: only its last block is rendered again, so that the work stays proportional to the text. */
export class GrowingMarkdown {
  #box;
  #tail = "";
  #settled = 0;

  constructor(box) {
    this.#box = box;
  }

  /** Forget everything. */
  clear() {
    this.#box.replaceChildren();
    this.#tail = "";
    this.#settled = 0;
  }

  /** Add *text*. */
  append(text) {
    this.#tail += text;
    const blocks = marked.lexer(this.#tail);
    const open = blocks.findLastIndex((block) => block.type !== "space");
    if (open < 0) return;
    this.#dropTail();
    if (open > 0) {
      this.#box.append(fragment(blocks.slice(0, open)));
      this.#settled = this.#box.childNodes.length;
      this.#tail = blocks.slice(open).map((block) => block.raw).join("");
    }
    this.#box.append(fragment(blocks.slice(open)));
  }

  /** Show *source* as a whole: links to footnotes and definitions far away are right now. */
  finish(source) {
    this.clear();
    this.#box.append(render(source));
  }

  #dropTail() {
    while (this.#box.childNodes.length > this.#settled) this.#box.lastChild.remove();
  }
}

const fragment = (blocks) => DOMPurify.sanitize(marked.parser(blocks), RULES);
