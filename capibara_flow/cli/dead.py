"""``capibara dead`` and ``capibara erase``: what they ask of the broker, and how it is shown."""

import json
import time
from typing import Any

from rich.markup import escape
from rich.table import Table

from capibara_flow import wiring
from capibara_flow.edge.identity import ANONYMOUS
from capibara_flow.errors import BadRequest, CapibaraError
from capibara_flow.runtime.dead import Again, DeadLetters, Letter, command, new_turn
from capibara_flow.runtime.erasing import erase
from capibara_flow.settings import Settings
from topics.streams import every_stream

_LINE = 160  # characters of a detail in the table
#: Columns where nobody looks but a pipe: no line is broken.
PIPE_WIDTH = 300


async def newest(settings: Settings, limit: int) -> tuple[list[Letter], int]:
    """At most *limit* letters, the newest first, and how many there are."""
    async with wiring.connected(settings, "observer") as client:
        return await DeadLetters(client).newest(limit)


async def of(settings: Settings, turn: str) -> list[Letter]:
    """All letters of *turn*; raises ``TurnUnknown``."""
    async with wiring.connected(settings, "observer") as client:
        return await DeadLetters(client).of(turn)


async def retry(settings: Settings, turn: str, stage: str | None, *, every: bool, keep: bool) -> tuple[list[Again], CapibaraError | None]:
    """Ask what the letters of *turn* keep again: what was asked, and the error that ended it early.

    Raises ``TurnUnknown`` and ``BadRequest`` before anything is asked.
    """
    async with wiring.connected(settings, "provisioner") as client:
        dead = DeadLetters(client)
        letters = await dead.of(turn, stage)
        if len(letters) > 1 and not every:
            stages = ", ".join(sorted({each.failed.stage for each in letters}))
            raise BadRequest(f"{turn} has {len(letters)} dead letters (at {stages}): choose with --stage, or retry them with --all")
        for each in letters:
            command(each, turn)  # all or none: nothing is asked when one of them cannot be
        asked: list[Again] = []
        for each in letters:
            try:
                deadline = time.time() + settings.edge.turn_seconds
                asked.append(await dead.retry(each, turn=new_turn(each.tenant), deadline=deadline, keep=keep))
            except CapibaraError as error:
                return asked, error
        return asked, None


async def erased(settings: Settings, turn: str) -> int:
    """Remove *turn* from every stream, also from those that this installation no longer wants; how many messages these were."""
    async with wiring.connected(settings, "provisioner") as client:
        return await erase(client, turn, every_stream(), retry_seconds=settings.worker.retry_seconds)


def told(again: Again, base: str) -> str:
    """What became of a letter, and how to read the answer from the edge at *base*."""
    letter = again.letter
    key = "" if letter.tenant == ANONYMOUS else f" -H 'Authorization: Bearer KEY'  (a key of {readable(letter.tenant)})"
    return (
        f"{line(letter.failed.turn)} at {line(letter.failed.stage)} is asked again as {again.turn}\n"
        f"  read the answer (GET /api/chat/{again.turn}/events): curl -N {base}/api/chat/{again.turn}/events{key}"
    )


def readable(text: str) -> str:
    """*text* without what a terminal would obey: a letter holds the words of strangers."""
    return "".join(letter if letter.isprintable() or letter == "\n" else "\ufffd" for letter in text)


def line(text: str, most: int = _LINE) -> str:
    """*text* as one line of at most *most* characters."""
    words = readable(" ".join(text.split()))
    return words if len(words) <= most else words[: most - 1] + "…"


def moment(letter: Letter) -> str:
    """When the letter came, in UTC."""
    return letter.when.strftime("%Y-%m-%dT%H:%M:%SZ")


def table(letters: list[Letter]) -> Table:
    """A row for each letter."""
    shown = Table("turn", "stage", "when", "title", "detail", box=None, pad_edge=False)
    for column in shown.columns[:3]:
        column.no_wrap = True
    for each in letters:
        failed = each.failed
        shown.add_row(*map(escape, (line(failed.turn), line(failed.stage), moment(each), line(failed.title), line(failed.detail))))
    return shown


def row(letter: Letter) -> dict[str, Any]:
    """*letter* for programs, without the command."""
    failed = letter.failed
    who = {"tenant": letter.tenant, "principal": letter.principal}
    return {"turn": failed.turn, "stage": failed.stage, "when": moment(letter), "title": failed.title, "detail": failed.detail, **who}


def page(letter: Letter) -> str:
    """Everything of *letter*, the command last and as JSON; what is no JSON is shown as it is."""
    failed = letter.failed
    facts = {
        "turn": failed.turn,
        "stage": failed.stage,
        "when": moment(letter),
        "tenant": letter.tenant or "(not told)",
        "principal": letter.principal or "(not told)",
        "title": failed.title,
        "detail": failed.detail,
    }
    try:
        body = json.dumps(json.loads(failed.body), indent=2, ensure_ascii=False)
    except ValueError:
        body = f"(no whole JSON; a very large command is cut off)\n{failed.body}"
    return readable("\n".join([*(f"{name:<9} {value}" for name, value in facts.items()), "command", body]))
