"""What a token costs the chat page in Chromium, and whether the last ones of a long answer cost more than the first."""

import itertools
import json
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any
from urllib.request import urlopen

from .scenarios import Course, Measured, Value
from .system import CAPIBARA, System
from .wire import Ask

_FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking", "--disable-sync")
_LATE = 30.0  # seconds that an answer may take longer than its tokens
#: Seconds of Chromium's main thread, as the DevTools protocol (Performance.getMetrics) names them.
_TASK = "TaskDuration"


@dataclass(frozen=True)
class PageCost(Course):
    """An answer of *tokens* tokens in the page, in paragraphs as answers are, and as a single one, which is the worst that can be."""

    tokens: int = 5000
    gap_ms: float = 2

    def fits(self, system: System) -> bool:
        """Once is enough: all of ours have the same page."""
        return system.name == CAPIBARA

    def quick(self) -> "PageCost":
        """A tenth of the tokens."""
        return replace(self, tokens=self.tokens // 10)

    def measure(self, system: System, engine: System, key: str) -> Measured:
        """Main thread time (us) a token in both halves of the answer, and how much more the second one takes, in percent."""
        if (chromium := shutil.which("chromium") or shutil.which("google-chrome")) is None:
            return Measured([], ["no chromium here: apt-get install chromium"])
        values: list[Value] = []
        errors: list[str] = []
        with _browser(chromium) as browser:
            for kind, paragraphs in (("paragraphs", True), ("one_paragraph", False)):
                ask = Ask(f"page-{kind}", self.tokens, self.gap_ms, paragraphs=paragraphs)
                first, last, words = self._answer(browser.new_page(), system.url, engine.url, ask)
                errors += [] if words == self.tokens else [f"{kind}: the page shows {words} tokens of {self.tokens}"]
                values += [(f"main_thread/{kind}_first_half", "us", first), (f"main_thread/{kind}_second_half", "us", last)]
                values.append((f"page_growth/{kind}", "%", (last / first - 1) * 100))
        return Measured(values, errors)

    def _answer(self, page: Any, url: str, engine: str, ask: Ask) -> tuple[float, float, int]:
        """Main thread time a token in the halves of the answer to *ask*, and the tokens that the page shows at the end."""
        devtools = page.context.new_cdp_session(page)
        devtools.send("Performance.enable")

        def busy() -> float:
            return next(float(each["value"]) for each in devtools.send("Performance.getMetrics")["metrics"] if each["name"] == _TASK)

        page.goto(url)
        page.get_by_role("textbox").fill(ask.question)
        said = _said(engine)
        marks = [busy()]
        page.keyboard.press("Enter")
        for share in (self.tokens // 2, self.tokens):
            _until_said(engine, said + share, self.tokens * self.gap_ms / 1000 + _LATE)
            if share == self.tokens:
                page.locator("article[data-status=done]").wait_for(timeout=_LATE * 1000)
            marks.append(busy())
        words = len(page.locator("article .text").inner_text().split())
        halves = [(after - before) * 1e6 / (self.tokens / 2) for before, after in itertools.pairwise(marks)]
        page.close()
        return halves[0], halves[1], words


@contextmanager
def _browser(chromium: str) -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=list(_FLAGS))
        try:
            yield browser
        finally:
            browser.close()


def _said(engine: str) -> int:
    """The tokens that the engine at *engine* has said so far: asking it costs the page nothing."""
    with urlopen(f"{engine}/counts", timeout=10) as response:
        counts: dict[str, int] = json.load(response)
    return counts["tokens"]


def _until_said(engine: str, count: int, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while _said(engine) < count and time.monotonic() < deadline:
        time.sleep(0.02)
