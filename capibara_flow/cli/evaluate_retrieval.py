"""``capibara eval retrieval``: how well what answers a question is found, by all that finds and by each of it alone."""

import asyncio
import gzip
import hashlib
import os
import random
import shutil
import tempfile
import time
import zlib
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from capibara_flow.domain import bm25, relevance, retrieval
from capibara_flow.domain.entities import folded, mentions, names_of_title
from capibara_flow.engines.embeddings.build import build_embedder
from capibara_flow.engines.embeddings.cached import CachedEmbedder
from capibara_flow.engines.embeddings.kept import KeptEmbedder
from capibara_flow.engines.ladybug import LadybugGraph
from capibara_flow.engines.milvus import MilvusPassages
from capibara_flow.ports import Embedder
from capibara_flow.runtime.searching import FINDERS, Searcher, backdrop
from capibara_flow.settings import SettingsError
from topics.knowledge import Mention, Passage, Scope

Row = TypeVar("Row", bound=BaseModel)

#: What is compared: the whole, and what each finder does.
CONFIGURATIONS = {
    "dense": frozenset({"dense"}),
    "bm25": frozenset({"lexical"}),
    "fused": frozenset({"dense", "lexical"}),
    "with graph": FINDERS,
}
_CUTS = (1, 2, 5, 10)
_DRAWS = 1000
_BATCH = 200


class Text(BaseModel):
    """A line of the corpus: a passage; other fields are ignored."""

    model_config = ConfigDict(frozen=True, coerce_numbers_to_str=True)

    id: str
    text: str
    title: str = ""


class Query(BaseModel):
    """A line of the questions: what is right by ids or by titles; with an empty list nothing is, and nothing should be found."""

    model_config = ConfigDict(frozen=True, coerce_numbers_to_str=True)

    id: str = ""
    question: str = Field(min_length=1)
    gold: str | tuple[str, ...] | None = None
    gold_titles: tuple[str, ...] | None = None

    @model_validator(mode="after")
    def _known(self) -> "Query":
        if self.gold == "" or (self.gold is None and self.gold_titles is None) or (self.gold and self.gold_titles):
            raise ValueError("needs either gold or gold_titles; an empty list where nothing in the corpus answers")
        return self

    @property
    def right(self) -> tuple[str, ...]:
        """The ids or titles."""
        return (self.gold,) if isinstance(self.gold, str) else tuple(self.gold or self.gold_titles or ())


@dataclass(frozen=True)
class Answer:
    """What was found for a question, in order, how long that took (seconds), and whether it is *related* enough to ground an answer."""

    found: tuple[str, ...]
    seconds: float
    related: bool = True


def cache_folder() -> Path:
    """Where this user keeps what can be made again."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "capibara"


def evaluate(
    corpus: Path, queries: Path, embedder: str, *, collection: str = "", ablation: bool = False, floor: float = relevance.FLOOR
) -> dict[str, Any]:
    """The figures of ``capibara eval retrieval``, ready for JSON.

    What is found counts as it is ranked; beside it stands how often *floor* would leave a question without sources. A *collection*
    keeps what was made of the corpus under that name. Raises ``SettingsError`` naming file and line of what is wrong.
    """
    if not all(each.isalnum() or each in "-_." for each in collection) or collection.startswith("."):
        raise SettingsError(f"--collection {collection!r}: letters, digits, - _ and . only")
    texts = read(corpus, Text)
    if double := len(texts) - len({text.id for text in texts}):
        raise SettingsError(f"{corpus}: {double} ids stand there twice")
    asked = read(queries, Query)
    gold = [_gold(query, texts, queries) for query in asked]
    return asyncio.run(_evaluated(texts, asked, gold, embedder, collection=collection, ablation=ablation, floor=floor))


def read(path: Path, kind: type[Row]) -> list[Row]:
    """The rows of a JSON-lines file, which may be compressed (gzip); raises ``SettingsError`` naming the line that is wrong."""
    try:
        data = path.read_bytes()
        lines = (gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data).split(b"\n")
    except (OSError, EOFError, zlib.error) as error:
        raise SettingsError(f"{path}: cannot be read: {error}") from error
    rows = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            rows.append(kind.model_validate_json(line))
        except ValidationError as error:
            problems = "; ".join(f"{'.'.join(map(str, each['loc'])) or 'line'}: {each['msg']}" for each in error.errors())
            raise SettingsError(f"{path}:{number}: {problems}") from error
    if not rows:
        raise SettingsError(f"{path}: nothing in it")
    return rows


def _gold(query: Query, texts: Sequence[Text], path: Path) -> list[set[str]]:
    """What is right, as groups of ids: each title is a group of all that have it."""
    wanted = query.right
    groups: dict[str, set[str]] = {each: set() for each in wanted}
    for text in texts:
        name = text.title if query.gold_titles else text.id
        if name in groups:
            groups[name].add(text.id)
    if missing := [each for each, group in groups.items() if not group]:
        raise SettingsError(f"{path}: question {query.question!r}: the corpus has no {missing[0]!r}")
    return list(groups.values())


async def _evaluated(
    texts: Sequence[Text],
    queries: Sequence[Query],
    gold: Sequence[retrieval.Gold],
    name: str,
    *,
    collection: str,
    ablation: bool,
    floor: float,
) -> dict[str, Any]:
    embedder = build_embedder(name)
    try:
        async with _index(texts, embedder, collection) as (scope, passages, graph):
            searcher = Searcher(embedder, passages, graph, backdrop=await backdrop(embedder))
            await searcher.search(scope, queries[0].question)  # what is read only once is read now
            whole = await _answers(searcher, scope, queries, "with graph", floor)
            report: dict[str, Any] = {"embedder": embedder.model, "passages": len(texts), **figures(whole, gold)}
            report["latency_ms"] = _latency(whole)
            report |= _not_named(whole, queries, gold) | {"nothing_found": _nothing(whole, gold, floor)}
            if ablation:
                again = Searcher(CachedEmbedder(embedder, 2 * len(queries)), passages, graph)
                report["ablation"] = {each: figures(await _answers(again, scope, queries, each), gold) for each in CONFIGURATIONS}
    finally:
        await embedder.aclose()
    return report


async def _answers(searcher: Searcher, scope: Scope, queries: Sequence[Query], configuration: str, floor: float = 0.0) -> list[Answer]:
    """Every question by itself, as in service, and timed."""
    answers = []
    with _progress() as progress:
        for query in progress.track(queries, description=configuration):
            started = time.perf_counter()
            found = await searcher.search(scope, query.question, max(_CUTS), finders=CONFIGURATIONS[configuration])
            seconds = time.perf_counter() - started
            answers.append(Answer(tuple(source.passage.id for source in found), seconds, relevance.related(found, floor)))
    return answers


def figures(answers: Sequence[Answer], gold: Sequence[retrieval.Gold]) -> dict[str, Any]:
    """Means over the questions that something answers, and the bootstrap interval of recall at 1 and 5."""
    answers, gold = [answer for answer, each in zip(answers, gold, strict=True) if each], [each for each in gold if each]
    at = {k: [retrieval.recall(answer.found, each, k) for answer, each in zip(answers, gold, strict=True)] for k in _CUTS}
    gains = [retrieval.ndcg(answer.found, each) for answer, each in zip(answers, gold, strict=True)]
    chance = random.Random(0)  # noqa: S311  the same draws at each run
    draws = [chance.choices(range(len(gains)), k=len(gains)) for _ in range(_DRAWS)] if gains else []
    intervals = {f"recall@{k}_95": [round(each, 4) for each in retrieval.interval(at[k], draws)] for k in (1, 5)}
    means = {f"recall@{k}": _mean(values) for k, values in at.items()}
    return {"n": len(gains), **means, "ndcg@10": _mean(gains), **intervals}


def _mean(values: Sequence[float]) -> float:
    return round(sum(values) / max(1, len(values)), 4)


def _nothing(answers: Sequence[Answer], gold: Sequence[retrieval.Gold], floor: float) -> dict[str, Any]:
    """The share of questions that *floor* leaves without sources: of those that nothing answers, and wrongly, of the others.

    Of these only those count for which something right was among the first five, so that there was something to lose.
    """
    rows = list(zip(answers, gold, strict=True))
    without = [not answer.related for answer, each in rows if not each]
    lost = [not answer.related for answer, each in rows if each and retrieval.recall(answer.found, each, 5)]
    shares = {"unanswerable": _mean(without), "answerable": _mean(lost)}
    return {"floor": floor, "n": {"unanswerable": len(without), "answerable": len(lost)}, **shares}


def _latency(answers: Sequence[Answer]) -> dict[str, float]:
    seconds = [answer.seconds for answer in answers]
    return {"p50": round(1000 * retrieval.percentile(seconds, 0.5), 1), "p95": round(1000 * retrieval.percentile(seconds, 0.95), 1)}


def _not_named(answers: Sequence[Answer], queries: Sequence[Query], gold: Sequence[retrieval.Gold]) -> dict[str, Any]:
    """The figures of the questions that do not name all titles which are right: these can only be found over something else."""
    rows = [each for each in zip(answers, queries, gold, strict=True) if each[1].gold_titles and not _names_all(each[1])]
    return {"not_all_named": figures([answer for answer, _, _ in rows], [each for _, _, each in rows])} if rows else {}


def _names_all(query: Query) -> bool:
    asked = f" {' '.join(bm25.words_of(query.question))} "
    return all(any(f" {folded(name)} " in asked for name in names_of_title(title)) for title in query.right)


@asynccontextmanager
async def _index(texts: Sequence[Text], embedder: Embedder, collection: str) -> AsyncIterator[tuple[Scope, MilvusPassages, LadybugGraph]]:
    """The stores that come along, with the corpus in them: in a folder that is thrown away, or is kept for the *collection*."""
    scope, mark = Scope("evaluation", collection or "evaluation"), _mark(texts, embedder)
    with _folder(collection) as folder:
        done = folder / "done"
        ready = done.is_file() and done.read_text() == mark
        if not ready:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
        passages, graph = MilvusPassages(str(folder / "passages.db")), LadybugGraph(folder / "graph.lbug")
        try:
            await passages.prepare(embedder.model, embedder.dimension)
            if not ready:
                await _filled(scope, texts, embedder, passages, graph)
                done.write_text(mark)
            yield scope, passages, graph
        finally:
            await passages.aclose()
            await graph.aclose()


@contextmanager
def _folder(collection: str) -> Iterator[Path]:
    if not collection:
        with tempfile.TemporaryDirectory(prefix="capibara-eval-") as folder:
            yield Path(folder)
        return
    yield cache_folder() / "evaluation" / collection


def _mark(texts: Sequence[Text], embedder: Embedder) -> str:
    """What an index is of: another corpus or model makes it anew."""
    whole = hashlib.sha256(f"2 {embedder.model}".encode())
    for text in texts:
        whole.update(text.model_dump_json().encode())
    return whole.hexdigest()


async def _filled(scope: Scope, texts: Sequence[Text], embedder: Embedder, passages: MilvusPassages, graph: LadybugGraph) -> None:
    rows = [_passage(text) for text in texts]
    with _progress() as progress:
        embedding = progress.add_task("embedding", total=len(rows))
        linking = progress.add_task("linking", total=len(rows))
        kept = KeptEmbedder(embedder, cache_folder() / "embeddings", lambda more: progress.advance(embedding, more))
        for start in range(0, len(rows), _BATCH):
            some = rows[start : start + _BATCH]
            found = [bm25.searchable(each) for each in some]
            await passages.put(
                scope,
                some,
                await kept.embed(found, "passage"),
                [bm25.passage_weights(text, each.language) for text, each in zip(found, some, strict=True)],
            )
            named: list[Mention] = [mention for each in some for mention in mentions([each], each.title)]
            await graph.put(scope, f"rows from {start}", named)
            progress.advance(linking, len(some))


def _passage(text: Text) -> Passage:
    language = bm25.language_of(text.text)
    return Passage(text.id, f"d{text.id}", 0, text.text, 0, len(text.text), title=text.title, language=language)


def _progress() -> Progress:
    console = Console(stderr=True)
    return Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), console=console, transient=True
    )


def table(report: dict[str, Any]) -> Table:
    """*report* for people: a row a configuration."""
    shown = Table("", "n", *(f"R@{k}" for k in _CUTS), "nDCG@10", "R@1 95 %", "R@5 95 %", box=None, pad_edge=False)
    rows = {"all questions": report, **report.get("ablation", {})}
    if "not_all_named" in report:
        rows["not all titles named"] = report["not_all_named"]
    for name, row in rows.items():
        spans = (f"{row[f'recall@{k}_95'][0]:.3f}-{row[f'recall@{k}_95'][1]:.3f}" for k in (1, 5))
        shown.add_row(name, str(row["n"]), *(f"{row[f'recall@{k}']:.3f}" for k in _CUTS), f"{row['ndcg@10']:.3f}", *spans)
    return shown


def nothing_told(shares: dict[str, Any]) -> str:
    """How many questions go without sources, in one line."""
    n, lines = shares["n"], []
    if n["unanswerable"]:
        lines.append(f"{100 * shares['unanswerable']:.1f} % of the {n['unanswerable']} that nothing answers")
    if n["answerable"]:
        lines.append(f"{100 * shares['answerable']:.1f} % of the {n['answerable']} for which something right is among the first 5")
    return f"left without sources at relevance {shares['floor']:g}: {', '.join(lines) or 'nothing'}"
