"""Turns that went wrong in every way, read out of what is kept of them and played again: the client gets the same bytes.

Between engines and client stands what ``workers.caller`` and its hop do, with the caller's own account of each attempt, but without a
broker: what an engine says, where it breaks, and how much of that gets lost on its way is chosen by chance.
"""

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass

from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from capibara_flow.domain.answering import Account
from capibara_flow.domain.capsule import changes
from capibara_flow.domain.continuing import continuing, failing, held, way_on
from capibara_flow.domain.fleet import Fleet
from capibara_flow.domain.record import Entry, Record
from capibara_flow.domain.recording import recorded
from capibara_flow.engines.recorded import Played, RecordedEngine
from capibara_flow.errors import BadRequest, EngineBroke, EngineBusy, EngineFault, EngineUnreachable, Transient
from capibara_flow.ports import Abilities, ChatEngine, Finish, Piece, Tally, Text
from topics.chat import PASSED_ON, CallExpert, ChatMessage, ChatRequest, RouteTurn, TurnFailed
from topics.message import Message
from topics.output import Output, Token, Waiting

T = "01JD3Y4S0QK5M7C2V9N8X1B6TZHRWE4F"
EXPERTS = ("phi", "other")
FLEET = Fleet.model_validate({"experts": [{"name": name, "urls": ["http://h:1"]} for name in EXPERTS]})
REQUEST = ChatRequest(messages=(ChatMessage(role="user", content="hola"),), model="phi")
WORDS = ("one", " two", " three", " four")
OTHER_WORDS = ("six", " seven", " eight", " nine")
FAULTS = {"broke": EngineBroke, "busy": EngineBusy, "unreachable": EngineUnreachable}


@dataclass(frozen=True)
class Try:
    """One attempt: so many of its *words* are *said*, then it *ends*. After one that *lasted* another follows at once."""

    said: int = 0
    ends: str = "broke"
    words: tuple[str, ...] = WORDS
    lasted: bool = False


class Died(Exception):
    """The process that called is gone, and the call is delivered again."""


class Scripted:
    """``ports.ChatEngine`` of all experts, which says one of *tries* after the other; *quiet* is set when somebody is to stop the turn."""

    def __init__(self, tries: Sequence[Try], abilities: Abilities, *, counts: bool) -> None:
        self.abilities = abilities
        self.quiet = asyncio.Event()
        self.now = Try()
        self._tries, self._counts = iter(tries), counts

    async def stream(self, request: ChatRequest) -> AsyncGenerator[Piece, None]:
        self.now = next(self._tries, self.now)  # one that refuses to go on is asked to say all again
        last = request.messages[-1]
        words = _behind(last.text if last.role == "assistant" else "", self.now.words)
        for word in words if self.now.ends == "stop" else words[: self.now.said]:
            yield Text(word)
        if self.now.ends in FAULTS:
            raise FAULTS[self.now.ends](f"it is {self.now.ends}")
        if self.now.ends == "died":
            raise Died
        if self.now.ends == "refused":
            raise BadRequest("it does not take that")
        if self.now.ends == "stopped":
            self.quiet.set()
            await asyncio.Event().wait()
        if self._counts:
            yield Tally(3, len(words))
        yield Finish("stop")

    async def health(self) -> None:
        """It is well."""

    async def aclose(self) -> None:
        """Nothing is open."""


def _behind(begun: str, words: tuple[str, ...]) -> tuple[str, ...]:
    return next((words[n:] for n in range(len(words) + 1) if "".join(words[:n]) == begun), words)


class Caller:
    """Calls experts until the turn has ended, and keeps all that is said of it; *now* tells how the attempt at work goes."""

    def __init__(
        self, engine: Callable[[str], ChatEngine], quiet: asyncio.Event, now: Callable[[], Try], hears: Callable[[int], None]
    ) -> None:
        self._engine, self._quiet, self._now, self._hears = engine, quiet, now, hears
        self._entries: list[Entry] = []
        self._said: list[Output] = []

    async def turn(self, *alternatives: str) -> Record:
        """The whole turn."""
        self._keep(RouteTurn(turn=T, request=REQUEST))
        command: CallExpert | None = CallExpert(turn=T, expert="phi", bucket=0, request=REQUEST, alternatives=alternatives)
        while command:
            self._keep(command)
            command = await self._call(command)
        return Record(T, tuple(self._entries))

    def _keep(self, *messages: Message) -> None:
        for message in messages:
            stream, subject = "CF_LOG", message.subject.replace(f"cf.work.{T}.", f"cf.log.{T}.asked.")
            if isinstance(message, Output):
                stream = "CF_OUT"
                self._said.append(message)
                self._hears(isinstance(message, Token))
            number = len(self._entries) + 1
            body = message.model_dump_json(exclude_none=True).encode()
            self._entries.append(Entry(stream, number, 100.0 + number, subject, {"Cf-Tenant": "acme"}, body))

    async def _call(self, command: CallExpert) -> CallExpert | None:
        """Try until it comes to an end; the next call, when it is another's turn."""
        deliveries, tries = 1, 0
        while True:
            holds, engine = held(self._said), self._engine(command.expert)
            way = way_on(holds, REQUEST, engine.abilities)
            common = {"turn": T, "branch": "main", "expert": command.expert, "started": 1.0}
            account = Account(**common, attempt=deliveries + tries + command.passed, holds=holds, way=way)
            try:
                try:
                    await self._attempt(engine.stream(continuing(REQUEST, holds) if way == "prefill" else REQUEST), account)
                except BadRequest:
                    if way != "prefill" or not account.untold:
                        raise
                    account = Account(**common, attempt=deliveries + tries + command.passed, holds=holds, way="skip")
                    await self._attempt(engine.stream(REQUEST), account)
            except EngineFault as error:
                if command.alternatives and (tries or not isinstance(error, EngineBroke)):
                    return self._pass_on(command, account, error, deliveries + tries)
                tries += 1
                if tries > 1 and not self._now().lasted:
                    self._wait(error, deliveries + tries)
            except BadRequest as error:
                dead = TurnFailed(turn=T, stage="caller", title=error.title, detail=str(error), body="")
                self._keep(*failing(T, self._said, error), dead)
                return None
            except Died:
                deliveries, tries = deliveries + 1, 0
            except Transient:  # a process that died, as it is played
                tries += 1
            else:
                self._keep(*account.ending(2.0), account.event(2.0))
                return None

    async def _attempt(self, pieces: AsyncGenerator[Piece, None], account: Account) -> None:
        relaying = asyncio.create_task(self._relay(pieces, account))
        stopping = asyncio.create_task(self._quiet.wait())
        await asyncio.wait((relaying, stopping), return_when=asyncio.FIRST_COMPLETED)
        stopping.cancel()
        if not relaying.done():
            relaying.cancel()
        elif (error := relaying.exception()) is not None:
            self._keep(*((account.usage,) if account.unseen and isinstance(error, EngineFault) else ()))
            raise error

    async def _relay(self, pieces: AsyncGenerator[Piece, None], account: Account) -> None:
        async for piece in pieces:
            self._keep(*account.take(piece, 1.5))

    def _wait(self, error: EngineFault, attempt: int) -> None:
        self._keep(Waiting(turn=T, stage="caller", title=error.title, reason=str(error), attempt=attempt))

    def _pass_on(self, command: CallExpert, account: Account, error: EngineFault, attempt: int) -> CallExpert:
        if command.passed >= len(command.alternatives):
            self._wait(error, attempt + command.passed)
        self._keep(account.event(2.0, f"{PASSED_ON}{error.title}"))
        following, *others = command.alternatives
        more = {"expert": following, "alternatives": (*others, command.expert), "passed": command.passed + 1}
        return command.model_copy(update={**more, "request": command.request.model_copy(update={"model": following})})


async def lived(tries: Sequence[Try], alternatives: Sequence[str], abilities: Abilities, *, counts: bool) -> Record:
    """The turn as it was."""
    engine = Scripted(tries, abilities, counts=counts)
    return await Caller(lambda _: engine, engine.quiet, lambda: engine.now, lambda _: None).turn(*alternatives)


async def played(record: Record, alternatives: Sequence[str], abilities: Abilities) -> Record:
    """The turn of *record* once more, from what is read out of it."""
    again = Played(recorded(record, FLEET))
    engines = {name: RecordedEngine(name, abilities, lambda: again, lambda: None, 0.0) for name in EXPERTS}
    takes = again.recording.takes
    return await Caller(engines.__getitem__, again.quiet, lambda: Try(lasted=takes[again._next - 1].lasted), again.hears).turn(
        *alternatives
    )


tries = st.builds(
    Try,
    said=st.integers(0, len(WORDS)),
    ends=st.sampled_from(["broke", "broke", "busy", "unreachable", "died"]),
    words=st.sampled_from([WORDS, WORDS, WORDS, OTHER_WORDS]),
    lasted=st.booleans(),
)
ends = st.builds(
    Try, said=st.integers(0, len(WORDS)), ends=st.sampled_from(["stop", "stopped", "refused"]), words=st.sampled_from([WORDS, OTHER_WORDS])
)


@given(
    begun=st.lists(tries, max_size=4), end=ends, alternatives=st.sampled_from([(), ("other",)]), prefill=st.booleans(), counts=st.booleans()
)
@example(  # all that the first attempt made was seen, and nothing of the second, before another expert says something else
    begun=[Try(2), Try(2)], end=Try(ends="stop", words=OTHER_WORDS), alternatives=("other",), prefill=False, counts=True
)
@settings(max_examples=500)
def test_what_went_wrong_goes_wrong_again(begun: list[Try], end: Try, alternatives: tuple[str, ...], prefill: bool, counts: bool):
    # An engine that breaks after a process died is asked again by the next process; played by one, the next expert is.
    assume(not alternatives or not any(each.ends == "died" for each in begun))

    async def scenario() -> tuple[Record, Record]:
        abilities = Abilities(prefill=prefill)
        async with asyncio.timeout(30):
            before = await lived([*begun, end], alternatives, abilities, counts=counts)
            return before, await played(before, alternatives, abilities)

    before, after = asyncio.run(scenario())
    told = "\n".join(f"{each.subject} {each.data.decode()}" for each in before.entries)
    assert changes(before, after) == (), "\n".join([told, *map(str, recorded(before, FLEET).takes)])
