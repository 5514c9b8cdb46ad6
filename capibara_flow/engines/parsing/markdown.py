"""Markdown (CommonMark with tables, by markdown-it): kept as it is written, but for HTML in it and what stands above the text."""

import re
from collections.abc import Iterator

from markdown_it import MarkdownIt
from markdown_it.token import Token

from capibara_flow.domain.parsed import Block, Kind, Parsed, plain_blocks
from capibara_flow.engines.parsing import html
from capibara_flow.engines.parsing.decoding import decoded
from capibara_flow.engines.parsing.media import MARKDOWN

_FRONT = re.compile(r"\A---\n(.{0,20000}?)\n(?:---|\.\.\.)(?:\n|\Z)", re.DOTALL)
_FRONT_TITLE = re.compile(r"^title:[ \t]*[\"']?(.{1,300}?)[\"']?[ \t]*$", re.MULTILINE)
_MARKS = re.compile(r"!?\[([^\[\]]*)\](?:\([^()\s]*\)|\[[^\[\]]*\])|[*`]+|(?<!\w)_+|_+(?!\w)")
_KINDS: dict[str, Kind] = {
    "fence": "code", "code_block": "code", "table_open": "table", "bullet_list_open": "list", "ordered_list_open": "list",
    "paragraph_open": "paragraph", "heading_open": "heading", "blockquote_open": "paragraph",
}  # fmt: skip


def parse(data: bytes, declared: str | None = None) -> Parsed:
    """*data* as Markdown text; its title is that of its front matter, or its first heading."""
    text = decoded(data, declared)
    title = ""
    if front := _FRONT.match(text):
        named = _FRONT_TITLE.search(front[1])
        title, text = named[1] if named else "", text[front.end() :]
    text = _without_html(text)
    blocks = tuple(_blocks(text, _tokens(text)))
    first = next((block.title for block in blocks if block.kind == "heading"), "")
    return Parsed(text, blocks, title or first, media_type=MARKDOWN)


def _tokens(text: str) -> list[Token]:
    """Blocks only: what stands inside of them is not looked at."""
    reader = MarkdownIt("commonmark").enable("table")
    reader.core.ruler.enableOnly(["normalize", "block"])
    return reader.parse(text)


def _starts(text: str) -> list[int]:
    """Where each line begins; and where the text ends, for the line behind the last."""
    return [0, *(found.end() for found in re.finditer("\n", text)), len(text)]


def _without_html(text: str) -> str:
    starts = _starts(text)
    pieces, at = [], 0
    for token in _tokens(text):
        if token.type == "html_block" and token.map:
            start, end = starts[token.map[0]], starts[min(token.map[1], len(starts) - 1)]
            pieces += [text[at:start], html.text_of(text[start:end]), "\n"]
            at = end
    return "".join([*pieces, text[at:]])


def _blocks(text: str, tokens: list[Token]) -> Iterator[Block]:
    starts, done = _starts(text), -1
    for token in tokens:
        kind = _KINDS.get(token.type)
        if kind is None or not token.map or token.map[0] < done:
            continue
        done = token.map[1]
        start, end = starts[token.map[0]], starts[min(done, len(starts) - 1)]
        if kind == "heading":
            yield Block(start, end, kind, int(token.tag[1:]), plain(text[start:end]))
        elif token.type == "blockquote_open":
            yield from (Block(start + each.start, start + each.end) for each in plain_blocks(text[start:end]))
        else:
            yield Block(start, end, kind)


def plain(heading: str) -> str:
    """A heading's source without marks."""
    line = re.sub(r"\n[ \t]*[=-]+[ \t]*\n?\Z", "", heading).strip()
    return _MARKS.sub(lambda found: found[1] or "", re.sub(r"^#{1,6}[ \t]*|[ \t]+#+[ \t]*$", "", line)).strip()
