"""``capibara ingest``, ``search`` and ``rag``: files and folders become documents, and what they say is found again."""

import asyncio
import json
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from socket import gaierror
from time import sleep
from typing import Any

from nats.errors import NoRespondersError
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from capibara_flow.cli import doctor
from capibara_flow.cli.dead import PIPE_WIDTH, line, readable
from capibara_flow.cli.state import running
from capibara_flow.client import Ingested, RAGClient, RAGError, Searched
from capibara_flow.domain.turns import ANONYMOUS
from capibara_flow.errors import BrokerUnavailable, CannotStart
from capibara_flow.runtime.dead import new_turn
from capibara_flow.runtime.requests import replied
from capibara_flow.settings import KnowledgeSettings, Settings
from topics.grounding import Checked, CheckStores, DocumentFacts

#: Files on their way at the same time, and how often one is brought that was not taken for want of room.
_AT_ONCE, _TRIES = 4, 6
#: What is text or a document although it looks binary, and how much of a file is looked at.
_DOCUMENTS = (".pdf", ".docx")
_LOOK = 4096
_SHOWN = 20  # reasons of one kind
_CHECK_SECONDS = 600.0  # until an ingester's answer is given up, as long as the broker lets it reply


@dataclass(frozen=True)
class Walked:
    """Files that were found, with the name that each is to have; what was left out, and what cannot be read, with the reason."""

    files: dict[Path, str]
    skipped: dict[Path, str]
    refused: dict[Path, str]


@dataclass
class Summary:
    """What became of all files: how many by how, the refused ones with their reasons."""

    done: dict[str, int] = field(default_factory=lambda: dict.fromkeys(("created", "replaced", "unchanged", "same"), 0))
    refused: dict[Path, str] = field(default_factory=dict)
    skipped: dict[Path, str] = field(default_factory=dict)
    passages: int = 0

    @property
    def failed(self) -> bool:
        """Whether any file that was named or found is not in."""
        return bool(self.refused)

    def told(self) -> dict[str, Any]:
        """For programs."""
        refused, skipped = ({str(path): why for path, why in each.items()} for each in (self.refused, self.skipped))
        return {**self.done, "passages": self.passages, "refused": refused, "skipped": skipped}


def find(paths: Sequence[Path], *, recursive: bool, include: Sequence[str]) -> Walked:
    """The files of *paths*; folders are walked, with what is in them if *recursive*, for names that match one of *include*.

    Hidden files and those that look binary are skipped, unless they are named themselves.
    """
    files: dict[Path, str] = {}
    skipped: dict[Path, str] = {}
    refused: dict[Path, str] = {}
    for path in paths:
        if path.is_dir():
            for each in _walk(path, recursive=recursive):
                if reason := _unwanted(each, path, include):
                    skipped[each] = reason
                else:
                    files.setdefault(each, each.relative_to(path).as_posix())
        elif path.is_file():
            files.setdefault(path, path.name)
        else:
            refused[path] = "is neither a file nor a folder" if path.exists() else "does not exist"
    return Walked(files, skipped, refused)


def _walk(folder: Path, *, recursive: bool) -> Iterator[Path]:
    """Files below *folder*, in order; links to folders are not followed, so that no ring holds us."""
    for here, folders, names in os.walk(folder):
        folders[:] = sorted(folders) if recursive else []
        yield from (Path(here, name) for name in sorted(names))


def _unwanted(path: Path, root: Path, include: Sequence[str]) -> str:
    """Why *path*, found below *root*, is left out; empty when it is not."""
    below = path.relative_to(root)
    if any(part.startswith(".") for part in below.parts):
        return "hidden"
    if include and not any(fnmatch(path.name, pattern) or fnmatch(below.as_posix(), pattern) for pattern in include):
        return "not included"
    if not path.is_file():
        return "no plain file"
    return "" if path.suffix.lower() in _DOCUMENTS else _binary(path)


def _binary(path: Path) -> str:
    """Why *path* looks binary; empty when it does not, or cannot be looked at, which is then told by whoever reads it."""
    try:
        with path.open("rb") as file:
            beginning = file.read(_LOOK)
    except OSError:
        return ""
    if beginning.startswith((b"\xff\xfe", b"\xfe\xff")):  # text in UTF-16
        return ""
    return "looks binary" if b"\0" in beginning else ""


def ingest(client: RAGClient, found: Walked, collection: str, console: Console) -> Summary:
    """Bring all files, a few at a time; whoever does it again after an end in between does nothing twice.

    Raises ``RAGError`` when nobody answers at all or does not let us in: no other file would fare better.
    """
    summary, lock, stop = Summary(refused=dict(found.refused), skipped=dict(found.skipped)), threading.Lock(), threading.Event()
    total = sum(map(_size, found.files))

    with _progress(console, len(found.files), total) as (sent, next_file):

        def bring(path: Path) -> None:
            if stop.is_set():
                return
            try:
                result = _bring(client, path, found.files[path], collection, sent)
            except (RAGError, OSError) as error:
                if _hopeless(error):
                    stop.set()
                    raise
                with lock:
                    summary.refused[path] = str(error.strerror or error) if isinstance(error, OSError) else str(error)
            else:
                with lock:
                    summary.done[result.how] = summary.done.get(result.how, 0) + 1
                    summary.passages += result.passages if result.how in {"created", "replaced"} else 0
            next_file()

        with ThreadPoolExecutor(_AT_ONCE) as pool:
            try:
                list(pool.map(bring, found.files))
            except BaseException:
                stop.set()
                raise
    return summary


def _bring(client: RAGClient, path: Path, name: str, collection: str, sent: Callable[[int], None]) -> Ingested:
    for attempt in range(_TRIES):
        brought = 0

        def count(size: int) -> None:
            nonlocal brought
            brought += size
            sent(size)

        try:
            return client.ingest(path, collection=collection, name=name, progress=count)
        except RAGError as error:
            if not error.retryable or _hopeless(error) or attempt == _TRIES - 1:
                raise
            sent(-brought)
            sleep(min(8.0, 0.5 * 2**attempt))
    raise AssertionError("the last attempt returns or raises")


def _hopeless(error: Exception) -> bool:
    """Whether no other file would fare better: nobody is there, or nobody lets us in."""
    return isinstance(error, RAGError) and (error.status in {401, 403} or isinstance(error.__cause__, ConnectionRefusedError | gaierror))


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


@contextmanager
def _progress(console: Console, files: int, size: int) -> Iterator[tuple[Callable[[int], None], Callable[[], None]]]:
    """A bar over bytes and a count of files; call the first with bytes that were sent, the second for every file that is through."""
    count = TextColumn("{task.fields[files]}/{task.fields[of]} files")
    columns = (TextColumn("{task.description}"), BarColumn(), count, DownloadColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("ingesting", total=size, files=0, of=files)
        through, lock = [0], threading.Lock()

        def next_file() -> None:
            with lock:
                through[0] += 1
                bar.update(task, files=through[0])

        yield lambda sent: bar.advance(task, sent), next_file


def report(summary: Summary, console: Console) -> None:
    """Say on *console* what was left out and refused, and why."""
    by_reason: dict[str, list[Path]] = {}
    for path, why in summary.skipped.items():
        by_reason.setdefault(why, []).append(path)
    for why, paths in by_reason.items():
        names = ", ".join(line(str(path)) for path in paths[:3]) + (", ..." if len(paths) > 3 else "")
        console.print(f"[dim]skipped {len(paths)} ({why}): {escape(names)}[/]", highlight=False, soft_wrap=True)
    for path, why in list(summary.refused.items())[:_SHOWN]:
        console.print(f"[red]refused[/] {escape(line(str(path)))}: {escape(line(why, 400))}", highlight=False, soft_wrap=True)
    if len(summary.refused) > _SHOWN:
        console.print(f"and {len(summary.refused) - _SHOWN} more: --json tells all", highlight=False)


def in_words(summary: Summary) -> str:
    """The outcome in one line."""
    counts = ", ".join(f"{count} {how}" for how, count in (*summary.done.items(), ("refused", len(summary.refused))) if count)
    return f"{counts or 'nothing to do'}; {summary.passages} new passages"


# --- what is there ---------------------------------------------------------------------------------------------------------


def sources_told(found: Searched) -> str:
    """What was *found*, for people: number, score, title, where from, and the beginning of the text of each source."""
    blocks = [] if found.related or not found.sources else ["nothing related: a chat would not use these"]
    for each in found.sources:
        where = " · ".join(part for part in (line(each.url), each.date) if part)
        blocks.append(f"[{each.n}] {each.score:.3f}  {line(each.title)}\n    {where}\n    {line(each.text, 300)}")
    return readable("\n".join(blocks)) or "nothing was found"


def table(documents: Sequence[DocumentFacts]) -> Table:
    """A row for each document."""
    shown = Table("id", "title", "address", "language", "passages", box=None, pad_edge=False)
    shown.columns[0].no_wrap = True
    for each in documents:
        cells = (each.id, line(each.title, 60), line(each.address), line(each.language), str(each.passages))
        shown.add_row(*map(escape, cells))
    return shown


# --- the stores themselves -------------------------------------------------------------------------------------------------


def stores(settings: Settings, state: Path) -> KnowledgeSettings:
    """Where the stores are: as the settings say, else those of `capibara up` in *state*.

    Raises ``CannotStart`` while that runs, as stores that are embedded have one owner at a time.
    """
    knowledge, folder = settings.knowledge, state / "knowledge"
    if not knowledge.enabled and folder.exists():
        knowledge = knowledge.model_copy(update={"folder": folder})
    if knowledge.folder == folder and running(state):
        raise CannotStart("`capibara up` is running, and the stores that come along have one owner at a time: stop it first (Ctrl-C)")
    return knowledge


async def check(settings: Settings, state: Path, *, repair: bool) -> Checked:
    """Where the stores do not agree; with *repair* each of these is mended.

    The ingester that is at work is asked, for it knows what it is working on; where there is none, the stores are opened here. Raises
    ``Refused`` with the ingester's words, and what opening the stores raises.
    """
    if doctor.broker(settings).verdict == "ok" and not await asyncio.to_thread(doctor.refused, settings, "provisioner"):
        try:
            return await _asked(settings, repair=repair)
        except BrokerUnavailable as error:
            if not isinstance(error.__cause__, NoRespondersError):
                raise
    from capibara_flow.runtime.ingesting import disagreement  # noqa: PLC0415  loads what it needs
    from capibara_flow.wiring.knowledge import library  # noqa: PLC0415  loads what it needs

    async with library(stores(settings, state)) as here:
        return Checked(findings=tuple(map(disagreement, await here.check(repair))))


async def _asked(settings: Settings, *, repair: bool) -> Checked:
    """What an ingester says."""
    from capibara_flow import wiring  # noqa: PLC0415  loads every engine

    asked = CheckStores(turn=new_turn(ANONYMOUS), repair=repair)
    async with wiring.connected(settings, "provisioner") as client:
        late = "the ingester is still at it: ask again later, for what it mends it mends to the end"
        return await replied(client, asked, Checked, seconds=_CHECK_SECONDS, nobody="no ingester is there", late=late)


def findings_told(checked: Checked, *, repaired: bool) -> str:
    """What was found, for people."""
    words = {"remove": "removed: bring it again", "relink": "its links were made again", "trim": "the rest was taken out"}
    lines = []
    for each in checked.findings:
        done = words.get(each.repair, "mended") if repaired else f"--repair would {each.repair} it"
        where = f"{line(each.tenant)}/{line(each.collection)} {line(each.document)} {line(each.address)}"
        lines.append(f"{where}: {line(each.why)} ({done})")
    lines += [f"and {checked.more} more"] * bool(checked.more)
    return readable("\n".join(lines)) or "all stores agree"


async def reembed(knowledge: KnowledgeSettings, console: Console) -> int:
    """Make every vector anew with the embedder of the settings: how many there are."""
    from capibara_flow.wiring.knowledge import reembed as again  # noqa: PLC0415  loads what it needs

    columns = (TextColumn("{task.description}"), TextColumn("{task.completed} passages"), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("embedding", total=None)
        return await again(knowledge, lambda more: bar.advance(task, more))


def width(*, terminal: bool) -> int | None:
    """How wide a table may be."""
    return None if terminal else PIPE_WIDTH


def as_json(value: Any) -> str:
    """*value* for programs; what a terminal would obey is escaped."""
    text = json.dumps(value, ensure_ascii=False, indent=1)
    return "".join(letter if letter.isprintable() or letter == "\n" else json.dumps(letter)[1:-1] for letter in text)
