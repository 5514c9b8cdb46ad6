"""The door in front of fake turns: identities, resuming, faults behind it, and what is not chat."""

import asyncio
import itertools
import re
import time
from collections.abc import AsyncGenerator, Sequence
from typing import Any

import pytest
from aiohttp import ClientPayloadError, ClientSession

from capibara_flow.domain.turns import turn_id
from capibara_flow.edge.app import build
from capibara_flow.edge.openapi import document
from capibara_flow.errors import BrokerUnavailable, QueueFull
from capibara_flow.ports import Batch, Identity
from capibara_flow.settings import AuthSettings, EdgeSettings, Key
from tests.edge.client import events, names
from tests.edge.serving import ANSWER, DONE, ROUTED, T, client, doorway
from tests.fakes import FakeFeed, FakeTurns
from tests.waiting import until
from topics.chat import RouteTurn
from topics.output import Done, Failed, Reset, Token

GUARD = {"X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer", "Cache-Control": "no-cache"}
ASK = {"message": "hello"}
ASK_OPENAI: dict[str, Any] = {"messages": [{"role": "user", "content": "hello"}]}
KEYS = AuthSettings(
    anonymous=False,
    keys=(Key(key="sk-ann-0001", principal="ann", tenant="acme"), Key(key="sk-bob-0001", principal="bob", tenant="umbrella")),
)
ANN, BOB = {"Authorization": "Bearer sk-ann-0001"}, {"Authorization": "bearer sk-bob-0001"}


def a_turn(age_seconds: float = 0, tenant: str = "anonymous") -> str:
    return turn_id(milliseconds=int((time.time() - age_seconds) * 1000), entropy=b"0123456789", tenant=tenant)


# --- who asks ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/api/chat", "/v1/chat/completions"])
@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Authorization": "Bearer sk-wrong"},
        {"Authorization": "Basic sk-ann-0001"},
        {"Authorization": "Bearer"},
        {"Authorization": "Bearer "},
        {"Authorization": "Bearer \udcff\udcfe"},
    ],
)
async def test_without_a_known_key_nothing_is_opened(path: str, headers: dict[str, str]) -> None:
    turns = FakeTurns(*ANSWER)
    async with client(turns, auth=KEYS) as session, session.post(path, json={**ASK_OPENAI}, headers=headers) as response:
        assert response.status == 401
        assert response.headers["WWW-Authenticate"] == "Bearer"
        body = await response.json(content_type=None)
        assert body.get("status") == 401 or body["error"]["type"] == "authentication_error"
        assert "key" in str(body)
    assert turns.opened == []


async def test_a_key_stands_for_its_principal_and_tenant() -> None:
    turns = FakeTurns(*ANSWER)
    async with client(turns, auth=KEYS) as session, session.post("/api/chat", json=ASK, headers=ANN) as response:
        first = events(await response.text())[0]
    assert first.data["principal"] == "ann"
    ((_, identity, _),) = turns.opened
    assert (identity.principal, identity.tenant) == ("ann", "acme")


async def test_a_known_tenant_waits_in_a_bucket_of_his_own_with_the_priority_that_he_asks_for() -> None:
    turns = FakeTurns(*ANSWER)
    async with client(turns, auth=KEYS) as session:
        for who in (ANN, BOB):
            async with session.post("/api/chat", json=ASK | {"priority": "low"}, headers=who) as response:
                assert response.status == 200
        chat = {"messages": [{"role": "user", "content": "hi"}], "priority": "high"}
        async with session.post("/v1/chat/completions", json=chat, headers=ANN) as response:
            assert response.status == 200
    ann, bob, again = (command for command, _, _ in turns.opened)
    assert (ann.priority, again.priority) == ("low", "high")
    assert ann.bucket == again.bucket
    assert {ann.bucket, bob.bucket} == {1, 2}


async def test_where_nobody_has_a_key_any_key_is_nobody_s() -> None:
    turns = FakeTurns(*ANSWER)
    async with client(turns) as session, session.post("/api/chat", json=ASK, headers={"Authorization": "Bearer sk-any"}) as response:
        assert response.status == 200
    assert turns.opened[0][1].principal == "anonymous:127.0.0.1"


async def test_where_keys_are_known_a_wrong_one_is_not_taken_for_nobody_s() -> None:
    both = AuthSettings(anonymous=True, keys=KEYS.keys)
    async with client(FakeTurns(*ANSWER), auth=both) as session:
        async with session.get("/v1/models", headers={"Authorization": "Bearer sk-wrong"}) as response:
            assert response.status == 401
        async with session.get("/v1/models") as response:
            assert response.status == 200


async def test_another_tenant_s_turn_does_not_exist() -> None:
    turns = FakeTurns(*ANSWER)
    async with client(turns, auth=KEYS) as session:
        async with session.post("/api/chat", json=ASK, headers=ANN) as response:
            turn = response.headers["X-Capibara-Turn"]
        for method, path in (("GET", f"/api/chat/{turn}/events"), ("DELETE", f"/api/chat/{turn}")):
            async with session.request(method, path, headers=BOB) as response:
                assert response.status == 404
                stranger = await response.json(content_type=None)
            async with session.request(method, f"/api/chat/{a_turn(10_000, 'umbrella')}", headers=BOB) as response:
                assert response.status in {410, 405}
            async with session.request(method, path) as response:
                assert response.status == 401
            async with session.request(method, path, headers=ANN) as response:
                assert response.status in {200, 202}
        assert turns.cancelled == [turn]
    assert stranger["detail"] == "there is no such turn"


# --- resuming ---------------------------------------------------------------------------------------------------------


async def resumed(session: ClientSession, turn: str, after: int | str | None = None, *, by_query: bool = False) -> list[str]:
    headers = {} if after is None or by_query else {"Last-Event-ID": str(after)}
    query = {"after": str(after)} if by_query else {}
    async with session.get(f"/api/chat/{turn}/events", headers=headers, params=query) as response:
        assert response.status == 200
        assert response.headers["X-Capibara-Turn"] == turn
        return [each.id or each.name for each in events(await response.text())]


@pytest.mark.parametrize("by_query", [False, True])
async def test_a_reader_goes_on_behind_the_event_that_it_has(by_query: bool) -> None:
    async with client(FakeTurns(*ANSWER)) as session:
        turn, whole = a_turn(), ["11", "12-1", "12", "13-1", "13"]
        assert await resumed(session, turn) == whole
        assert await resumed(session, turn, 0, by_query=by_query) == whole
        for place, each in enumerate(whole[:-1], 1):
            assert await resumed(session, turn, each, by_query=by_query) == whole[place:]


async def test_a_cut_inside_a_batch_of_several_lines_repeats_and_loses_nothing() -> None:
    words = tuple(Token(turn=T, text=f"{n} ") for n in range(12))
    async with client(FakeTurns((ROUTED,), words, words, (DONE,))) as session:
        path = f"/api/chat/{a_turn()}/events"
        async with session.get(path) as response:
            whole = events(await response.text())
        assert len({each.id for each in whole}) == len(whole) == 26
        assert [each.id for each in whole[9:14]] == ["12-9", "12-10", "12-11", "12", "13-1"]
        for place, each in enumerate(whole, 1):
            async with session.get(path, headers={"Last-Event-ID": each.id}) as response:
                assert events(await response.text()) == whole[place:]


@pytest.mark.parametrize(("after", "rest"), [("12-2", ["12", "13-1", "13"]), ("11-7", ["11", "12-1", "12", "13-1", "13"])])
async def test_whose_id_names_a_line_that_never_was_gets_the_last_one(after: str, rest: list[str]) -> None:
    async with client(FakeTurns(*ANSWER)) as session:
        assert await resumed(session, a_turn(), after) == rest


async def test_a_reader_that_has_everything_is_not_kept_waiting() -> None:
    async with client(FakeTurns(*ANSWER)) as session, asyncio.timeout(20):
        assert await resumed(session, a_turn(), 13) == []


async def test_an_id_behind_the_last_one_is_not_kept_waiting_either() -> None:
    async with client(FakeTurns(*ANSWER)) as session, asyncio.timeout(20):
        assert await resumed(session, a_turn(), 99_999_999) == []


async def test_an_old_turn_can_be_read_while_it_is_kept() -> None:
    turns = FakeTurns(*ANSWER)
    async with client(turns) as session:
        turn = a_turn(age_seconds=3000)
        async with session.get(f"/api/chat/{turn}/events") as response:
            assert response.status == 404
        turns.stored.add(turn)
        assert (await resumed(session, turn))[-1] == "13"


@pytest.mark.parametrize("turn", ["x", "A" * 31, "*", "a.b", "%3E", "A" * 32, a_turn(-10_000), a_turn(3000), a_turn(0, "acme")])
async def test_what_is_no_turn_of_ours_is_not_found(turn: str) -> None:
    turns = FakeTurns(*ANSWER)
    async with client(turns) as session:
        for method, path in (("GET", f"/api/chat/{turn}/events"), ("DELETE", f"/api/chat/{turn}")):
            async with session.request(method, path) as response:
                assert response.status == 404
                assert response.content_type == "application/problem+json"
    assert turns.cancelled == []


@pytest.mark.parametrize("given", ["x", "-1", "1.5", "٣", "9" * 19, "1 2", "12-", "12-0", "12-1-1", "0-1", "12-٣", "12-" + "9" * 10])
async def test_an_id_that_is_none_is_refused(given: str) -> None:
    async with client(FakeTurns(*ANSWER)) as session:
        async with session.get(f"/api/chat/{a_turn()}/events", params={"after": given}) as response:
            assert response.status == 400
            assert "Last-Event-ID" in (await response.json(content_type=None))["detail"]
        async with session.get(f"/api/chat/{a_turn()}/events", headers={"Last-Event-ID": given}) as response:
            assert response.status == 400


@pytest.mark.parametrize("told", ["?erase=false", ""])
async def test_a_turn_that_never_was_is_not_stopped(told: str) -> None:
    turns = FakeTurns(*ANSWER)
    async with client(turns) as session, session.delete(f"/api/chat/{a_turn()}{told}") as response:
        assert response.status == 404
        assert "nobody works on it" in (await response.json(content_type=None))["detail"]
    assert turns.cancelled == []


# --- faults behind the door -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/api/chat", "/v1/chat/completions"])
@pytest.mark.parametrize("refusal", [QueueFull("too many turns"), BrokerUnavailable("no broker")])
async def test_what_is_not_accepted_may_be_tried_again(path: str, refusal: Exception) -> None:
    async with client(FakeTurns(refusal=refusal)) as session, session.post(path, json=ASK_OPENAI) as response:
        assert response.status == 503
        assert response.headers["Retry-After"] == "2"
        body = await response.json(content_type=None)
    assert str(refusal) in str(body)


@pytest.mark.parametrize("path", ["/api/chat", "/v1/chat/completions"])
@pytest.mark.parametrize("retryable", [True, False])
async def test_a_whole_answer_that_failed_says_when_to_try_again(path: str, retryable: bool) -> None:
    failed = Failed(turn=T, title="engine busy", status=503, detail="too many", retryable=retryable)
    async with client(FakeTurns((failed,))) as session, session.post(path, json={**ASK_OPENAI, "stream": False}) as response:
        assert response.status == 503
        assert response.headers.get("Retry-After") == ("2" if retryable else None)
        assert response.headers["X-Capibara-Turn"]


@pytest.mark.parametrize("path", ["/api/chat", "/v1/chat/completions"])
@pytest.mark.parametrize("stream", [True, False])
async def test_an_unforeseen_fault_before_the_answer_is_a_500_without_details(path: str, stream: bool) -> None:
    turns = FakeTurns(refusal=ZeroDivisionError("our insides"))
    async with client(turns) as session, session.post(path, json={**ASK_OPENAI, "stream": stream}) as response:
        assert response.status == 500
        said = await response.text()
    assert "insides" not in said
    assert "internal" in said


async def test_a_fault_in_mid_stream_is_told_in_both_dialects() -> None:
    turns = FakeTurns(*ANSWER[:2], breaks=BrokerUnavailable("the broker left"))
    async with client(turns) as session:
        async with session.post("/api/chat", json=ASK) as response:
            stream = events(await response.text())
        async with session.post("/v1/chat/completions", json={**ASK_OPENAI, "stream": True}) as response:
            text = await response.text()
    assert names(stream) == ["turn", "routed", "token", "error"]
    assert (stream[-1].data["status"], stream[-1].data["detail"]) == (503, "the broker left")
    assert '"message":"the broker left"' in text
    assert "[DONE]" not in text


@pytest.mark.parametrize("path", ["/api/chat", "/v1/chat/completions"])
async def test_an_unforeseen_fault_in_mid_stream_breaks_it_off(path: str) -> None:
    turns = FakeTurns(*ANSWER[:2], breaks=ZeroDivisionError("our insides"))
    async with client(turns) as session:
        with pytest.raises((ClientPayloadError, ConnectionResetError)):
            async with session.post(path, json={**ASK_OPENAI, "stream": True}) as response:
                await response.text()


async def test_a_stream_that_ends_without_its_end_is_no_answer() -> None:
    async with client(EndingEarly()) as session:
        async with session.post("/api/chat", json=ASK) as response:
            assert "done" not in names(events(await response.text()))
        async with session.post("/v1/chat/completions", json=ASK_OPENAI) as response:
            assert response.status == 503


class EndingEarly(FakeTurns):
    """Turns with feeds that no port allows."""

    async def _batches(self, turn: str, after: int) -> AsyncGenerator[Sequence[Batch], None]:
        return
        yield


async def test_a_turn_that_does_not_end_expires() -> None:
    turns = FakeTurns(*ANSWER[:2])
    async with client(turns, EdgeSettings(turn_seconds=0.01, heartbeat_seconds=0.05)) as session:
        calls = [
            session.post("/api/chat", json=ASK),
            session.post("/v1/chat/completions", json={**ASK_OPENAI, "stream": True}),
            session.post("/api/chat", json={**ASK, "stream": False}),
            session.post("/v1/chat/completions", json=ASK_OPENAI),
        ]
        responses = await asyncio.gather(*calls)
        native, completion, whole, whole_completion = await asyncio.gather(*(each.text() for each in responses))
    assert events(native)[-1].name == "error"
    assert events(native)[-1].data["status"] == 504
    assert ": heartbeat\n\n" in native
    assert '"code":"turn_expired"' in completion
    assert "[DONE]" not in completion
    assert [each.status for each in responses[2:]] == [504, 504]
    assert "did not end within its time" in whole
    assert "did not end within its time" in whole_completion


@pytest.mark.parametrize("stream", [True, False])
async def test_a_failed_turn_is_told_with_its_own_status(stream: bool) -> None:
    failed = Failed(turn=T, title="engine busy", status=503, detail="too many", retryable=True)
    async with client(FakeTurns((ROUTED,), (failed,))) as session:
        async with session.post("/api/chat", json={**ASK, "stream": stream}) as response:
            text = await response.text()
            turn = response.headers["X-Capibara-Turn"]
            if stream:
                assert names(events(text)) == ["turn", "routed", "error"]
            else:
                assert response.status == 503
                body = await response.json(content_type=None)
                assert (body["title"], body["turn"], body["retryable"]) == ("engine busy", turn, True)
        async with session.post("/v1/chat/completions", json={**ASK_OPENAI, "stream": stream}) as response:
            text = await response.text()
            assert response.status == (200 if stream else 503)
            assert '"code":"engine_busy"' in text.replace('": "', '":"')
            assert "[DONE]" not in text


async def test_a_cancelled_turn_ends_natively_but_is_an_error_for_openai_s_clients() -> None:
    turns = FakeTurns((Token(turn=T, text="half"),), (Done(turn=T, finish_reason="cancelled", model_id="plain"),))
    async with client(turns) as session:
        async with session.post("/api/chat", json={**ASK, "stream": False}) as response:
            body = await response.json()
            assert (body["text"], body["finish_reason"]) == ("half", "cancelled")
        async with session.post("/v1/chat/completions", json=ASK_OPENAI) as response:
            assert response.status == 409
        async with session.post("/v1/chat/completions", json={**ASK_OPENAI, "stream": True}) as response:
            assert "[DONE]" not in await response.text()


async def test_a_reset_is_told_natively_and_ends_a_stream_of_openai_s_only_if_words_were_said() -> None:
    again = Reset(turn=T, reason="again")
    late = FakeTurns((Token(turn=T, text="wrong"),), (again, Token(turn=T, text="right")), (DONE,))
    early = FakeTurns((ROUTED,), (again, Token(turn=T, text="right")), (DONE,))
    async with client(late) as session:
        async with session.post("/api/chat", json={**ASK, "stream": False}) as response:
            assert (await response.json())["text"] == "right"
        async with session.post("/v1/chat/completions", json={**ASK_OPENAI, "stream": True}) as response:
            text = await response.text()
            assert '"code":"answer_reset"' in text
            assert "right" not in text
            assert "[DONE]" not in text
        async with session.post("/v1/chat/completions", json=ASK_OPENAI) as response:
            assert (await response.json())["choices"][0]["message"]["content"] == "right"
    async with client(early) as session, session.post("/v1/chat/completions", json={**ASK_OPENAI, "stream": True}) as response:
        assert (await response.text()).endswith("data: [DONE]\n\n")


class Talking(FakeTurns):
    """Turns that never stop talking; their feeds are kept, so that nothing but the door can end them."""

    def __init__(self) -> None:
        super().__init__()
        self.feeds: list[FakeFeed] = []

    async def open(self, command: RouteTurn, identity: Identity, deadline: float, **kinds: bool) -> FakeFeed:
        self.feeds.append(await super().open(command, identity, deadline, **kinds))
        return self.feeds[-1]

    async def _batches(self, turn: str, after: int) -> AsyncGenerator[Sequence[Batch], None]:
        try:
            for sequence in itertools.count(11):
                yield (Batch(sequence, (Token(turn=turn, text="word ").line(),), final=False),)
                await asyncio.sleep(0.01)
        finally:
            self.closed += 1


@pytest.mark.parametrize(("path", "body"), [("/api/chat", ASK), ("/v1/chat/completions", {**ASK_OPENAI, "stream": True})])
async def test_writing_to_a_reader_that_has_left_ends_the_feed_and_is_no_fault(
    caplog: pytest.LogCaptureFixture, path: str, body: dict[str, Any]
) -> None:
    turns = Talking()
    # Cancellation ends most handlers before they write to nobody, but not all.
    async with client(turns, cancels=False) as session:
        async with session.post(path, json=body) as response:
            await response.content.readuntil(b"word")
            response.close()
        await until(lambda: turns.closed == 1)
    assert caplog.records == []


async def test_a_reader_that_leaves_is_forgotten() -> None:
    turns = FakeTurns(*ANSWER[:2])
    async with client(turns) as session:
        async with session.post("/api/chat", json=ASK) as response:
            await response.content.readuntil(b"there")
        await until(lambda: turns.closed == 1)


async def test_the_deadline_travels_with_the_turn() -> None:
    turns = FakeTurns(*ANSWER)
    before = time.time()
    async with client(turns, EdgeSettings(turn_seconds=77)) as session, session.post("/api/chat", json=ASK) as response:
        await response.read()
    assert before + 77 <= turns.opened[0][2] <= time.time() + 77


# --- what is not chat -------------------------------------------------------------------------------------------------


async def test_health_ready_and_stats() -> None:
    turns = FakeTurns(*ANSWER)
    async with client(turns) as session:
        async with session.get("/health") as response:
            assert (response.status, (await response.json())["status"]) == (200, "ok")
        async with session.get("/ready") as response:
            assert (response.status, await response.json()) == (200, {"ready": True, "missing": {}})
        turns.missing = {"router": "no worker is taking work"}
        async with session.get("/ready") as response:
            assert (response.status, await response.json()) == (503, {"ready": False, "missing": turns.missing})
        async with session.get("/stats") as response:
            stats = await response.json()
    assert [each["name"] for each in stats["experts"]] == ["plain", "painter"]
    assert stats["connected"] is True
    assert [(each["worker"], each["facts"]) for each in stats["workers"]] == [("router", {"routes": {"math": 2}})]


async def test_metrics_count_answers_by_route_and_never_by_turn() -> None:
    turn = a_turn()
    async with client(FakeTurns(*ANSWER)) as session:
        for path in (f"/api/chat/{turn}/events", "/nowhere/at/all"):
            async with session.get(path) as response:
                await response.read()
        async with session.get("/metrics") as response:
            text = await response.text()
    assert 'capibara_http_responses_total{route="/api/chat/{turn}/events",status="200"}' in text
    assert 'capibara_http_responses_total{route="none",status="404"}' in text
    assert turn not in text
    assert "nowhere" not in text


async def test_a_page_of_a_known_origin_may_call_us() -> None:
    edge = EdgeSettings(origins=("https://ours.example",))
    async with client(FakeTurns(*ANSWER), edge) as session:
        preflight = {"Origin": "https://ours.example", "Access-Control-Request-Method": "DELETE"}
        async with session.options("/api/chat/x", headers=preflight) as response:
            assert response.status == 204
            assert response.headers["Access-Control-Allow-Origin"] == "https://ours.example"
            assert set(response.headers["Access-Control-Allow-Methods"].split(", ")) >= {"GET", "POST", "DELETE", "OPTIONS"}
            allowed = set(response.headers["Access-Control-Allow-Headers"].split(", "))
            assert allowed >= {"Content-Type", "Authorization", "Last-Event-ID", "Idempotency-Key"}
        for path, body in (("/api/chat", ASK), ("/api/chat", {}), ("/nowhere", {})):
            async with session.post(path, json=body, headers={"Origin": "https://ours.example"}) as response:
                assert response.headers["Access-Control-Allow-Origin"] == "https://ours.example"
                assert "X-Capibara-Turn" in response.headers["Access-Control-Expose-Headers"]
                assert response.headers["Vary"] == "Origin"


async def test_a_page_of_another_origin_gets_no_permission() -> None:
    async with client(FakeTurns(*ANSWER)) as session:
        headers = {"Origin": "https://theirs.example", "Access-Control-Request-Method": "POST"}
        for method in ("OPTIONS", "POST"):
            async with session.request(method, "/api/chat", json=ASK, headers=headers) as response:
                assert "Access-Control-Allow-Origin" not in response.headers
                assert response.headers["Vary"] == "Origin"


async def test_the_page_is_served_under_its_policy() -> None:
    async with client(FakeTurns(*ANSWER)) as session:
        async with session.get("/") as response:
            page = await response.text()
            assert response.content_type == "text/html"
        assert "<script>" not in page
        names = re.findall(r'(?:src|href)="/?(page/[^"]+)"', page)
        assert names
        for path in ("/", *(f"/{name}" for name in names)):
            async with session.get(path) as response:
                assert response.status == 200, path
                assert {name: response.headers[name] for name in GUARD} == GUARD, path
                known = {"If-None-Match": response.headers["ETag"]}
            async with session.get(path, headers=known) as response:
                assert (response.status, response.headers["Cache-Control"]) == (304, "no-cache"), path


async def test_the_policy_lets_nothing_in_from_other_hosts() -> None:
    async with client(FakeTurns(*ANSWER)) as session, session.get("/") as response:
        rules = dict(rule.split(maxsplit=1) for rule in response.headers["Content-Security-Policy"].split("; "))
    assert rules.pop("default-src") == "'self'"
    assert set(rules.values()) == {"'none'"}


async def test_answers_of_the_api_have_no_page_s_headers() -> None:
    async with client(FakeTurns(*ANSWER)) as session:
        for path in ("/health", "/v1/models", "/pages"):
            async with session.get(path) as response:
                assert "Content-Security-Policy" not in response.headers


def test_openapi_describes_exactly_the_paths_that_are_there() -> None:
    app = build(doorway(FakeTurns()))
    served = {
        (route.resource.canonical, route.method.lower())
        for route in app.router.routes()
        if route.resource and route.method != "HEAD" and route.resource.canonical not in {"/", "/page"}
    }
    described = {(path, method) for path, methods in document()["paths"].items() for method in methods}
    assert served == described


def test_openapi_refers_only_to_what_it_defines() -> None:
    described = document()
    assert described["openapi"] == "3.1.0"
    references = set(re.findall(r"'\$ref': '([^']+)'", str(described)))
    schemas = {f"#/components/schemas/{name}" for name in described["components"]["schemas"]}
    assert references <= schemas
    assert {"#/components/schemas/ChatBody", "#/components/schemas/CompletionBody"} <= references
    for path, methods in described["paths"].items():
        for operation in methods.values():
            named = {each["name"] for each in operation.get("parameters", ()) if each["in"] == "path"}
            assert named == set(re.findall(r"{(\w+)}", path))
            assert operation["summary"]
            assert all("description" in response for response in operation["responses"].values())


async def test_what_workers_tell_is_for_those_who_may_ask() -> None:
    async with client(FakeTurns(*ANSWER), auth=KEYS) as session, session.get("/stats") as response:
        assert "workers" not in await response.json()
