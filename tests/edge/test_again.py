"""Coming back at the door: resuming in OpenAI's dialect, what is gone, asking again under a key, background turns, erasing."""

import asyncio
import json
import time
from typing import Any

import pytest
from aiohttp import ClientSession
from prometheus_client import REGISTRY

from capibara_flow.domain.turns import turn_id
from capibara_flow.edge.asked import digest
from capibara_flow.errors import BrokerUnavailable, QueueFull, TurnGone
from capibara_flow.settings import AuthSettings, EdgeSettings, Key
from tests.edge.client import events, names
from tests.edge.serving import ANSWER, DONE, ROUTED, USAGE, T, client
from tests.fakes import FakeTurns
from topics.chat import ChatMessage, ChatRequest, Sampling
from topics.output import Continued, Failed, Output, Reset, Token, Waiting

NATIVE: tuple[str, dict[str, Any]] = ("/api/chat", {"message": "hello"})
OPENAI: tuple[str, dict[str, Any]] = ("/v1/chat/completions", {"messages": [{"role": "user", "content": "hello"}]})
DIALECTS = [pytest.param(*NATIVE, id="native"), pytest.param(*OPENAI, id="openai")]
LONG: tuple[tuple[Output, ...], ...] = (
    (ROUTED,),
    (Token(turn=T, text="one"), Token(turn=T, text=" two")),
    (Token(turn=T, text=" three"),),
    (USAGE, DONE),
)
KEY = {"Idempotency-Key": "k 1"}


def a_turn(age_seconds: float = 0, tenant: str = "anonymous") -> str:
    return turn_id(milliseconds=int((time.time() - age_seconds) * 1000), entropy=b"0123456789", tenant=tenant)


def frames(text: str) -> list[tuple[str, Any]]:
    """The frames of a stream of OpenAI's dialect: their ids, and their data."""
    found: list[tuple[str, Any]] = []
    for block in text.split("\n\n")[:-1]:
        fields = dict(line.split(": ", 1) for line in block.split("\n"))
        data = fields.pop("data")
        found.append((fields.pop("id", ""), data if data == "[DONE]" else json.loads(data)))
        assert not fields
    return found


async def completion(session: ClientSession, path: str = OPENAI[0], **query: str) -> list[tuple[str, Any]]:
    async with session.get(path, params=query) as response:
        assert (response.status, response.content_type) == (200, "text/event-stream")
        return frames(await response.text())


async def asked(session: ClientSession, **body: Any) -> tuple[str, list[tuple[str, Any]]]:
    """A new completion: the address of its events, and its frames."""
    async with session.post(OPENAI[0], json={**OPENAI[1], "stream": True, **body}) as response:
        found = frames(await response.text())
        return f"{OPENAI[0]}/chatcmpl-{response.headers['X-Capibara-Turn']}/events", found


# --- resuming in OpenAI's dialect -------------------------------------------------------------------------------------


async def test_the_last_chunk_of_a_batch_has_its_id() -> None:
    async with client(FakeTurns(*LONG)) as session:
        _, found = await asked(session)
    assert [each for each, _ in found] == ["", "12", "13", "", "14"]
    assert found[-1][1] == "[DONE]"


@pytest.mark.parametrize("usage", [False, True])
async def test_a_completion_goes_on_behind_every_id_with_the_same_chunks(usage: bool) -> None:
    async with client(FakeTurns(*LONG)) as session:
        path, whole = await asked(session, model="auto", stream_options={"include_usage": usage})
        query = {"include_usage": "true"} if usage else {}
        assert await completion(session, path, **query) == whole
        assert await completion(session, path.replace("chatcmpl-", ""), after="0", **query) == whole
        assert await completion(session, path, after="11", **query) == without_role(whole)
        assert await completion(session, path, after="12", **query) == whole[2:]
        assert await completion(session, path, after="13", **query) == whole[3:]
        async with session.get(path, params=query, headers={"Last-Event-ID": "13"}) as response:
            assert frames(await response.text()) == whole[3:]
    assert {chunk["model"] for _, chunk in whole[:-1]} == {"plain"}
    assert ("usage" in whole[-2][1]) == usage


def without_role(whole: list[tuple[str, Any]]) -> list[tuple[str, Any]]:
    """As told to somebody who has been told something before."""
    (first_id, first), *rest = json.loads(json.dumps(whole))
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": "one"}
    first["choices"][0]["delta"] = {"content": "one"}
    return [(first_id, first), *(tuple(each) for each in rest)]


@pytest.mark.parametrize("after", ["14", "99999999"])
async def test_who_has_all_of_a_completion_gets_its_end_again(after: str) -> None:
    async with client(FakeTurns(*LONG)) as session, asyncio.timeout(20):
        path, whole = await asked(session)
        assert await completion(session, path, after=after) == whole[-2:]


async def test_who_has_all_of_a_failed_completion_gets_its_error_again() -> None:
    failed = Failed(turn=T, title="engine busy", status=503, detail="too many")
    async with client(FakeTurns(*LONG[:2], (failed,))) as session:
        path, whole = await asked(session)
        assert await completion(session, path, after="13") == whole[-1:]
    assert whole[-1][1]["error"]["code"] == "engine_busy"


async def test_words_taken_back_end_a_completion_that_was_resumed_behind_them() -> None:
    again = Reset(turn=T, reason="again")
    turns = FakeTurns(*LONG[:2], (again,), *LONG[2:])
    async with client(turns) as session:
        path = f"{OPENAI[0]}/{a_turn()}/events"
        for after in ("12", "11"):
            *_, (number, frame) = await completion(session, path, after=after)
            assert (number, frame["error"]["code"]) == ("", "answer_reset")
            assert "under another Idempotency-Key" in frame["error"]["message"]
        assert (await completion(session, path, after="13"))[-1][1] == "[DONE]"
    assert turns.cancelled == []  # others may read on


async def test_what_openai_s_dialect_has_no_words_for_is_left_out() -> None:
    told = (Waiting(turn=T, stage="caller", reason="busy", attempt=1), Continued(turn=T, how="skip", expert="plain", attempt=2))
    async with client(FakeTurns(*LONG[:2], told, *LONG[2:])) as session:
        _, found = await asked(session)
        assert [each for each, _ in found] == ["", "12", "14", "", "15"]
        async with session.post("/api/chat", json=NATIVE[1]) as response:
            assert names(events(await response.text())) == ["turn", "routed", "token", "waiting", "continued", "token", "usage", "done"]


@pytest.mark.parametrize("turn", ["x", "chatcmpl-x", "chatcmpl-" + "A" * 32, a_turn(0, "acme"), a_turn(3000)])
async def test_no_completion_of_ours_is_an_error_of_openai_s(turn: str) -> None:
    async with client(FakeTurns(*LONG)) as session, session.get(f"{OPENAI[0]}/{turn}/events") as response:
        assert response.status == 404
        assert (await response.json())["error"]["type"] == "not_found_error"


@pytest.mark.parametrize("query", [{"after": "x"}, {"after": "12-1"}, {"include_usage": "maybe"}])
async def test_a_query_that_is_none_is_refused(query: dict[str, str]) -> None:
    async with client(FakeTurns(*LONG)) as session, session.get(f"{OPENAI[0]}/{a_turn()}/events", params=query) as response:
        assert response.status == 400
        assert (await response.json())["error"]["type"] == "invalid_request_error"


# --- what is gone -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/api/chat/{}/events", "/v1/chat/completions/{}/events"])
async def test_a_turn_older_than_all_that_is_kept_is_gone(path: str) -> None:
    async with client(FakeTurns(*LONG)) as session, session.get(path.format(a_turn(10_000))) as response:
        assert response.status == 410
        assert "kept for 3600 s" in await response.text()


@pytest.mark.parametrize("path", ["/api/chat/{}/events", "/v1/chat/completions/{}/events"])
async def test_a_part_that_is_no_longer_kept_is_gone(path: str) -> None:
    turns = FakeTurns(*LONG)
    turns.gone = TurnGone("what follows this event is no longer kept")
    async with client(turns) as session, session.get(path.format(a_turn()), params={"after": "12"}) as response:
        assert response.status == 410
        body = await response.json(content_type=None)
    assert (body.get("title") or body["error"]["code"]) in {"turn gone", "turn_gone"}


# --- one request, one run ---------------------------------------------------------------------------------------------


def resumes() -> float:
    return REGISTRY.get_sample_value("capibara_resumes_total") or 0.0


def counted() -> float:
    return sum(
        sample.value
        for metric in REGISTRY.collect()
        if metric.name == "capibara_turns"
        for sample in metric.samples
        if sample.name.endswith("_total")
    )


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize(("path", "body"), DIALECTS)
async def test_the_same_request_under_the_same_key_is_one_turn(path: str, body: dict[str, Any], stream: bool) -> None:
    turns, before = FakeTurns(*LONG), (counted(), resumes())
    said: list[str] = []
    async with client(turns) as session:
        for replayed in (None, "true", "true"):
            async with session.post(path, json={**body, "stream": stream}, headers=KEY) as response:
                assert response.status == 200
                assert response.headers.get("Idempotency-Replayed") == replayed
                assert response.headers["X-Capibara-Turn"] == turns.opened[0][0].turn
                said.append(await response.text())
    assert said[0] == said[1] == said[2]
    assert len(turns.opened) == 1
    assert (counted(), resumes()) == (before[0] + 1, before[1] + 2)


async def test_a_key_is_good_in_either_dialect_streamed_or_not() -> None:
    turns = FakeTurns(*LONG)
    async with client(turns) as session:
        for path, body in (NATIVE, OPENAI):
            for stream in (True, False):
                async with session.post(path, json={**body, "stream": stream}, headers=KEY) as response:
                    assert response.status == 200
                    await response.read()
        async with session.post(NATIVE[0], json={**NATIVE[1], "background": True, "timeout_seconds": 9}, headers=KEY) as response:
            assert response.headers["Idempotency-Replayed"] == "true"
    assert len(turns.opened) == 1


@pytest.mark.parametrize(("path", "body"), DIALECTS)
async def test_another_request_under_the_same_key_is_refused(path: str, body: dict[str, Any]) -> None:
    turns = FakeTurns(*LONG)
    async with client(turns) as session:
        async with session.post(path, json=body, headers=KEY) as response:
            await response.read()
        async with session.post(path, json={**body, "model": "plain"}, headers=KEY) as response:
            assert response.status == 422
            assert "Idempotency-Key" in await response.text()
        async with session.post(path, json={**body, "model": "plain"}, headers={"Idempotency-Key": "k 2"}) as response:
            assert response.status == 200
    assert len(turns.opened) == 2


async def test_keys_belong_to_their_tenant() -> None:
    turns = FakeTurns(*LONG)
    keys = AuthSettings(keys=tuple(Key(key=f"sk-{name}-0001", principal=name, tenant=name) for name in ("ann", "bob")))
    async with client(turns, auth=keys) as session:
        for name in ("ann", "bob", "ann"):
            async with session.post(NATIVE[0], json=NATIVE[1], headers={**KEY, "Authorization": f"Bearer sk-{name}-0001"}) as response:
                await response.read()
    assert [identity.tenant for _, identity, _ in turns.opened] == ["ann", "bob"]
    assert not any("k 1" in key for key in turns.keys)


@pytest.mark.parametrize("key", ["", "x" * 256, "clé", "a\tb"])
@pytest.mark.parametrize(("path", "body"), DIALECTS)
async def test_a_key_that_is_none_is_refused(path: str, body: dict[str, Any], key: str) -> None:
    turns = FakeTurns(*LONG)
    async with client(turns) as session, session.post(path, json=body, headers={"Idempotency-Key": key}) as response:
        assert response.status == 400
        assert "Idempotency-Key" in await response.text()
    assert turns.opened == []


@pytest.mark.parametrize("key", ["x", "x" * 255, " a b ~!"])
async def test_every_printable_key_is_taken(key: str) -> None:
    async with client(FakeTurns(*LONG)) as session, session.post(NATIVE[0], json=NATIVE[1], headers={"Idempotency-Key": key}) as response:
        assert response.status == 200


@pytest.mark.parametrize(("path", "body"), DIALECTS)
async def test_a_request_that_was_refused_runs_when_it_comes_again(path: str, body: dict[str, Any]) -> None:
    turns = FakeTurns(*LONG, refusal=QueueFull("too many turns"))
    async with client(turns) as session:
        async with session.post(path, json=body, headers=KEY) as response:
            assert (response.status, response.headers["Retry-After"]) == (503, "2")
        turns.refusal = None
        async with session.post(path, json={**body, "stream": True}, headers=KEY) as response:
            assert (response.status, response.headers["Idempotency-Replayed"]) == (200, "true")
            await response.read()
    ((command, _, deadline),) = turns.opened
    assert turns.attended == {command.turn}
    assert deadline == next(iter(turns.keys.values()))[2]


def test_a_digest_tells_requests_apart_but_not_the_order_of_their_fields() -> None:
    message = ChatMessage(role="user", content="hello")
    first = {"type": "function", "function": {"name": "a", "parameters": {}}}
    second = {"function": {"parameters": {}, "name": "a"}, "type": "function"}
    requests = [
        ChatRequest(messages=(message,)),
        ChatRequest(messages=(message, message)),
        ChatRequest(messages=(message,), model="a"),
        ChatRequest(messages=(message,), sampling=Sampling(seed=1)),
        ChatRequest(messages=(message,), tools=(first,)),
    ]
    assert len({digest(each) for each in requests}) == len(requests)
    assert digest(requests[-1]) == digest(ChatRequest(messages=(message,), tools=(second,)))


async def test_a_page_of_a_known_origin_sees_that_an_answer_is_replayed() -> None:
    edge = EdgeSettings(origins=("https://ours.example",))
    ours = {"Origin": "https://ours.example"}
    async with client(FakeTurns(*LONG), edge) as session, session.post(NATIVE[0], json=NATIVE[1], headers=ours) as response:
        assert "Idempotency-Replayed" in response.headers["Access-Control-Expose-Headers"].split(", ")


# --- how a turn is done -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "body", "attended"),
    [
        ("/api/chat", {"stream": True}, True),
        ("/api/chat", {}, True),
        ("/api/chat", {"stream": False}, False),
        ("/api/chat", {"background": True}, False),
        ("/v1/chat/completions", {"stream": True}, True),
        ("/v1/chat/completions", {}, False),
    ],
)
async def test_only_a_streamed_turn_in_the_foreground_is_attended(path: str, body: dict[str, Any], attended: bool) -> None:
    turns = FakeTurns(*ANSWER)
    async with client(turns) as session, session.post(path, json={**OPENAI[1], **body}) as response:
        await response.read()
    assert [command.turn in turns.attended for command, _, _ in turns.opened] == [attended]


@pytest.mark.parametrize(
    ("path", "body", "key", "recalled"),
    [
        ("/api/chat", {"background": True}, None, True),
        ("/api/chat", {"stream": False}, "k", True),
        ("/v1/chat/completions", {}, "k", True),
        ("/api/chat", {"stream": True}, "k", False),
        ("/api/chat", {"stream": False}, None, False),
    ],
)
async def test_somebody_may_come_back_to_what_runs_unread(path: str, body: dict[str, Any], key: str | None, recalled: bool) -> None:
    turns, headers = FakeTurns(*ANSWER), {"Idempotency-Key": key} if key else {}
    async with client(turns) as session, session.post(path, json={**OPENAI[1], **body}, headers=headers) as response:
        await response.read()
    assert [command.turn in turns.recalled for command, _, _ in turns.opened] == [recalled]


async def test_a_turn_may_have_less_time_than_others() -> None:
    turns, before = FakeTurns(*ANSWER), time.time()
    async with client(turns) as session, session.post("/api/chat", json={**NATIVE[1], "timeout_seconds": 2.5}) as response:
        await response.read()
    assert before + 2.5 <= turns.opened[0][2] <= time.time() + 2.5


@pytest.mark.parametrize("seconds", [0, -1, 601, "3", 1e400])
async def test_a_time_that_no_turn_can_have_is_refused(seconds: object) -> None:
    turns = FakeTurns(*ANSWER)
    async with client(turns) as session, session.post("/api/chat", json={**NATIVE[1], "timeout_seconds": seconds}) as response:
        assert response.status == 400
        assert "timeout_seconds" in await response.text()
    assert turns.opened == []


@pytest.mark.parametrize("stream", [True, False])
async def test_a_turn_with_less_time_is_waited_for_no_longer(monkeypatch: pytest.MonkeyPatch, stream: bool) -> None:
    monkeypatch.setattr("capibara_flow.edge.door.GRACE_SECONDS", 0.05)
    body = {**NATIVE[1], "timeout_seconds": 0.05, "stream": stream}
    async with client(FakeTurns(*ANSWER[:2])) as session, asyncio.timeout(20), session.post("/api/chat", json=body) as response:
        text = await response.text()
    assert "did not end within its time" in text


# --- erasing ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def turns() -> FakeTurns:
    found = FakeTurns(*ANSWER)
    found.erased = 7
    return found


@pytest.mark.parametrize("age", [0, 3000, 10_000])
async def test_a_turn_of_any_age_is_erased(turns: FakeTurns, age: float) -> None:
    turn = a_turn(age)
    async with client(turns) as session, session.delete(f"/api/chat/{turn}", params={"erase": "true"}) as response:
        assert (response.status, await response.json()) == (200, {"turn": turn, "erased": 7})
    assert turns.cancelled == []


async def test_nobody_erases_the_turn_of_another(turns: FakeTurns) -> None:
    turns.erased = AssertionError("another one's")
    async with client(turns) as session, session.delete(f"/api/chat/{a_turn(0, 'acme')}", params={"erase": "true"}) as response:
        assert response.status == 404


async def test_a_turn_that_nobody_can_erase_now_is_told(turns: FakeTurns) -> None:
    turns.erased = BrokerUnavailable("nobody is there who can erase a turn")
    async with client(turns) as session, session.delete(f"/api/chat/{a_turn()}", params={"erase": "true"}) as response:
        assert (response.status, response.headers["Retry-After"]) == (503, "2")
        assert "nobody is there" in (await response.json(content_type=None))["detail"]


@pytest.mark.parametrize(("erase", "status"), [("false", 202), ("0", 202), ("yes", 400), ("", 400)])
async def test_a_turn_is_not_erased_by_mistake(turns: FakeTurns, erase: str, status: int) -> None:
    turns.erased = AssertionError("nobody asked for that")
    turn = a_turn()
    turns.stored.add(turn)
    async with client(turns) as session, session.delete(f"/api/chat/{turn}", params={"erase": erase}) as response:
        assert response.status == status
    assert turns.cancelled == ([turn] if status == 202 else [])
