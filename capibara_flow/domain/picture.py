"""A turn's timeline as a picture (SVG) and as a page (HTML): one file that asks nobody for anything else. Pure.

Both are built as trees of elements, which escape what they hold: the words of strangers stay words.
"""

from collections.abc import Mapping
from datetime import UTC, datetime
from math import floor, log10
from typing import Any
from xml.etree.ElementTree import Element, SubElement, tostring

from capibara_flow.domain.timeline import Stage, Timeline

_WIDTH, _ROW, _TOP = 1100, 26, 84  # pixels
_LEFT, _RIGHT = 250, 790  # where the line of time begins and ends
_LABEL, _TOLD, _TITLE = 32, 42, 110  # characters
_TICKS = 6
_ROOMY = 9  # pixels of a bar that has room for a mark
LANGUAGES = ("en", "es")

_STYLE = """
.turn{--paper:#fff;--ink:#1c2330;--soft:#687386;--line:#e3e7ee;--door:#8a94a6;--queue:#c3cad6;--work:#7a5af0;--attempt:#1f9d74;--end:#d97706;
--news:#2f7fe0;--cancel:#d97706;--dead:#d2354a;font:13px system-ui,-apple-system,"Segoe UI",sans-serif}
@media (prefers-color-scheme:dark){.turn{--paper:#161a21;--ink:#e8ebf1;--soft:#9aa4b5;--line:#2c333f;--queue:#4a5464}}
.turn text{fill:var(--ink);font-size:12.5px}.turn .soft{fill:var(--soft);font-size:11.5px}.turn .title{font-size:17px;font-weight:600}
.turn .paper{fill:var(--paper)}.turn .grid{stroke:var(--line);stroke-width:1}.turn .first{stroke:var(--paper);stroke-width:2}
.turn .silent{fill-opacity:.35;stroke:var(--attempt);stroke-dasharray:4 3}
.door{fill:var(--door)}.queue{fill:var(--queue)}.work{fill:var(--work)}.attempt{fill:var(--attempt)}
.end{fill:var(--end)}.news{fill:var(--news)}.cancel{fill:var(--cancel)}.dead{fill:var(--dead)}
"""
_PAGE_STYLE = """
body{margin:0;background:#f5f7fa;color:#1c2330;font:15px/1.5 system-ui,-apple-system,"Segoe UI",sans-serif}
main{max-width:1120px;margin:0 auto;padding:28px 20px 60px}h1{font-size:22px;margin:0 0 4px}h2{font-size:16px;margin:32px 0 8px}
.card{background:#fff;border:1px solid #e3e7ee;border-radius:12px;padding:14px;overflow-x:auto}code{font-size:13px}
pre{white-space:pre-wrap;overflow-wrap:anywhere;margin:0;font:inherit}
p.soft,td.soft{color:#687386}
dl{display:grid;grid-template-columns:repeat(auto-fill,minmax(150px,1fr));gap:12px;margin:18px 0}
dt{color:#687386;font-size:12.5px}dd{margin:0}
table{border-collapse:collapse;width:100%;font-size:13.5px}
td,th{text-align:left;vertical-align:top;padding:6px 10px 6px 0;border-top:1px solid #e3e7ee}
th{border:0;color:#687386;font-weight:500}td.n{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}
@media (prefers-color-scheme:dark){body{background:#0f1217;color:#e8ebf1}
.card{background:#161a21;border-color:#2c333f}td{border-color:#2c333f}}
"""
_SPANISH = {
    "Turn": "Turno",
    "began": "comenzó",
    "tenant": "inquilino",
    "expert": "experto",
    "outcome": "final",
    "seconds": "segundos",
    "first word after": "primera palabra tras",
    "tokens": "tokens",
    "attempts": "intentos",
    "forked from": "bifurcado de",
    "What is not known": "Lo que no se sabe",
    "Stages": "Etapas",
    "Answer": "Respuesta",
    "Reasoning": "Razonamiento",
    "from": "desde",
    "took": "duró",
    "stage": "etapa",
    "told": "resultado",
    "details": "detalles",
    "goes on": "en curso",
    "prompt": "pregunta",
    "answered": "respondidos",
    "burnt": "gastados",
}
#: What the timeline itself says, for people who read Spanish; its facts keep their names, as programs know them.
_PHRASES = {
    "asked": "pregunta",
    "waits for ": "espera a ",
    "dead letter of ": "carta muerta de ",
    "continued": "continúa",
    "waiting": "en espera",
    "loading": "cargando",
    "reset": "reinicio",
    "cancel": "cancelación",
    "passed on": "pasado a otro",
    "running": "en curso",
    "gave it up": "se rindió",
    "stopped it": "lo detuvo",
    "failed": "fallido",
    "broke off, tried again by the same process": "se cortó, y el mismo proceso lo intentó de nuevo",
    "never told its end: its process died or lost the turn": "nunca dijo su final: su proceso murió o perdió el turno",
    "the log holds nothing of it (switched off, or aged out): what was asked, and how attempts ended, is not known": (
        "el registro no guarda nada de él (apagado o caducado): no se sabe qué se preguntó ni cómo terminaron los intentos"
    ),
    "the question is no longer kept": "la pregunta ya no se guarda",
    "no output is kept: it has not been said yet, or has aged out": "no se guarda ninguna salida: aún no se ha dicho, o ha caducado",
    "no end is kept: it goes on, or was left behind": "no se guarda ningún final: sigue en curso, o quedó abandonado",
    " of the attempts told no end: what they counted is not in the tokens unless it reached the client": (
        " de los intentos no dijeron su final: lo que contaron no está en los tokens, salvo lo que llegó al cliente"
    ),
}


def svg(told: Timeline, language: str = "en") -> str:
    """*told* as a picture of its own, in *language* as ``html``."""
    return tostring(_picture(told, _spoken(language)), encoding="unicode") + "\n"


def _spoken(language: str) -> Mapping[str, str]:
    return _SPANISH if language == "es" else {}


def html(told: Timeline, language: str = "en") -> str:
    """*told* as a page in *language* (one of ``LANGUAGES``; English for any other)."""
    words = _spoken(language)
    page = Element("html", lang=language if language in LANGUAGES else "en")
    head = SubElement(page, "head")
    SubElement(head, "meta", charset="utf-8")
    SubElement(head, "meta", name="viewport", content="width=device-width, initial-scale=1")
    SubElement(head, "title").text = f"{words.get('Turn', 'Turn')} {told.turn}"
    SubElement(head, "style").text = _PAGE_STYLE
    main = SubElement(SubElement(page, "body"), "main")
    SubElement(main, "h1").text = _clean(told.question) or f"{words.get('Turn', 'Turn')} {told.turn}"
    _text(main, "p", told.turn, "soft")
    _figures(main, told, words)
    SubElement(main, "div", {"class": "card"}).append(_picture(told, words))
    _notes(main, told, words)
    _table(main, told, words)
    for title, text in (("Reasoning", told.reasoning), ("Answer", told.answer)):
        if text:
            SubElement(main, "h2").text = words.get(title, title)
            _text(SubElement(main, "div", {"class": "card"}), "pre", text)
    return "<!doctype html>\n" + tostring(page, encoding="unicode", method="html") + "\n"


def figures(told: Timeline) -> dict[str, str]:
    """What stands above a timeline, by name, in the order in which it is read."""
    totals = told.totals
    tokens = f"{totals.completion_tokens}" + (f" ({totals.burnt_tokens} made)" if totals.burnt_tokens > totals.completion_tokens else "")
    return {
        "began": moment(told.began),
        "tenant": told.tenant,
        "expert": told.expert,
        "outcome": told.outcome + (" (cached)" if totals.cached else ""),
        "seconds": f"{totals.seconds:.3f}",
        "first word after": "" if totals.first_token_seconds is None else f"{totals.first_token_seconds:.3f} s",
        "tokens": f"{totals.prompt_tokens} + {tokens}",
        "attempts": str(totals.attempts),
        "forked from": told.origin,
    }


def moment(when: float) -> str:
    """*when*, seconds since the epoch, in UTC."""
    return datetime.fromtimestamp(when, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def length(told: Timeline) -> float:
    """Seconds that the line of time has: to the last that is known, and never nothing."""
    ends = [stage.start if stage.end is None else stage.end for stage in told.stages]
    return max([told.totals.seconds, *ends, 0.001])


def ticks(seconds: float) -> list[float]:
    """Round places on a line of so many *seconds*, from 0, about as many as can be read."""
    rough = seconds / _TICKS
    size = 10.0 ** floor(log10(rough))
    step = next(size * each for each in (1, 2, 5, 10) if size * each >= rough * 0.999)
    return [step * number for number in range(int(seconds / step) + 1)]


def in_words(stage: Stage) -> str:
    """The facts of *stage* on one line, without what its name and outcome say."""
    said = {stage.name.removeprefix("waits for "), stage.outcome, "False", "0"}
    return "  ".join(f"{name}={text}" for name, value in stage.facts.items() if (text := _value(value)) not in said)


def _value(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3f}".rstrip("0").rstrip(".")
    if isinstance(value, list | tuple):
        return ",".join(map(str, value))
    return str(value)


def _picture(told: Timeline, words: Mapping[str, str]) -> Element:
    whole = length(told)
    height = _TOP + _ROW * len(told.stages) + 16
    size = {"width": str(_WIDTH), "height": str(height), "viewBox": f"0 0 {_WIDTH} {height}"}
    picture = Element("svg", {"xmlns": "http://www.w3.org/2000/svg", "class": "turn", "role": "img", **size})
    SubElement(picture, "title").text = f"Turn {told.turn}"
    SubElement(picture, "style").text = _STYLE
    SubElement(picture, "rect", {"class": "paper", "width": "100%", "height": "100%", "rx": "8"})
    _write(picture, 16, 30, _cut(told.question or f"Turn {told.turn}", _TITLE), "title")
    shown = [told.turn, *(f"{words.get(name, name)} {value}" for name, value in figures(told).items() if value and name in _IN_PICTURE)]
    _write(picture, 16, 50, " · ".join(map(_clean, shown)), "soft")
    for at in ticks(whole):
        x = _x(at, whole)
        SubElement(picture, "line", {"class": "grid", "x1": x, "x2": x, "y1": str(_TOP - 8), "y2": str(height - 12)})
        _write(picture, float(x), _TOP - 12, f"{at:.6g} s", "soft", anchor="middle")
    for number, stage in enumerate(told.stages):
        _draw(picture, stage, _TOP + _ROW * number, whole, words)
    return picture


_IN_PICTURE = frozenset({"expert", "outcome", "tokens"})


def _draw(picture: Element, stage: Stage, top: int, whole: float, words: Mapping[str, str]) -> None:
    """One stage: its name, its bar or mark, and what came of it."""
    row = SubElement(picture, "g")
    SubElement(row, "title").text = _clean(f"{_in(words, stage.name)} {_in(words, stage.outcome)}\n{in_words(stage)}")
    _write(row, 16, top + 17, _cut(_in(words, stage.name), _LABEL))
    start, end = float(_x(stage.start, whole)), float(_x(whole if stage.end is None else stage.end, whole))
    kind = f"{stage.kind} silent" if stage.facts.get("told") is False else stage.kind
    if stage.end == stage.start:
        SubElement(row, "circle", {"class": kind, "cx": f"{start:.1f}", "cy": str(top + 13), "r": "4.5"})
    else:
        bar = {"x": f"{start:.1f}", "y": str(top + 5), "width": f"{max(2.0, end - start):.1f}", "height": str(_ROW - 10), "rx": "3"}
        SubElement(row, "rect", {"class": kind, **bar})
    if isinstance(first := stage.facts.get("first_token"), float) and end - start > _ROOMY:
        x = _x(first, whole)
        SubElement(row, "line", {"class": "first", "x1": x, "x2": x, "y1": str(top + 5), "y2": str(top + _ROW - 5)})
    _write(row, _RIGHT + 22, top + 17, _cut(_result(stage, words), _TOLD), "soft")


def _result(stage: Stage, words: Mapping[str, str]) -> str:
    told = _in(words, stage.outcome)
    if stage.lasted is None:
        return told or words.get("goes on", "goes on")
    return " ".join(part for part in (f"{stage.lasted:.3f} s" if stage.lasted else "", told) if part)


def _in(words: Mapping[str, str], text: str) -> str:
    """*text* of the timeline's own in the language of *words*, if that is not its own: names and what others said stay."""
    if not words:
        return text
    found = next((phrase for phrase in _PHRASES if _begins(phrase, text)), "")
    return text.replace(found, _PHRASES[found], 1) if found else text


def _begins(phrase: str, text: str) -> bool:
    """Whether *phrase* is all of *text*, or its beginning or end where there is room for a name or a number."""
    if phrase[0] == " ":
        return text.endswith(phrase)
    return text == phrase or text.startswith(phrase if phrase[-1] == " " else f"{phrase}: ")


def _x(seconds: float, whole: float) -> str:
    return f"{_LEFT + (_RIGHT - _LEFT) * min(1.0, seconds / whole):.1f}"


def _write(parent: Element, x: float, y: float, text: str, kind: str = "", *, anchor: str = "start") -> None:
    about = {"x": f"{x:g}", "y": f"{y:g}", "text-anchor": anchor} | ({"class": kind} if kind else {})
    SubElement(parent, "text", about).text = text


def _figures(main: Element, told: Timeline, words: Mapping[str, str]) -> None:
    facts = SubElement(main, "dl")
    for name, value in figures(told).items():
        if value:
            one = SubElement(facts, "div")
            SubElement(one, "dt").text = words.get(name, name)
            _text(one, "dd", value)


def _notes(main: Element, told: Timeline, words: Mapping[str, str]) -> None:
    if told.missing:
        SubElement(main, "h2").text = words.get("What is not known", "What is not known")
        notes = SubElement(main, "ul")
        for each in told.missing:
            _text(notes, "li", _in(words, each))


def _table(main: Element, told: Timeline, words: Mapping[str, str]) -> None:
    SubElement(main, "h2").text = words.get("Stages", "Stages")
    table = SubElement(SubElement(main, "div", {"class": "card"}), "table")
    head = SubElement(table, "tr")
    for name in ("stage", "from", "took", "told", "details"):
        SubElement(head, "th").text = words.get(name, name)
    for stage in told.stages:
        row = SubElement(table, "tr")
        _text(row, "td", _in(words, stage.name))
        _text(row, "td", f"{stage.start:.3f}", "n")
        _text(row, "td", words.get("goes on", "goes on") if stage.lasted is None else f"{stage.lasted:.3f}", "n")
        _text(row, "td", _in(words, stage.outcome))
        _text(row, "td", in_words(stage), "soft")


def _text(parent: Element, tag: str, text: str, kind: str = "") -> None:
    SubElement(parent, tag, {"class": kind} if kind else {}).text = _clean(text)


def _clean(text: str) -> str:
    """*text* without what no XML may hold, nor a page obey: control characters, lone surrogates, marks of direction."""
    return "".join(letter if letter.isprintable() or letter in "\n\t" else "\ufffd" for letter in text)


def _cut(text: str, most: int) -> str:
    words = _clean(" ".join(text[: 8 * most].split()))
    return words if len(words) <= most else words[: most - 1] + "…"
