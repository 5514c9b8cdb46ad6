"""HTML (by Lexbor): what a reader of the page reads, without scripts, styles, navigation and forms."""

import re
from datetime import datetime

from selectolax.lexbor import LexborHTMLParser, LexborNode, SelectolaxError

from capibara_flow.domain.parsed import Block, Kind, Parsed, cleaned
from capibara_flow.engines.parsing.decoding import decoded
from capibara_flow.engines.parsing.media import HTML
from capibara_flow.errors import DocumentRefused

_SILENT = frozenset(
    """
    script style noscript template nav footer aside form svg math iframe object embed canvas button select option textarea input dialog
    menu audio video map head title link meta base
    """.split()
)
_PARTS = frozenset(
    """
    p div section article main header figure figcaption blockquote ul ol dl dt dd li table tr pre h1 h2 h3 h4 h5 h6 hr address details
    summary fieldset center body html caption thead tbody tfoot
    """.split()
)
_ROLES = frozenset("navigation banner contentinfo search menu menubar dialog alert complementary form".split())
_KINDS: dict[str, Kind] = {"pre": "code", "table": "table", "ul": "list", "ol": "list", "dl": "list"}
_DATES = ("article:modified_time", "og:updated_time", "article:published_time", "last-modified", "dcterms.modified", "date")
_MAIN_SHARE = 0.4


def parse(data: bytes, declared: str | None = None) -> Parsed:
    """*data* as a page's text; its title is the page's own, or the first heading."""
    page = _page(decoded(data, declared, meta=True))
    text, blocks = _Writer().written(_body(page))
    named = page.css_first("title")
    title = " ".join(cleaned(named.text()).split()) if named else ""
    first = next((block.title for block in blocks if block.kind == "heading"), "")
    return Parsed(text, blocks, title or first, updated=_updated(page), media_type=HTML)


def text_of(source: str) -> str:
    """The text of a piece of HTML."""
    return _Writer().written(_page(source).root)[0]


def _page(source: str) -> LexborHTMLParser:
    try:
        return LexborHTMLParser(source)
    except (ValueError, SelectolaxError) as error:
        raise DocumentRefused("its HTML cannot be read, or needs more memory than is allowed") from error


def _body(page: LexborHTMLParser) -> LexborNode | None:
    """The part that the page calls its main one, if much of the text is there."""
    mains = page.css("main, [role=main]")
    if len(mains) == 1 and page.body:
        whole = len(page.body.text())
        if len(mains[0].text()) >= _MAIN_SHARE * whole:
            return mains[0]
    return page.body or page.root


def _updated(page: LexborHTMLParser) -> datetime | None:
    told = {(each.attributes.get("property") or each.attributes.get("name") or "").lower(): each for each in page.css("meta[content]")}
    for name in _DATES:
        if name in told:
            try:
                return datetime.fromisoformat((told[name].attributes.get("content") or "").strip())
            except ValueError:
                continue
    return None


class _Writer:
    """Writes a tree as text, without recursion: hostile pages nest deeply."""

    def __init__(self) -> None:
        self._pieces: list[str] = []
        self._length = 0
        self._blocks: list[Block] = []
        self._open: list[tuple[str, int]] = []
        self._pre = 0

    def written(self, root: LexborNode | None) -> tuple[str, tuple[Block, ...]]:
        """The text of *root*, and its blocks."""
        node, depth = root, 0
        while node is not None:
            below = self._enter(node)
            if below is not None:
                node, depth = below, depth + 1
                continue
            while node is not None:
                self._leave(node)
                if depth == 0:
                    node = None
                elif node.next is not None:
                    node = node.next
                    break
                else:
                    node, depth = node.parent, depth - 1
        text = "".join(self._pieces)
        return text, tuple(sorted(self._blocks, key=lambda block: block.start))

    def _enter(self, node: LexborNode) -> LexborNode | None:
        """Write what *node* begins with; the first node below it that is worth reading."""
        tag = node.tag or ""
        if tag == "-text":
            self._say(cleaned(node.text_content or ""))
            return None
        if tag in _SILENT or tag.startswith(("-comment", "!", "_")) or _hidden(node):
            return None
        if tag == "br":
            self._put("\n")
        elif tag in ("td", "th") and self._pieces and not self._pieces[-1].endswith("\n"):
            self._put(" | ")
        elif tag in _PARTS:
            self._part(tag)
        return node.child

    def _part(self, tag: str) -> None:
        self._break(1 if tag in ("li", "tr", "dt", "dd", "caption", "thead", "tbody", "tfoot") else 2)
        if tag == "li":
            self._put("- ")
        if tag == "pre":
            self._pre += 1
        if tag in _KINDS or tag in _HEADINGS or tag in ("p", "blockquote"):
            self._open.append((tag, self._length))

    def _leave(self, node: LexborNode) -> None:
        tag = node.tag or ""
        if self._open and self._open[-1][0] == tag and not _hidden(node):
            _, start = self._open.pop()
            if tag == "pre":
                self._pre -= 1
            self._close(tag, start)
        if tag in _PARTS:
            self._break(1 if tag in ("li", "tr", "dt", "dd", "caption") else 2)

    def _close(self, tag: str, start: int) -> None:
        inside = any(kind in _KINDS for kind, _ in self._open)
        if inside or self._length <= start:
            return
        if tag in _HEADINGS:
            title = " ".join("".join(self._tail(start)).split())
            if title:
                self._blocks.append(Block(start, self._length, "heading", int(tag[1]), title))
        elif tag != "blockquote":
            self._blocks.append(Block(start, self._length, _KINDS.get(tag, "paragraph")))

    def _tail(self, start: int) -> list[str]:
        """The pieces from the offset *start* on."""
        number, at = len(self._pieces), self._length
        while number and at > start:
            number -= 1
            at -= len(self._pieces[number])
        return self._pieces[number:]

    def _say(self, text: str) -> None:
        if self._pre:
            self._put(text)
            return
        words = re.sub(r"\s+", " ", text)
        if not self._pieces or self._pieces[-1][-1] in " \n":
            words = words.lstrip(" ")
        self._put(words)

    def _put(self, text: str) -> None:
        if text:
            self._pieces.append(text)
            self._length += len(text)

    def _break(self, lines: int) -> None:
        """At least so many line ends stand here, unless nothing was said before."""
        if not self._pieces:
            return
        last = "".join(self._pieces[-2:])
        have = len(last) - len(last.rstrip("\n"))
        if last.endswith("- ") and self._pieces[-1] == "- ":
            return
        self._put("\n" * (lines - have) if have < lines else "")


_HEADINGS = frozenset({"h1", "h2", "h3", "h4", "h5", "h6"})


def _hidden(node: LexborNode) -> bool:
    if (node.tag or "").startswith("-"):
        return False
    told = node.attributes
    if not told:
        return False
    return "hidden" in told or told.get("aria-hidden") == "true" or (told.get("role") or "").lower() in _ROLES
