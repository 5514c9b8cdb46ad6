"""Dead letters: found, read, and asked again; on a real broker, written by a real stage or as one writes them."""

import time
from collections.abc import Awaitable, Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st
from nats.js.errors import NotFoundError

from capibara_flow.domain.turns import belongs, is_turn_id
from capibara_flow.errors import BadRequest, BrokerUnavailable, QueueFull, TurnUnknown
from capibara_flow.runtime.dead import DeadLetters, Letter, command, new_turn
from capibara_flow.runtime.hops import Stage
from capibara_flow.runtime.provision import stream_config
from tests.runtime.rig import QUESTION, Rig
from tests.waiting import until
from topics.chat import CallExpert, ChatMessage, ChatRequest, RouteTurn, TurnFailed
from topics.message import DEADLINE, PRINCIPAL, TENANT
from topics.streams import Layout

WHO = {TENANT: "acme", PRINCIPAL: "ana", DEADLINE: "1.000"}
ROUTE = RouteTurn(turn="T1", request=QUESTION)
CALL = CallExpert(turn="T1", expert="phi", bucket=3, request=QUESTION, alternatives=("small", "phi"), passed=2)


def failed(turn: str, stage: str = "router", body: str | None = None, detail: str = "no such thing") -> TurnFailed:
    return TurnFailed(turn=turn, stage=stage, title="bad request", detail=detail, body=ROUTE.model_dump_json() if body is None else body)


async def put(rig: Rig, *letters: TurnFailed, headers: dict[str, str] | None = WHO) -> None:
    """Store *letters* as a caller does."""
    jetstream = (await rig.client("caller")).jetstream()
    for each in letters:
        await jetstream.publish(each.subject, each.model_dump_json().encode(), headers=headers)


async def letters(rig: Rig, role: str = "observer") -> DeadLetters:
    return DeadLetters(await rig.client(role))


def raising(error: Exception) -> Callable[[Stage], Callable[[RouteTurn], Awaitable[None]]]:
    def build(stage: Stage) -> Callable[[RouteTurn], Awaitable[None]]:
        async def handle(command: RouteTurn) -> None:
            raise error

        return handle

    return build


# --- reading -----------------------------------------------------------------------------------------------------


async def test_what_a_stage_gave_up_is_read_with_whose_it_was(rig: Rig):
    async def there() -> bool:
        return await rig.waiting("CF_DEAD") == 1

    before = time.time()
    async with rig.routing(raising(BadRequest("no such thing"))):
        await rig.ask("T1", headers={TENANT: "acme", PRINCIPAL: "ana"})
        await until(there)
    [letter] = await (await letters(rig)).of("T1")
    assert (letter.tenant, letter.principal) == ("acme", "ana")
    assert (letter.failed.stage, letter.failed.title, letter.failed.detail) == ("router", "bad request", "no such thing")
    assert before - 1 < letter.when.timestamp() < time.time() + 1
    assert command(letter, "T9") == ROUTE.model_copy(update={"turn": "T9"})


async def test_the_newest_come_first_over_holes_and_many_reads(rig: Rig):
    await put(rig, *(failed(f"T{number}") for number in range(600)))
    for sequence in [*range(1, 40), *range(300, 500), 600]:
        await rig.admin.delete_msg("CF_DEAD", sequence)
    dead = await letters(rig)
    left = [f"T{number - 1}" for number in range(600, 0, -1) if not (number < 40 or 300 <= number < 500 or number == 600)]
    for limit in (1, 2, 130, 1000):
        found, total = await dead.newest(limit)
        assert ([each.failed.turn for each in found], total) == (left[:limit], len(left))


async def test_nothing_dead_is_nothing(rig: Rig):
    dead = await letters(rig)
    assert await dead.newest(10) == ([], 0)
    await put(rig, failed("T1"))
    await rig.admin.purge_stream("CF_DEAD")
    assert await dead.newest(10) == ([], 0)


async def test_the_letters_of_one_turn_and_of_one_stage(rig: Rig):
    await put(rig, failed("T1"), failed("T2"), failed("T1", "caller"))
    dead = await letters(rig)
    assert [each.failed.stage for each in await dead.of("T1")] == ["router", "caller"]
    assert [each.failed.stage for each in await dead.of("T1", "caller")] == ["caller"]


@pytest.mark.parametrize(
    ("turn", "stage"), [("T9", None), ("T1", "voter"), ("*", None), (">", None), ("", None), ("T1", "*"), ("T1.router", None)]
)
async def test_an_unknown_turn_is_told_and_a_wildcard_finds_nobodys(rig: Rig, turn: str, stage: str | None):
    await put(rig, failed("T1"))
    with pytest.raises(TurnUnknown):
        await (await letters(rig)).of(turn, stage)


async def test_a_letter_of_another_version_is_shown_as_what_it_is(rig: Rig):
    await (await rig.client("caller")).jetstream().publish("cf.dead.T1.caller", b'{"future": "\xff"}')
    dead = await letters(rig)
    [letter] = (await dead.newest(5))[0]
    assert (letter.failed.title, letter.failed.stage, letter.tenant) == ("unreadable letter", "caller", "")
    assert "future" in letter.failed.body


async def test_a_missing_stream_is_told(rig: Rig):
    await rig.admin.delete_stream("CF_DEAD")
    dead = await letters(rig)
    with pytest.raises(BrokerUnavailable):
        await dead.newest(5)
    with pytest.raises(BrokerUnavailable):
        await dead.of("T1")


# --- asking again ------------------------------------------------------------------------------------------------

words = st.text(st.characters(codec="utf-8"), max_size=20)


@given(content=words, model=st.none() | words, passed=st.integers(0, 9), others=st.lists(words, max_size=3))
def test_what_is_asked_again_is_what_was_asked_but_for_the_turn(content: str, model: str | None, passed: int, others: list[str]):
    request = ChatRequest(messages=(ChatMessage(role="user", content=content),), model=model)
    route = RouteTurn(turn="T1", request=request)
    call = CallExpert(turn="T1", expert="phi", bucket=3, request=request, alternatives=tuple(others), passed=passed)
    for asked, stage in ((route, "router"), (call, "caller")):
        again = command(letter_of(stage, asked.model_dump_json(exclude_none=True)), "T2")
        assert again.turn == "T2"
        waits = {"bucket": asked.bucket, "priority": asked.priority}
        assert again == RouteTurn(turn="T2", request=request, **waits)
        assert again.dedupe != asked.dedupe


def letter_of(stage: str, body: str) -> Letter:
    return Letter(1, None, "acme", "ana", failed("T1", stage, body))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("stage", "body"),
    [
        ("router", ROUTE.model_dump_json()[:-9]),
        ("router", "\ufffd\ufffd"),
        ("router", ""),
        ("caller", ROUTE.model_dump_json()),
        ("undertaker", '{"turn": "T1"}'),
        ("barber", ROUTE.model_dump_json()),
    ],
)
async def test_what_is_no_whole_command_is_not_asked_and_its_letter_is_kept(rig: Rig, stage: str, body: str):
    await put(rig, failed("T1", stage, body))
    dead = await letters(rig, "provisioner")
    [letter] = await dead.of("T1")
    with pytest.raises(BadRequest, match="the letter of T1 at"):
        await dead.retry(letter, turn=new_turn("acme"), deadline=time.time() + 60)
    assert (await rig.waiting(), await rig.waiting("CF_WORK_CALL"), await rig.waiting("CF_DEAD")) == (0, 0, 1)


async def test_who_has_no_tenant_could_not_read_the_answer(rig: Rig):
    await put(rig, failed("T1"), headers=None)
    dead = await letters(rig, "provisioner")
    [letter] = await dead.of("T1")
    with pytest.raises(BadRequest, match="whose turn"):
        await dead.retry(letter, turn="T2", deadline=time.time() + 60)
    assert (await rig.waiting(), await rig.waiting("CF_DEAD")) == (0, 1)


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize(("stage", "asked"), [("router", ROUTE), ("caller", CALL)])
async def test_a_retry_is_a_new_turn_of_the_same_tenant(rig: Rig, keep: bool, stage: str, asked: RouteTurn | CallExpert):
    await put(rig, failed("T1", stage, asked.model_dump_json()))
    dead = await letters(rig, "provisioner")
    [letter] = await dead.of("T1")
    turn, deadline = new_turn(letter.tenant), time.time() + 60
    again = await dead.retry(letter, turn=turn, deadline=deadline, keep=keep)
    assert (is_turn_id(turn), belongs(turn, "acme"), again.turn, again.kept) == (True, True, turn, keep)
    message = await rig.admin.get_msg("CF_WORK_ROUTER", 1)
    assert RouteTurn.read(message.data) == command(letter, turn)
    assert message.subject == command(letter, turn).subject
    assert {name: message.headers[name] for name in WHO} == {TENANT: "acme", PRINCIPAL: "ana", DEADLINE: f"{deadline:.3f}"}
    assert await rig.waiting("CF_DEAD") == keep


async def test_a_full_queue_is_told_and_the_letter_is_kept(rig: Rig):
    config = stream_config(Layout().named("CF_WORK_ROUTER"))
    config.max_msgs = 1
    await rig.admin.update_stream(config)
    await rig.ask("T0")
    await put(rig, failed("T1"))
    dead = await letters(rig, "provisioner")
    [letter] = await dead.of("T1")
    with pytest.raises(QueueFull):
        await dead.retry(letter, turn=new_turn("acme"), deadline=time.time() + 60)
    assert (await rig.waiting(), await rig.waiting("CF_DEAD")) == (1, 1)


async def test_a_letter_that_somebody_else_removed_meanwhile_is_no_fault(rig: Rig):
    await put(rig, failed("T1"))
    dead = await letters(rig, "provisioner")
    [letter] = await dead.of("T1")
    await rig.admin.delete_msg("CF_DEAD", letter.sequence)
    assert not (await dead.retry(letter, turn=new_turn("acme"), deadline=time.time() + 60)).kept
    with pytest.raises(NotFoundError):
        await rig.admin.get_msg("CF_DEAD", letter.sequence)
