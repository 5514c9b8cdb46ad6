"""Where in a TOML text a key stands, so that a complaint about a value can name the line (TOML 1.0)."""

import re
from collections.abc import Iterator, Mapping, Sequence

Path = tuple[str | int, ...]

_BLANK = re.compile(r"(?:[ \t\r\n]|#[^\n]*)*")
_GAP = re.compile(r"[ \t]*")
_NAME = re.compile(r"[A-Za-z0-9_-]+")
_PLAIN = re.compile(r"[^,\]}#\n]*")
#: The longest quotes first: an empty text is two quotes, and three begin a text of several lines.
_STRINGS = (
    re.compile(r'"""(?:\\.|[^\\])*?"""(?:""|"(?!"))?', re.DOTALL),
    re.compile(r"'''.*?'''(?:''|'(?!'))?", re.DOTALL),
    re.compile(r'"(?:\\.|[^"\\\n])*"'),
    re.compile(r"'[^'\n]*'"),
)
_ESCAPES = {"b": "\b", "t": "\t", "n": "\n", "f": "\f", "r": "\r", '"': '"', "\\": "\\"}
_ESCAPE = re.compile(r"\\(u[0-9A-Fa-f]{4}|U[0-9A-Fa-f]{8}|.)")


def line_of(text: str, loc: Sequence[str | int]) -> int | None:
    """The line (from 1) of the value at *loc*, or of the innermost table around it that is there; none when even that is not.

    *text* is valid TOML; *loc* is a path of keys and indices, as ``pydantic`` tells it: what stands for no key is passed over
    from the end.
    """
    return nearest(lines_of(text), loc)


def nearest(lines: Mapping[Path, int], loc: Sequence[str | int]) -> int | None:
    """As ``line_of``, for who asks several times: *lines* are those of the text, by ``lines_of``."""
    return next((lines[tuple(loc[:length])] for length in range(len(loc), 0, -1) if tuple(loc[:length]) in lines), None)


def lines_of(text: str) -> dict[Path, int]:
    """The line of every value and table of *text*, which is valid TOML, by its path."""
    lines: dict[Path, int] = {}
    at, line = 0, 1
    for path, position in _Scanner(text).values():
        line += text.count("\n", at, position)
        at = position
        lines.setdefault(path, line)
    return lines


class _Scanner:
    """Goes through a text once, and yields the path of each value, with the position of its key or of itself, in order."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._at = 0
        self._counts: dict[Path, int] = {}

    def values(self) -> Iterator[tuple[Path, int]]:
        """All that the text holds."""
        table: Path = ()
        while self._skip(_BLANK) < len(self._text):
            began = self._at
            if self._text[began] == "[":
                table = self._header()
                yield from ((table[:length], began) for length in range(1, len(table) + 1))
            else:
                yield from self._pair(table)

    def _header(self) -> Path:
        several = self._text.startswith("[[", self._at)
        self._at += 2 if several else 1
        *outer, last = self._key()
        self._at += 2 if several else 1
        path: Path = ()
        for name in outer:
            path = self._newest((*path, name))
        path = (*path, last)
        if not several:
            return self._newest(path)
        self._counts[path] = self._counts.get(path, 0) + 1
        return self._newest(path)

    def _newest(self, path: Path) -> Path:
        """What is added to a list of tables is added to its last one."""
        return (*path, self._counts[path] - 1) if path in self._counts else path

    def _pair(self, table: Path) -> Iterator[tuple[Path, int]]:
        began = self._at
        names = self._key()
        self._at += 1  # the equals sign
        self._skip(_GAP)
        yield from (((*table, *names[:length]), began) for length in range(1, len(names) + 1))
        yield from self._value((*table, *names))

    def _key(self) -> list[str]:
        """The names of a dotted key; what follows it comes next."""
        names = []
        while True:
            self._skip(_GAP)
            quote = self._text[self._at]
            raw = self._string() if quote in "\"'" else self._taken(_NAME)
            names.append(_ESCAPE.sub(_unescaped, raw[1:-1]) if quote == '"' else raw.strip("'"))
            self._skip(_GAP)
            if self._text[self._at] != ".":
                return names
            self._at += 1

    def _value(self, path: Path) -> Iterator[tuple[Path, int]]:
        match self._text[self._at]:
            case "[":
                yield from self._list(path)
            case "{":
                yield from self._inline(path)
            case '"' | "'":
                self._string()
            case _:
                self._taken(_PLAIN)

    def _list(self, path: Path) -> Iterator[tuple[Path, int]]:
        self._at += 1
        index = 0
        while self._next_is_not("]"):
            yield (*path, index), self._at
            yield from self._value((*path, index))
            index += 1

    def _inline(self, path: Path) -> Iterator[tuple[Path, int]]:
        self._at += 1
        while self._next_is_not("}"):
            yield from self._pair(path)

    def _next_is_not(self, end: str) -> bool:
        """Go to the next element of a list or table; past its *end* when there is none."""
        self._skip(_BLANK)
        if self._text[self._at] == ",":
            self._at += 1
            self._skip(_BLANK)
        if self._text[self._at] != end:
            return True
        self._at += 1
        return False

    def _string(self) -> str:
        found = next(match for pattern in _STRINGS if (match := pattern.match(self._text, self._at)))
        self._at = found.end()
        return found[0]

    def _taken(self, pattern: re.Pattern[str]) -> str:
        began = self._at
        return self._text[began : self._skip(pattern)]

    def _skip(self, pattern: re.Pattern[str]) -> int:
        found = pattern.match(self._text, self._at)
        self._at = found.end() if found else self._at
        return self._at


def _unescaped(escape: re.Match[str]) -> str:
    code = escape[1]
    return chr(int(code[1:], 16)) if code[0] in "uU" and len(code) > 1 else _ESCAPES.get(code, code)
