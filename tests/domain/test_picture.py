"""A timeline as a picture and as a page: whole, and safe whatever it holds."""

from html.parser import HTMLParser
from itertools import pairwise
from typing import Any
from xml.etree import ElementTree

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from capibara_flow.domain.picture import LANGUAGES, figures, html, in_words, svg, ticks
from capibara_flow.domain.timeline import timeline
from tests.domain.kept import Kept, passed_on, plain
from topics.chat import ChatMessage, ChatRequest

SVG = "{http://www.w3.org/2000/svg}"
HOSTILE = "</title></style><script>alert(1)</script>&amp;<img src=x onerror=alert(1)>\x00\x1b[2J\u202e\ufffe"


def hostile(text: str) -> Kept:
    """A turn that has *text* wherever people's words can be."""
    kept = Kept().asked(ChatRequest(messages=(ChatMessage(role="user", content=text),))).routed("one", route_name=text, reasoning=text)
    return kept.taken().words(text).done(text, expert=text).account(text, expert=text or "one")


class Tags(HTMLParser):
    """The elements of a page and their attributes."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.seen: list[tuple[str, dict[str, Any]]] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.seen.append((tag, dict(attrs)))


def test_every_stage_has_a_bar_or_a_mark_inside_the_picture() -> None:
    told = timeline(passed_on().record)
    picture = ElementTree.fromstring(svg(told))
    rows = picture.findall(f"{SVG}g")
    assert len(rows) == len(told.stages)
    for row in rows:
        assert len(row.findall(f"{SVG}rect")) + len(row.findall(f"{SVG}circle")) == 1
        for bar in row.findall(f"{SVG}rect"):
            assert 250 <= float(bar.get("x", 0)) <= float(bar.get("x", 0)) + float(bar.get("width", 0)) <= 793


def test_the_page_shows_all_that_is_known() -> None:
    page = html(timeline(plain(text="hello there").record))
    for words in ("count to five", "hellothere", "no rule matches", "waits for one", "acme", "<svg"):
        assert words in page
    assert page.startswith("<!doctype html>")


@pytest.mark.parametrize("language", [*LANGUAGES, "xx"])
def test_the_page_speaks_the_language_that_is_wanted(language: str) -> None:
    page = html(timeline(plain().record), language)
    assert ("Etapas" in page) == (language == "es")
    assert f'lang="{language if language in LANGUAGES else "en"}"' in page


@settings(max_examples=25)
@example(HOSTILE)
@given(st.text(max_size=40))
def test_people_s_words_stay_words(text: str) -> None:
    told = timeline(hostile(text).record)
    ElementTree.fromstring(svg(told))
    tags = Tags(html(told)).seen
    assert not {"script", "img", "link", "iframe"} & {tag for tag, _ in tags}
    assert not [name for _, about in tags for name in about if name.startswith("on") or name in {"src", "href"}]
    assert sum(tag == "title" for tag, _ in tags) == len(told.stages) + 2


def test_nothing_is_asked_of_other_hosts() -> None:
    for text in (svg(timeline(plain().record)), html(timeline(plain().record))):
        assert "url(" not in text
        assert text.replace("http://www.w3.org/2000/svg", "").count("://") == 0


def test_in_spanish_the_timeline_says_so_and_names_stay() -> None:
    kept = Kept().asked().routed().taken("caller@a:1").words("x").wait(1).taken("caller@b:2").words("y").done().account(lasted=0)
    page = html(timeline(kept.record), "es")
    for words in ("espera a router", "nunca dijo su final", "1 de los intentos no dijeron su final", "experto one", "route_name=default"):
        assert words in page
    assert "waits for" not in page
    assert "pasado a otro: engine unreachable" in html(timeline(passed_on().record), "es")
    assert "espera a one" in svg(timeline(kept.record), "es")


@given(st.floats(0.001, 1e7))
def test_a_line_of_time_has_a_few_round_places(seconds: float) -> None:
    places = ticks(seconds)
    assert places[0] == 0
    assert 3 <= len(places) <= 8
    assert all(before < after for before, after in pairwise(places))
    assert places[-1] <= seconds * 1.001


def test_facts_in_words_do_not_repeat_what_stands_beside_them() -> None:
    told = timeline(plain().record)
    router = next(stage for stage in told.stages if stage.name == "router")
    assert in_words(router).startswith("route_name=default")
    assert figures(told)["tokens"] == "3 + 2"
