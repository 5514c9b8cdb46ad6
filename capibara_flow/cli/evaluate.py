"""``capibara eval routing``: how well questions that somebody labelled are routed, beside the baselines that routing has to beat."""

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from capibara_flow.domain import quality
from capibara_flow.domain.complexity import Scale, by_length
from capibara_flow.domain.learning import Numbers
from capibara_flow.domain.routes import DEFAULT, Routes
from capibara_flow.domain.semantics import Match, Semantics, centroids
from capibara_flow.domain.subjects import subject_of
from capibara_flow.domain.understanding import Learned
from capibara_flow.engines.embeddings.build import build_embedder
from capibara_flow.errors import CannotStart
from capibara_flow.ports import Embedder
from capibara_flow.runtime.understanding import Tools
from capibara_flow.settings import ROUTES, SettingsError, read_routes
from topics.chat import ChatMessage, Complexity

#: What people call questions that belong to no route.
_NOWHERE = frozenset({"oos", "none", "out_of_scope"})


def _named(route: object) -> object:
    return DEFAULT if isinstance(route, str) and route in _NOWHERE else route


def _spelt(level: object) -> object:
    return level.strip().lower().replace(" ", "_").replace("-", "_") if isinstance(level, str) else level


class Question(BaseModel):
    """A line of the data: what was asked, and what is right; other fields are ignored."""

    model_config = ConfigDict(frozen=True)

    text: str = Field(min_length=1)
    route: Annotated[str, BeforeValidator(_named)]
    lang: str | None = None
    complexity: Annotated[Complexity | None, BeforeValidator(_spelt)] = None
    hard: bool = False


@dataclass(frozen=True)
class Answer:
    """What was said of a question, and how long that took, in seconds."""

    match: Match
    complexity: Complexity
    embedding: float
    deciding: float


def routing(data: Path, routes: Path | None = None, embedder: str = "universal") -> dict[str, Any]:
    """The figures of ``capibara eval routing``, ready for JSON; *routes* is the packaged file when left out.

    Raises ``SettingsError`` naming file and line of what is wrong, ``CannotStart`` when the embedding model is not there.
    """
    known = read_routes(routes or ROUTES)
    questions = read_questions(data, known)
    figures = asyncio.run(_measured(questions, known, embedder))
    return {"data": data.name, "routes": (routes or ROUTES).name, **figures}


def read_questions(path: Path, routes: Routes) -> tuple[Question, ...]:
    """The labelled questions of a JSON-lines file, blank lines left out; raises ``SettingsError`` naming the line that is wrong."""
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise SettingsError(f"{path}: cannot be read: {error.strerror}") from error
    questions = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            question = Question.model_validate_json(line)
        except ValidationError as error:
            problems = "; ".join(f"{'.'.join(map(str, each['loc'])) or 'line'}: {each['msg']}" for each in error.errors())
            raise SettingsError(f"{path}:{number}: {problems}") from error
        if question.route not in routes.names:
            raise SettingsError(f"{path}:{number}: route: no route is called {question.route!r}; there are: {', '.join(routes.names)}")
        questions.append(question)
    if not questions:
        raise SettingsError(f"{path}: no questions in it")
    return tuple(questions)


async def _measured(questions: Sequence[Question], routes: Routes, name: str) -> dict[str, Any]:
    embedder = build_embedder(name)
    try:
        started = time.perf_counter()
        semantics, scale = await learn(routes, embedder)
        learning = time.perf_counter() - started
        answers = await answer(questions, semantics, scale, embedder)
        figures = {"embedder": embedder.model, "learning_s": round(learning, 2), **report(questions, answers)}
    finally:
        await embedder.aclose()
    return {**figures, "latency_ms": _latency(answers), "baselines": await _baselines(questions, routes)}


async def learn(routes: Routes, embedder: Embedder) -> tuple[Semantics, Scale]:
    """What a router knows: the routes, and the complexity that their file teaches, or the packaged one."""
    learned = await Tools(embedder, Learned.learn).learned(routes, read_routes)
    return learned.semantics, learned.scale


async def answer(questions: Sequence[Question], semantics: Semantics, scale: Scale, embedder: Embedder) -> list[Answer]:
    """Every question by itself, as in service, and timed."""
    await embedder.embed(["warm"])
    answers = []
    for question in questions:
        started = time.perf_counter()
        subject = subject_of([ChatMessage(role="user", content=question.text)])
        vector = (await embedder.embed([subject]))[0]
        embedded = time.perf_counter()
        match, (level, _) = semantics.choose(subject, vector), scale.measure(subject, vector)
        answers.append(Answer(match, level, embedded - started, time.perf_counter() - embedded))
    return answers


def report(questions: Sequence[Question], answers: Sequence[Answer]) -> dict[str, Any]:
    """The figures of *answers*; each share with its 95 % interval, each part with its count."""
    truth, told = [each.route for each in questions], [each.match.route for each in answers]
    right = [one == other for one, other in zip(truth, told, strict=True)]
    languages = sorted({each.lang for each in questions if each.lang})
    return {
        **_share(right),
        "per_route": quality.per_class(truth, told),
        "per_language": {
            lang: _share([hit for hit, each in zip(right, questions, strict=True) if each.lang == lang]) for lang in languages
        },
        "hard": _share([hit for hit, each in zip(right, questions, strict=True) if each.hard]),
        "confusion": quality.confusion(truth, told),
        "calibration_error": round(quality.calibration_error([each.match.confidence for each in answers], right), 4),
        "complexity": _complexity(questions, [each.complexity for each in answers]),
        "out_of_scope": _out_of_scope(questions, answers),
    }


def _share(right: Sequence[bool]) -> dict[str, Any]:
    share = sum(right) / max(1, len(right))
    low, high = quality.interval(share, len(right))
    return {"n": len(right), "accuracy": round(share, 4), "accuracy_95": [round(low, 4), round(high, 4)]}


def _complexity(questions: Sequence[Question], told: Sequence[Complexity]) -> dict[str, Any] | None:
    pairs = [(question.complexity, level) for question, level in zip(questions, told, strict=True) if question.complexity]
    if not pairs:
        return None
    truth, said = zip(*pairs, strict=True)
    return {
        "n": len(pairs),
        "macro_f1": round(quality.macro_f1(truth, said), 4),
        "accuracy": round(quality.accuracy(truth, said), 4),
        "per_level": quality.per_class(truth, said),
        "confusion": quality.confusion(truth, said),
    }


def _out_of_scope(questions: Sequence[Question], answers: Sequence[Answer]) -> dict[str, Any] | None:
    pairs = list(zip(questions, answers, strict=True))
    outside = [answer for question, answer in pairs if question.route == DEFAULT]
    inside = [answer for question, answer in pairs if question.route != DEFAULT]
    area = quality.auroc([each.match.familiarity for each in inside], [each.match.familiarity for each in outside])
    if area is None:
        return None
    return {
        "n": len(outside),
        "auroc": round(area, 4),
        "recognised": round(sum(each.match.route == DEFAULT for each in outside) / len(outside), 4),
        "inside_refused": round(sum(each.match.route == DEFAULT for each in inside) / len(inside), 4),
    }


def _latency(answers: Sequence[Answer]) -> dict[str, float]:
    whole = sorted(each.embedding + each.deciding for each in answers)
    return {
        "median": round(median(whole) * 1000, 2),
        "p95": round(whole[int(0.95 * (len(whole) - 1))] * 1000, 2),
        "embedding_median": round(median(each.embedding for each in answers) * 1000, 2),
        "deciding_median": round(median(each.deciding for each in answers) * 1000, 2),
    }


async def _baselines(questions: Sequence[Question], routes: Routes) -> dict[str, Any]:
    """One MiniLM mean a route, and complexity by length alone: learned from the examples, and from the data's own other lengths."""
    found: dict[str, Any] = {"minilm_centroid": await _nearest_mean(questions, routes)}
    leveled = [(each.text, each.complexity) for each in questions if each.complexity]
    if leveled:
        truth = [level for _, level in leveled]
        teacher = routes if routes.tells_complexity else read_routes()
        taught = [(each.text, each.level) for each in teacher.labelled if each.level]
        lengths = by_length([text for text, _ in taught], [level for _, level in taught])
        found["length_only"] = {"macro_f1": round(quality.macro_f1(truth, [lengths.measure(text) for text, _ in leveled]), 4)}
        others = (by_length(*zip(*(leveled[:at] + leveled[at + 1 :]), strict=True)) for at in range(len(leveled)))
        fitted = [lengths.measure(text) for lengths, (text, _) in zip(others, leveled, strict=True)] if len(set(truth)) == 4 else []
        if len(leveled) > 8 and fitted:
            found["length_only_fitted_to_data"] = {"macro_f1": round(quality.macro_f1(truth, fitted), 4)}
    return found


async def _nearest_mean(questions: Sequence[Question], routes: Routes) -> dict[str, Any] | None:
    try:
        embedder = build_embedder("minilm")
    except CannotStart:
        return None
    try:
        names, means = centroids(routes, await embedder.embed([each.text for each in routes.labelled]))
        likeness: Numbers = (await embedder.embed([each.text for each in questions])) @ means.T
    finally:
        await embedder.aclose()
    told = [names[index] for index in likeness.argmax(axis=1)]
    right = [each.route == name for each, name in zip(questions, told, strict=True)]
    languages = sorted({each.lang for each in questions if each.lang})
    best = likeness.max(axis=1).tolist()
    inside = [score for score, each in zip(best, questions, strict=True) if each.route != DEFAULT]
    area = quality.auroc(inside, [score for score, each in zip(best, questions, strict=True) if each.route == DEFAULT])
    return {
        **_share(right),
        "per_language": {
            lang: _share([hit for hit, each in zip(right, questions, strict=True) if each.lang == lang]) for lang in languages
        },
        "auroc": None if area is None else round(area, 4),
    }
