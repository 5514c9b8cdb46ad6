"""Routing on the project's own questions, and on CLINC150 where somebody has it: figures, and the halves that they are told for."""

import asyncio
import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from capibara_flow.cli.evaluate import Answer, Question, answer, learn, read_questions, report
from capibara_flow.engines.embeddings.build import build_embedder
from capibara_flow.settings import ROUTES, read_routes

HERE = Path(__file__).parent

#: Written before anything was tuned; its halves are told apart by a hash.
OWN = HERE / "routing.jsonl"

#: Written later, by the same hand, to see whether the first set was followed too closely.
FRESH = HERE / "fresh.jsonl"

#: Written by two others who had seen neither routes nor questions.
UNSEEN = HERE / "unseen.jsonl"


@dataclass(frozen=True)
class Answered:
    """Questions and what was said of them."""

    questions: tuple[Question, ...]
    answers: tuple[Answer, ...]

    @property
    def figures(self) -> dict[str, Any]:
        """The report of all."""
        return report(self.questions, self.answers)

    def half(self, name: str) -> "Answered":
        """The questions of the half ``dev``, which may be tuned on, or ``test``."""
        kept = [pair for pair in zip(self.questions, self.answers, strict=True) if half(pair[0].text) == name]
        return Answered(tuple(question for question, _ in kept), tuple(told for _, told in kept))


def half(text: str) -> str:
    """Which half a question is in, whatever stands beside it."""
    return ("dev", "test")[hashlib.sha256(text.encode()).digest()[0] % 2]


def answered(path: Path, embedder: str, routes: Path | None = None) -> Answered:
    """The questions of *path* as the routes of the file (the packaged ones when left out) answer them."""
    return asyncio.run(_answered(path, embedder, routes))


async def _answered(path: Path, name: str, routes: Path | None) -> Answered:
    known = read_routes(routes or ROUTES)
    questions = read_questions(path, known)
    embedder = build_embedder(name)
    try:
        semantics, scale = await learn(known, embedder)
        return Answered(questions, tuple(await answer(questions, semantics, scale, embedder)))
    finally:
        await embedder.aclose()
