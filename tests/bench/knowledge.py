"""What grounding costs: search and ingestion on the real embedded stores, as a library grows: ``python -m tests.bench.knowledge``.

The library is made up (Spanish and English, names that lead from one document to the next), so that every machine has the same one. Its
vectors are random, for only ingestion has to make them: what a search costs does not depend on where the vectors lie. The questions
are embedded by the real model, each for the first time. Every size is measured in a process of its own, which tells its memory as well.
Filling the graph takes longest and more than twice as long for twice as many: it knows the first 10,000 passages only, unless `--linked`.

Made-up names cost a model more than the words that it knows: `--texts FILE` takes passages of real texts in instead (JSON lines with `text`
and `title`, as for `capibara eval retrieval`; gzip or not).

Examples: `python -m tests.bench.knowledge`, `python -m tests.bench.knowledge --passages 6000 --embedder e5 --keep`,
`python -m tests.bench.knowledge --passages 100000 --embedder random` (minutes: 177 s for the passages and 95 s to read
them back on a machine that was busy with other things, and the graph).
"""

import argparse
import asyncio
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import zlib
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from capibara_flow.cli.evaluate_retrieval import Text as TextRow
from capibara_flow.cli.evaluate_retrieval import read
from capibara_flow.domain.bm25 import passage_weights, searchable
from capibara_flow.domain.chunking import Chunk
from capibara_flow.domain.entities import mentions
from capibara_flow.domain.ingesting import document_id, edition_of, linked_as, passages_of
from capibara_flow.domain.relevance import Backdrop
from capibara_flow.engines.embeddings.build import build_embedder
from capibara_flow.engines.embeddings.threaded import Kind
from capibara_flow.engines.ladybug import LadybugGraph
from capibara_flow.engines.milvus import MilvusPassages
from capibara_flow.engines.parsing.sandbox import Parsers
from capibara_flow.engines.postgres.database import Database
from capibara_flow.engines.postgres.documents import PostgresDocuments
from capibara_flow.engines.postgres.embedded import EmbeddedPostgres
from capibara_flow.ports import Embedder, Vectors
from capibara_flow.runtime.ingesting import File, Ingester, by_rule
from capibara_flow.runtime.searching import Searcher, backdrop
from capibara_flow.settings import KnowledgeSettings
from topics.knowledge import Document, Mention, Passage, Scope

from . import system
from .scenarios import Figure

EMBEDDERS = ("e5", "universal", "minilm", "random")
SCOPE = Scope("bench")
NOW = datetime(2026, 11, 21, tzinfo=UTC)
#: Passages of a document of the library, and documents that are put into the stores in one go.
_PIECES, _AT_ONCE = 5, 50
#: Passages that the graph knows at most.
LINKED = 10_000
#: Bars of the issue: milliseconds of a search, and passages a second by embedder.
SEARCH_MS, SEARCH_AT = 60.0, 6000
RATES = {"e5": 5.0, "universal": 40.0, "minilm": 40.0}
#: Questions before those that count: they open connections and read how often each term occurs.
_WARMUP = 5

_SYLLABLES = (
    "ba be bra ca cor da del dri el fa fen ga gor ha ia jo kar la len lo ma mi mor na nel no or pa per ra ren ro sa sil ta tor u va vel zo"
)
_PLACES = ("Valley", "Bridge", "River", "Castle", "Harbour", "Museum", "School", "Market")
_TOPICS = {
    "en": ("copper mines", "river trade", "glass painting", "old maps", "winter harvests", "stone bridges", "choral music", "silk looms"),
    "es": ("minas de cobre", "comercio fluvial", "pintura sobre vidrio", "mapas antiguos", "cosechas de invierno", "puentes de piedra",
           "música coral", "telares de seda"),
}  # fmt: skip
_SENTENCES = {
    "en": (
        "{name} wrote about {topic} in {year}, long before {other} came to the region.",
        "The papers on {topic} were kept by {other}, who had met {name} in {place}.",
        "In {year} the council of {place} paid {number} coins for the {topic} that {name} had promised.",
        "Nobody in {place} remembers why the {topic} were given up after the flood of {year}.",
        "A letter of {other} tells how {number} families lived from {topic} near {place}.",
    ),
    "es": (
        "{name} escribió sobre {topic} en {year}, mucho antes de que {other} llegara a la región.",
        "Los papeles sobre {topic} quedaron en manos de {other}, que había conocido a {name} en {place}.",
        "En {year} el concejo de {place} pagó {number} monedas por los trabajos de {topic} que {name} había prometido.",
        "Nadie en {place} recuerda por qué se abandonaron los trabajos de {topic} después de la riada de {year}.",
        "Una carta de {other} cuenta cómo {number} familias vivían de {topic} cerca de {place}.",
    ),
}
_ASKED = {
    "en": ("Who kept the papers of {name} on {topic}?", "What did {name} promise to the council of {place} in {year}?"),
    "es": ("¿Quién guardó los papeles de {name} sobre {topic}?", "¿Qué prometió {name} al concejo de {place} en {year}?"),
}


@dataclass(frozen=True)
class Text:
    """A document of the library: *pieces* of about a hundred words, and who it is about."""

    title: str
    language: str
    pieces: Sequence[str]

    @property
    def markdown(self) -> bytes:
        """The document as a file, with a heading above each piece."""
        parts = (f"## {number}. {self.title}\n\n{piece}\n" for number, piece in enumerate(self.pieces, 1))
        return "\n".join((f"# {self.title}\n", *parts)).encode()


def texts(passages: int, seed: int = 0) -> Iterator[Text]:
    """Documents of as many *passages* together: each is about somebody who is named in others as well."""
    random, people = Random(seed), _people(passages)
    for number in range(0, passages, _PIECES):
        language = "es" if (number // _PIECES) % 2 else "en"
        pieces = [_piece(random, people, number // _PIECES, language) for _ in range(min(_PIECES, passages - number))]
        yield Text(people[number // _PIECES], language, pieces)


def _people(passages: int) -> list[str]:
    random, syllables = Random(1), _SYLLABLES.split()
    names = (
        "".join(random.choices(syllables, k=3)).capitalize() + " " + "".join(random.choices(syllables, k=3)).capitalize()
        for _ in range(10**9)
    )
    found: dict[str, None] = {}
    while len(found) * _PIECES < passages + _PIECES:
        found[next(names)] = None
    return list(found)


def _piece(random: Random, people: Sequence[str], own: int, language: str) -> str:
    return " ".join(_filled(random, random.choice(_SENTENCES[language]), people, own, language) for _ in range(7))


def _filled(random: Random, sentence: str, people: Sequence[str], own: int, language: str) -> str:
    return sentence.format(
        name=people[own],
        other=random.choice(people),
        topic=random.choice(_TOPICS[language]),
        place=f"{random.choice(people).split()[0]} {random.choice(_PLACES)}",
        year=random.randrange(1100, 1950),
        number=random.randrange(10, 5000),
    )


@dataclass(frozen=True)
class Shelf:
    """What is taken in: each time others of the *rows* of real passages, or made-up ones where there are none; *words* each on average."""

    words: int
    rows: Iterator[TextRow] | None = None

    def some(self, passages: int, name: str) -> list[Text]:
        """Documents of as many *passages* together; raises ``ValueError`` where there are no more."""
        if self.rows is None:
            return list(texts(passages, zlib.crc32(name.encode())))
        taken = list(islice(self.rows, passages))
        if len(taken) < passages:
            raise ValueError(f"the file has too few texts: {len(taken)} are left where {passages} were to be taken in")
        groups = [taken[at : at + _PIECES] for at in range(0, passages, _PIECES)]
        return [Text(each[0].title or each[0].id, "", [row.text for row in each]) for each in groups]


def shelf(file: str) -> Shelf:
    """The texts of *file*, in an order of chance that is always the same; made-up ones without a file."""
    if not file:
        return Shelf(_words(piece for text in texts(500) for piece in text.pieces))
    rows = read(Path(file), TextRow)
    Random(0).shuffle(rows)
    return Shelf(_words(row.text for row in rows), iter(rows))


def _words(pieces: Iterable[str]) -> int:
    return round(statistics.mean(len(piece.split()) for piece in pieces))


def questions(count: int, passages: int, seed: int) -> list[str]:
    """*count* questions, one language after the other, about somebody in a library of *passages*."""
    random, people = Random(seed), _people(passages)
    tongues = ("en", "es")
    return [
        _filled(random, random.choice(_ASKED[tongues[n % 2]]), people, random.randrange(len(people)), tongues[n % 2]) for n in range(count)
    ]


class RandomEmbedder:
    """``ports.Embedder`` that costs nothing: a vector of no meaning, the same for the same text."""

    model, dimension = "random", 384

    async def embed(self, texts: Sequence[str], kind: Kind = "query") -> Vectors:
        return np.concatenate([np.zeros((0, self.dimension), np.float32), *(_vectors(1, self.dimension, hash(text)) for text in texts)])

    async def aclose(self) -> None:
        return None


def _vectors(count: int, dimension: int, seed: int) -> Vectors:
    rows = np.random.default_rng(abs(seed)).standard_normal((count, dimension)).astype(np.float32)
    unit: Vectors = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    return unit


class Meter:
    """Seconds of CPU by part: one deed at a time, so that nothing else is in them."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._alone = asyncio.Lock()

    def around(self, deed: Callable[..., Any], part: str) -> Callable[..., Any]:
        """*deed*, counted as *part*."""

        async def counted(*given: Any, **named: Any) -> Any:
            async with self._alone:
                before = time.process_time()
                try:
                    return await deed(*given, **named)
                finally:
                    self.seconds[part] += time.process_time() - before

        return counted

    def of(self, inner: Any, parts: Mapping[str, str]) -> Any:
        """*inner* with each deed counted as the part that *parts* tells for its name, or for ``*``."""
        return _Metered(inner, self, parts)


class _Metered:
    def __init__(self, inner: Any, meter: Meter, parts: Mapping[str, str]) -> None:
        self._inner, self._meter, self._parts = inner, meter, parts

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._inner, name)
        part = self._parts.get(name) or self._parts.get("*")
        return self._meter.around(found, part) if part and callable(found) else found


@dataclass(frozen=True)
class Stores:
    """What is measured, open in a folder of its own."""

    embedder: Embedder
    passages: MilvusPassages
    graph: LadybugGraph
    documents: PostgresDocuments
    backdrop: Backdrop

    def searcher(self, meter: "Meter | None" = None) -> Searcher:
        """One that is set up as ours are; *meter* counts its parts."""
        if meter is None:
            return Searcher(self.embedder, self.passages, self.graph, stand=self.documents.standing, backdrop=self.backdrop)
        return Searcher(
            meter.of(self.embedder, {"embed": "embed"}),
            meter.of(self.passages, {"nearest": "nearest", "matching": "matching", "spread": "matching", "fetch": "fetch"}),
            meter.of(self.graph, {"*": "graph"}),
            stand=meter.around(self.documents.standing, "documents"),
            backdrop=self.backdrop,
        )


@asynccontextmanager
async def stores(embedder: str, folder: Path) -> AsyncIterator[Stores]:
    """Empty stores in *folder*, and the model, loaded."""
    async with AsyncExitStack() as stack:
        model: Embedder = RandomEmbedder() if embedder == "random" else await asyncio.to_thread(build_embedder, embedder, capacity=1024)
        stack.push_async_callback(model.aclose)
        passages = MilvusPassages(str(folder / "passages.db"), timeout=60)
        stack.push_async_callback(passages.aclose)
        graph = LadybugGraph(folder / "graph")
        stack.push_async_callback(graph.aclose)
        await passages.prepare(model.model, model.dimension)
        server = EmbeddedPostgres(folder / "postgres")
        await asyncio.to_thread(server.start)
        stack.callback(server.stop)
        documents = PostgresDocuments(Database(server.url))
        stack.push_async_callback(documents.aclose)
        yield Stores(model, passages, graph, documents, await backdrop(model))


async def fill(into: Stores, passages: int, linked: int = LINKED) -> None:
    """Put a library of *passages* there, with vectors that mean nothing; the graph knows the first *linked* of them."""
    some: list[tuple[Document, list[Passage]]] = []
    for number, text in enumerate(texts(passages)):
        made = _document(text)
        if number * _PIECES < linked:
            await into.graph.put(SCOPE, linked_as(made[0]), mentions(made[1], text.title))
        some.append(made)
        if len(some) == _AT_ONCE:
            await _put(into, some, number)
            some = []
    if some:
        await _put(into, some, passages)


async def _put(into: Stores, some: Sequence[tuple[Document, list[Passage]]], seed: int) -> None:
    pieces = [piece for _, each in some for piece in each]
    sparse = [passage_weights(searchable(each), each.language) for each in pieces]
    await into.passages.put(SCOPE, pieces, _vectors(len(pieces), into.embedder.dimension, seed), sparse)
    await asyncio.gather(*(into.documents.ready(document) for document, _ in some))


def _document(text: Text) -> tuple[Document, list[Passage]]:
    """*text* as it is kept: each of its pieces is a passage."""
    chunks = [Chunk(0, len(piece), piece) for piece in text.pieces]
    plain = Document(document_id(SCOPE, text.title), SCOPE, text.title, text.title, text.title, text.language, NOW, passages=len(chunks))
    document = replace(plain, edition=edition_of(plain, chunks))
    return document, passages_of(document, chunks)


async def searching(into: Stores, passages: int, asked: int, seed: int) -> Iterator[tuple[str, str, float]]:
    """The figures of *asked* questions as they are served, of as many on one core, and of as many whose parts are counted one at a time."""
    every, searcher = questions(_WARMUP + 3 * asked, passages, 1000 + seed), into.searcher()
    for question in every[:_WARMUP]:
        await searcher.search(SCOPE, question, 10)
    served, alone, apart = (every[_WARMUP + asked * part :][:asked] for part in range(3))
    wall, cpu = await _asked(searcher, served)
    with one_core():
        one, _ = await _asked(searcher, alone)
        parts = await _parts(into, apart)
    kinds = (("wall", wall), ("cpu", cpu), ("one_core", one))
    figures = {f"search_{kind}_p{q}": _quantile(values, q) for kind, values in kinds for q in (50, 95)}
    return iter((f"{name}@passages={passages}", "ms", value) for name, value in (figures | parts).items())


async def _asked(searcher: Searcher, every: Sequence[str]) -> tuple[list[float], list[float]]:
    """Milliseconds on the clock, and of CPU, of a search for each of *every* question."""
    wall, cpu = [], []
    for question in every:
        began, used = time.perf_counter(), time.process_time()
        if not await searcher.search(SCOPE, question, 10):
            raise RuntimeError(f"nothing was found for {question!r}")
        wall.append(1000 * (time.perf_counter() - began))
        cpu.append(1000 * (time.process_time() - used))
    return wall, cpu


@contextmanager
def one_core() -> Iterator[None]:
    """Whatever this process does goes on on a single core: all its threads together have as much of the machine as one."""
    allowed = os.sched_getaffinity(0)
    _allow({max(allowed)})
    try:
        yield
    finally:
        _allow(allowed)


def _allow(cores: set[int]) -> None:
    for thread in os.listdir("/proc/self/task"):
        with suppress(ProcessLookupError):  # it has ended meanwhile
            os.sched_setaffinity(int(thread), cores)


async def _parts(into: Stores, every: Sequence[str]) -> dict[str, float]:
    rows: dict[str, list[float]] = defaultdict(list)
    for question in every:
        meter = Meter()
        searcher = into.searcher(meter)
        used = time.process_time()
        await searcher.search(SCOPE, question, 10)
        meter.seconds["rank"] = time.process_time() - used - sum(meter.seconds.values())
        for part in ("embed", "nearest", "matching", "graph", "fetch", "documents", "rank"):
            rows[part].append(1000 * meter.seconds[part])
    return {f"search_cpu/{part}": statistics.median(values) for part, values in rows.items()}


def _quantile(values: Sequence[float], percent: int) -> float:
    return float(np.percentile(values, percent))


async def ingesting(into: Stores, passages: int, seed: int, of: Shelf) -> Iterator[tuple[str, str, float]]:
    """How fast documents of *passages* together are taken in as files, by as many at a time as a worker takes; then where the CPU goes."""
    async with AsyncExitStack() as stack:
        parsers = Parsers()
        stack.push_async_callback(parsers.aclose)
        plain = Ingester(parsers.parse, into.embedder, into.passages, into.graph, into.documents, passage_weights)
        await plain.take_in(SCOPE, File(b"# First %d\n\nWhat is opened is opened now." % seed, f"first{seed}.md"), NOW)
        wall, _, count = await _taken(plain, of.some(passages, f"w{seed}"), f"w{seed}", at_once=KnowledgeSettings().ingest_permits)
        meter = Meter()
        made = _ingester(into, parsers, meter)
        _, spent, parts = await _taken(made, of.some(passages, f"r{seed}"), f"r{seed}", at_once=1)
    meter.seconds["chunk"] = max(0.0, spent - sum(meter.seconds.values()))
    rates = [("ingest_wall", "passages/s", count / wall), ("ingest_cpu", "passages/s", parts / spent)]
    rows = [*rates, *((f"ingest_cpu/{part}", "ms/passage", 1000 * seconds / parts) for part, seconds in meter.seconds.items())]
    return iter((f"{metric}@words={of.words}", unit, value) for metric, unit, value in rows)


async def _taken(made: Ingester, library: Sequence[Text], name: str, *, at_once: int) -> tuple[float, float, int]:
    """The documents of *library* are taken in, *at_once* at a time: seconds on the clock, of CPU, and passages that they became."""
    room, count = asyncio.Semaphore(at_once), 0

    async def one(number: int, text: Text) -> None:
        nonlocal count
        async with room:
            taken = await made.take_in(SCOPE, File(text.markdown, f"{name}-{number}.md"), NOW)
        count += taken.document.passages  # not in one step with waiting for it: others count meanwhile

    began, used = time.perf_counter(), _cpu()
    await asyncio.gather(*(one(number, text) for number, text in enumerate(library)))
    return time.perf_counter() - began, _cpu() - used, count


def _ingester(into: Stores, parsers: Parsers, meter: Meter) -> Ingester:
    async def linked(passages: Sequence[Passage], title: str) -> Sequence[Mention]:
        return await by_rule(passages, title)

    return Ingester(
        meter.around(parsers.parse, "parse"),
        meter.of(into.embedder, {"embed": "embed"}),
        meter.of(into.passages, {"*": "passages"}),
        meter.of(into.graph, {"*": "graph"}),
        meter.of(into.documents, {"*": "documents"}),
        passage_weights,
        extract=meter.around(linked, "entities"),
    )


def _cpu() -> float:
    """Of this process alone: the parsers' and PostgreSQL's stand in the wall time."""
    return time.process_time()


def _rss() -> float:
    """Megabytes that this process has in memory now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 1e6


@dataclass(frozen=True)
class Job:
    """What one process measures; *taken* passages, of the file *texts* if there is one, are taken in as files (none where it is 0).

    The graph knows *linked* at most.
    """

    embedder: str
    passages: int
    rounds: int
    asked: int
    taken: int
    linked: int = LINKED
    texts: str = ""


async def measure(job: Job) -> dict[str, tuple[str, list[float]]]:
    """The figures of *job* by metric: unit, and a value a round."""
    series: dict[str, tuple[str, list[float]]] = {}

    def note(rows: Iterator[tuple[str, str, float]]) -> None:
        for metric, unit, value in rows:
            series.setdefault(metric, (unit, []))[1].append(value)

    with tempfile.TemporaryDirectory(prefix="capibara-bench-") as name:
        async with stores(job.embedder, Path(name)) as into:
            began, size = time.perf_counter(), job.passages
            await fill(into, size, job.linked)
            note(iter([(f"fill@passages={size}", "s", time.perf_counter() - began)]))
            for number in range(job.rounds):
                note(await searching(into, size, job.asked, number))
            note(iter([(f"rss@passages={size}", "MB", _rss())]))
            given = shelf(job.texts)
            for number in range(job.rounds if job.taken else 0):
                note(await ingesting(into, job.taken, number, given))
    return series


def arguments(words: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.bench.knowledge", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--passages", default="1000,6000,10000", metavar="N,N", help="sizes of the library (1000,6000,10000)")
    parser.add_argument("--embedder", default="e5,universal,minilm", metavar="A,B", help=f"any of {', '.join(EMBEDDERS)}")
    parser.add_argument("--rounds", type=int, default=3, help="medians are of as many (3)")
    parser.add_argument("--questions", type=int, default=40, help="in a round, three times as many are asked (40)")
    parser.add_argument("--taken", type=int, default=50, help="passages that are taken in as files in a round; 0: none (50)")
    parser.add_argument("--texts", default="", metavar="FILE", help="real texts to take in (made-up ones)")
    parser.add_argument("--linked", type=int, default=LINKED, help=f"passages that the graph knows at most ({LINKED})")
    parser.add_argument("--keep", action="store_true", help="append the figures to tests/bench/figures.csv")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the figures there, as JSON")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    options = parser.parse_args(words)
    options.passages, options.embedder = [int(each) for each in options.passages.split(",")], options.embedder.split(",")
    if unknown := set(options.embedder) - set(EMBEDDERS):
        parser.error(f"{', '.join(sorted(unknown))}: no embedder; there are {', '.join(EMBEDDERS)}")
    if min(options.passages) < 1 or options.rounds < 1 or options.questions < 1:
        parser.error("--passages, --rounds and --questions: at least 1")
    return options


def jobs(options: argparse.Namespace) -> Iterator[Job]:
    """What is measured: each size with each embedder; files are taken in at the smallest size only, where they cost the same."""
    for embedder in options.embedder:
        for size in options.passages:
            taken = options.taken if size == min(options.passages) else 0
            yield Job(embedder, size, options.rounds, options.questions, taken, options.linked, options.texts)


def apart(job: Job) -> dict[Figure, list[float]]:
    """Measure *job* in a process of its own."""
    command = [sys.executable, "-m", "tests.bench.knowledge", "--job", json.dumps(vars(job))]
    done = subprocess.run(command, stdout=subprocess.PIPE, cwd=system.ROOT, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    return {Figure("knowledge", job.embedder, metric, unit): values for metric, (unit, values) in found.items()}


def table(series: Mapping[Figure, Sequence[float]]) -> Table:
    """The figures for people: median (minimum to maximum)."""
    systems = list(dict.fromkeys(figure.system for figure in series))
    result = Table("metric", "unit", *systems, title="median (min - max)")
    for metric, unit in dict.fromkeys((figure.metric, figure.unit) for figure in series):
        result.add_row(metric, unit, *(_cell(series.get(Figure("knowledge", each, metric, unit), ())) for each in systems))
    return result


def _cell(values: Sequence[float]) -> str:
    if not values:
        return ""
    return f"{statistics.median(values):.3g}" + (f" ({min(values):.3g} - {max(values):.3g})" if len(values) > 1 else "")


def bars(series: Mapping[Figure, Sequence[float]]) -> Iterator[str]:
    """What became of each bar that was measured."""
    for figure, values in series.items():
        median = statistics.median(values)
        if figure.metric == f"search_one_core_p50@passages={SEARCH_AT}":
            yield f"{'met' if median <= SEARCH_MS else 'missed'}: {figure.system} {figure.metric} {median:.3g} ms, at most {SEARCH_MS:g}"
        elif figure.metric.startswith("ingest_wall@") and (least := RATES.get(figure.system)):
            yield f"{'met' if median >= least else 'missed'}: {figure.system} {figure.metric} {median:.3g} passages/s, at least {least:g}"


def main() -> int:
    """Run as a program."""
    options, console = arguments(), Console(width=None if sys.stdout.isatty() else 160)
    if options.job:
        found = asyncio.run(measure(Job(**json.loads(options.job))))
        sys.stdout.write(f"\n{json.dumps(found)}\n")
        return 0
    series: dict[Figure, list[float]] = {}
    busy = system.others()
    for job in jobs(options):
        console.print(f"{job.embedder}, {job.passages} passages", style="dim")
        series |= apart(job)
    busy = max(busy, system.others())
    console.print(table(series))
    console.print(f"others kept this machine {busy:.0f} % busy")
    for line in bars(series):
        console.print(line, highlight=False)
    _keep(options, series, busy)
    return 0


def _keep(options: argparse.Namespace, series: dict[Figure, list[float]], busy: float) -> None:
    if options.out:
        rows = [figure._asdict() | {"values": values} for figure, values in series.items()]
        options.out.write_text(json.dumps({"busy_percent": busy, "figures": rows}, indent=1) + "\n")
    if options.keep:
        from .__main__ import record  # it brings all that the other scenarios need

        record(series, busy)


if __name__ == "__main__":
    sys.exit(main())
