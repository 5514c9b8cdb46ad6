"""A door in front of a whole installation: broker, router, caller, scripted engine."""

import asyncio
import json
import re
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from aiohttp import ClientResponse, ClientSession

from capibara_flow import wiring
from capibara_flow.domain.turns import is_turn_id
from capibara_flow.runtime.embedded import EmbeddedBroker
from capibara_flow.settings import AuthSettings, EdgeSettings, Key
from tests.conftest import Installation, settings_for
from tests.edge.client import Event, arriving, ask, counts, event, events, names, place, text_of
from tests.waiting import until

HUNDRED = "".join(f"{number} " for number in range(1, 31))
FRANCE = "The capital of France is Paris."


@pytest.fixture
async def session() -> AsyncIterator[ClientSession]:
    async with ClientSession() as session:
        yield session


async def first(response: ClientResponse, count: int) -> list[Event]:
    """The first *count* tokens of an open stream and what came before, not one event more."""
    found: list[Event] = []
    while sum(each.name == "token" for each in found) < count:
        block = (await response.content.readuntil(b"\n\n")).decode().rstrip("\n")
        if one := event(block):
            found.append(one)
    return found


async def test_events_come_in_order_with_ids_that_rise(door: str, session: ClientSession) -> None:
    async with session.post(f"{door}/api/chat", json={"message": "capital of France?"}) as response:
        assert response.status == 200
        assert response.content_type == "text/event-stream"
        turn = response.headers["X-Capibara-Turn"]
        stream = events(await response.text())
    assert is_turn_id(turn)
    assert names(stream) == ["turn", "routed", "token", "usage", "done"]
    assert all(each.data["turn"] == turn for each in stream)
    assert text_of(stream) == FRANCE
    ids = [place(each.id) for each in stream[1:]]
    assert ids == sorted(set(ids))
    assert stream[-1].id
    routed, usage, done = stream[1].data, stream[-2].data, stream[-1].data
    assert (routed["model_id"], routed["route_name"], routed["plan"]) == ("scripted", "default", ["caller"])
    assert (usage["prompt_tokens"], usage["completion_tokens"], usage["attempts"], usage["burnt_tokens"]) == (3, 7, 1, 7)
    assert (done["finish_reason"], done["model_id"]) == ("stop", "scripted")
    assert 0 <= done["timings"]["first_token_seconds"] <= done["timings"]["total_seconds"]


async def test_words_of_any_kind_pass_unchanged(door: str) -> None:
    assert text_of(await ask(door, message="accents")) == "¿Qué tal, capibara? \U0001f9ab\n\ndata: no\0"


async def test_a_whole_answer_is_one_object(door: str, session: ClientSession) -> None:
    async with session.post(f"{door}/api/chat", json={"message": "capital of France?", "stream": False}) as response:
        answer = await response.json()
        assert response.headers["X-Capibara-Turn"] == answer["turn"]
    assert (answer["text"], answer["finish_reason"], answer["model_id"]) == (FRANCE, "stop", "scripted")
    assert answer["usage"] == {"prompt_tokens": 3, "completion_tokens": 7, "burnt_tokens": 7, "attempts": 1}
    assert answer["routed"]["route_name"] == "default"


async def test_a_tool_call_is_streamed_and_its_result_answered(door: str, session: ClientSession) -> None:
    tools = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]
    asked = {"role": "user", "content": "weather?"}
    async with session.post(f"{door}/api/chat", json={"messages": [asked], "tools": tools, "stream": False}) as response:
        answer = await response.json()
    assert (answer["reasoning"], answer["finish_reason"]) == ("I need a tool.", "tool_calls")
    (call,) = answer["tool_calls"]
    assert call["function"] == {"name": "weather", "arguments": '{"city": "Bogotá"}'}
    said = {"role": "assistant", "content": None, "tool_calls": [call]}
    result = {"role": "tool", "tool_call_id": call["id"], "content": "rain"}
    stream = await ask(door, messages=[asked, said, result], tools=tools)
    assert text_of(stream) == "It rains."
    assert names(await ask(door, messages=[asked], tools=tools)) == ["turn", "routed", "token", "tool", "usage", "done"]


async def test_rules_names_and_images_choose_the_expert(door: str) -> None:
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}}
    seen = {"messages": [{"role": "user", "content": [{"type": "text", "text": "what?"}, image]}]}
    for body, model, route in (
        ({"message": "paint me"}, "paint", "painting"),
        ({"message": "hello", "model": "paint"}, "paint", "named"),
        ({"message": "paint me", "model": "script"}, "scripted", "named"),
        (seen, "paint", "default"),
    ):
        routed = (await ask(door, **body))[1].data
        assert (routed["model_id"], routed["route_name"]) == (model, route)


@pytest.mark.parametrize("by_query", [False, True])
async def test_another_door_goes_on_in_mid_answer(installation: Installation, session: ClientSession, by_query: bool) -> None:
    here, there = await installation.start_edge(), await installation.start_edge()
    async with session.post(f"{here}/api/chat", json={"message": "hundred"}) as response:
        turn = response.headers["X-Capibara-Turn"]
        begun = await first(response, 5)
        response.close()
    # A token without an id of its own comes again: its batch was not complete.
    last = max(n for n, each in enumerate(begun) if each.id)
    after = begun[last].id
    headers, query = ({}, {"after": after}) if by_query else ({"Last-Event-ID": after}, {})
    async with session.get(f"{there}/api/chat/{turn}/events", headers=headers, params=query) as response:
        assert response.status == 200
        rest = events(await response.text())
    assert text_of(begun[: last + 1] + rest) == HUNDRED
    assert names(rest) == ["token", "usage", "done"]


async def test_several_readers_of_one_turn_each_get_everything(installation: Installation, session: ClientSession) -> None:
    doors = [await installation.start_edge(), await installation.start_edge()]
    async with session.post(f"{doors[0]}/api/chat", json={"message": "hundred"}) as response:
        turn = response.headers["X-Capibara-Turn"]
        await first(response, 2)

        async def read(door: str) -> list[Event]:
            async with ClientSession() as own, own.get(f"{door}/api/chat/{turn}/events") as answer:
                return events(await answer.text())

        streams = await asyncio.gather(*map(read, doors * 5))
        await response.read()
    assert {text_of(stream) for stream in streams} == {HUNDRED}
    assert all(names(stream) == ["routed", "token", "usage", "done"] for stream in streams)


async def test_the_same_request_at_two_doors_at_once_is_one_run(installation: Installation, engine: str) -> None:
    doors = [await installation.start_edge(), await installation.start_edge()]
    before = (await counts(engine))["requests"]
    body = {"message": "hundred"}

    async def once(door: str) -> tuple[str, str, str | None]:
        headers = {"Idempotency-Key": "once"}
        async with ClientSession() as own, own.post(f"{door}/api/chat", json=body, headers=headers) as response:
            stream = events(await response.text())
            return stream[0].data["turn"], text_of(stream), response.headers.get("Idempotency-Replayed")

    found = await asyncio.gather(*map(once, doors * 3))
    assert {(turn, text) for turn, text, _ in found} == {(found[0][0], HUNDRED)}
    assert sorted(replayed or "" for _, _, replayed in found) == ["", *["true"] * 5]
    assert (await counts(engine))["requests"] == before + 1


@pytest.mark.parametrize("place", [1, 3, 5])
async def test_another_door_goes_on_in_openai_s_dialect(installation: Installation, session: ClientSession, place: int) -> None:
    here, there = await installation.start_edge(), await installation.start_edge()
    body = {"messages": [{"role": "user", "content": "hundred"}], "stream": True}
    begun: list[str] = []
    async with session.post(f"{here}/v1/chat/completions", json=body) as response:
        turn = response.headers["X-Capibara-Turn"]
        while len(begun) < place or "id: " not in begun[-1]:
            begun.append((await response.content.readuntil(b"\n\n")).decode())
        response.close()
    after = re.findall(r"^id: (\d+)$", begun[-1], re.MULTILINE)[-1]
    headers = {"Last-Event-ID": after}
    async with session.get(f"{there}/v1/chat/completions/chatcmpl-{turn}/events", headers=headers) as response:
        text = "".join(begun) + await response.text()
    *chunks, end = [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: ")]
    assert end == "[DONE]"
    parsed = [json.loads(each) for each in chunks]
    assert "".join(each["choices"][0]["delta"].get("content") or "" for each in parsed) == HUNDRED
    assert {each["model"] for each in parsed} == {"scripted"}
    assert [each["choices"][0]["delta"].get("role") for each in parsed].count("assistant") == 1


async def test_a_finished_turn_can_be_read_again_from_anywhere(installation: Installation, session: ClientSession) -> None:
    here, there = await installation.start_edge(), await installation.start_edge()
    stream = await ask(here, message="capital of France?")
    turn = stream[0].data["turn"]
    ids = [each.id for each in stream if each.id]
    for after in ["0", *ids]:
        async with asyncio.timeout(20), session.get(f"{there}/api/chat/{turn}/events", headers={"Last-Event-ID": after}) as response:
            rest = events(await response.text())
        place = next((n + 1 for n, each in enumerate(stream) if each.id == after), 1)
        assert rest == stream[place:]


async def test_readers_leave_nothing_behind(door: str, session: ClientSession) -> None:
    await ask(door, message="count")
    async with session.post(f"{door}/api/chat", json={"message": "silent"}) as response:
        turn = response.headers["X-Capibara-Turn"]
        await response.content.readuntil(b"\n\n")
    await session.delete(f"{door}/api/chat/{turn}")

    async def idle() -> bool:
        async with session.get(f"{door}/stats") as response:
            return (await response.json())["streams_open"] == 0

    await until(idle)


async def test_stopping_a_turn_stops_its_engine(door: str, engine: str, session: ClientSession) -> None:
    async with session.post(f"{door}/api/chat", json={"message": "hang"}) as response:
        turn = response.headers["X-Capibara-Turn"]
        begun = await first(response, 2)
        async with session.delete(f"{door}/api/chat/{turn}") as cancelled:
            assert cancelled.status == 202
            assert await cancelled.json() == {"turn": turn, "cancelling": True}
        stream = begun + [each async for each in arriving(response)]
    assert names(stream) == ["turn", "routed", "token", "usage", "done"]
    assert text_of(stream) == "one two"
    assert stream[-1].data["finish_reason"] == "cancelled"

    async def aborted() -> bool:
        return (await counts(engine))["aborted"] == 1

    await until(aborted)
    async with session.delete(f"{door}/api/chat/{turn}") as again:
        assert again.status == 202


async def test_a_turn_is_stopped_from_any_door(installation: Installation, session: ClientSession) -> None:
    here, there = await installation.start_edge(), await installation.start_edge()
    async with session.post(f"{here}/api/chat", json={"message": "hundred"}) as response:
        await first(response, 1)
        await session.delete(f"{there}/api/chat/{response.headers['X-Capibara-Turn']}")
        stream = [each async for each in arriving(response)]
    assert stream[-1].data["finish_reason"] == "cancelled"
    assert not text_of(stream).endswith("30 ")


async def test_a_reader_that_leaves_does_not_stop_its_turn(door: str, session: ClientSession) -> None:
    async with session.post(f"{door}/api/chat", json={"message": "hundred"}) as response:
        turn = response.headers["X-Capibara-Turn"]
        await first(response, 1)
        response.close()
    async with session.get(f"{door}/api/chat/{turn}/events") as response:
        assert text_of(events(await response.text())) == HUNDRED


async def test_turns_belong_to_their_tenant(broker: EmbeddedBroker, fleet_file: Path, engine: str, session: ClientSession) -> None:
    keys = tuple(Key(key=f"sk-{name}-secret", principal=name, tenant=name) for name in ("acme", "umbrella"))
    settings = settings_for(broker, fleet_file, auth=AuthSettings(anonymous=False, keys=keys))
    await wiring.apply_streams(settings)
    running = Installation(settings, engine)
    try:
        await running.start_worker("router")
        await running.start_worker("caller")
        door = await running.start_edge()
        ours, theirs = ({"Authorization": f"Bearer sk-{name}-secret"} for name in ("acme", "umbrella"))
        async with session.post(f"{door}/api/chat", json={"message": "count"}) as response:
            assert response.status == 401
        async with session.post(f"{door}/api/chat", json={"message": "count"}, headers=ours) as response:
            assert text_of(events(await response.text())) == "one two three four five"
            path = f"{door}/api/chat/{response.headers['X-Capibara-Turn']}"
        for headers, status in ((theirs, 404), ({}, 401), (ours, 200)):
            async with session.get(f"{path}/events", headers=headers) as response:
                assert response.status == status
        async with session.delete(path, headers=theirs) as response:
            assert response.status == 404
    finally:
        await running.aclose()


async def test_the_door_is_ready_once_somebody_works(broker: EmbeddedBroker, fleet_file: Path, engine: str, session: ClientSession) -> None:
    settings = settings_for(broker, fleet_file)
    running = Installation(settings, engine)
    try:
        async with wiring.connected(settings, "edge") as client:
            door = wiring.NatsTurns(client, wiring.consumers(settings))
            assert set(await door.ready()) == {"CF_OUT", "router", "caller-scripted", "caller-paint"}
            await wiring.apply_streams(settings)
            assert set((await door.ready()).values()) == {"no worker is taking work"}
            await running.start_worker("router")

            async def only_callers() -> bool:
                return set(await door.ready()) == {"caller-scripted", "caller-paint"}

            await until(only_callers)
            worker = await running.start_worker("caller")
            url = await running.start_edge()
            await worker.aclose()

            async def gone() -> bool:
                async with session.get(f"{url}/ready") as response:
                    missing = (await response.json())["missing"]
                    return response.status == 503 and set(missing) == {"caller-scripted", "caller-paint"}

            await until(gone)
    finally:
        await running.aclose()


async def test_a_turn_asked_before_anybody_works_is_answered_later(
    broker: EmbeddedBroker, fleet_file: Path, engine: str, session: ClientSession
) -> None:
    settings = settings_for(broker, fleet_file)
    await wiring.apply_streams(settings)
    running = Installation(settings, engine)
    try:
        workers = [await running.start_worker(name) for name in ("router", "caller")]
        door = await running.start_edge()
        for worker in workers:
            await worker.aclose()
        async with session.post(f"{door}/api/chat", json={"message": "count"}) as response:
            assert response.status == 200
            await running.start_worker("router")
            await running.start_worker("caller")
            assert text_of(events(await response.text())) == "one two three four five"
    finally:
        await running.aclose()


async def test_metrics_and_stats_of_a_real_turn(door: str, session: ClientSession) -> None:
    await ask(door, message="count")
    async with session.get(f"{door}/stats") as response:
        stats = await response.json()
    assert stats["turns_opened"] >= 1
    assert stats["experts"][0] == {"name": "scripted", "dialect": "openai", "scripted": True}
    async with session.get(f"{door}/metrics") as response:
        text = await response.text()
    for pattern in (
        r'capibara_turns_total\{outcome="done"\} [1-9]',
        r"capibara_turn_duration_seconds_count [1-9]",
        r'capibara_tokens_total\{direction="out",expert="scripted"\} [1-9]',
        r'capibara_work_settled_total\{how="done",stage="caller"\} [1-9]',
        r'capibara_first_token_seconds_count\{expert="scripted"\} [1-9]',
    ):
        assert re.search(pattern, text), pattern


@pytest.mark.parametrize(("characters", "status"), [(3_000_000, 200), (4_500_000, 413)])
async def test_a_large_body_is_answered_or_said_to_be_too_large(
    installation: Installation, session: ClientSession, characters: int, status: int
) -> None:
    assert installation.settings.edge == EdgeSettings()
    door = await installation.start_edge()
    async with session.post(f"{door}/api/chat", json={"message": "x" * characters, "stream": False}) as response:
        assert response.status == status, await response.text()


async def test_a_body_too_large_for_the_broker_is_said_to_be_too_large(installation: Installation, session: ClientSession) -> None:
    installation.settings = installation.settings.model_copy(update={"edge": EdgeSettings(max_body_bytes=20_000_000)})
    door = await installation.start_edge()
    async with session.post(f"{door}/api/chat", json={"message": "x" * 9_000_000, "stream": False}) as response:
        assert response.status == 413, await response.text()
        assert "more than the broker takes" in (await response.json())["detail"]


async def test_a_turn_survives_that_the_streams_of_all_output_disappear(installation: Installation, session: ClientSession) -> None:
    door = await installation.start_edge()
    async with wiring.connected(installation.settings, "provisioner") as client:
        for name in ("CF_OUT", "CF_CTL"):
            await client.jetstream().delete_stream(name)
    async with session.get(f"{door}/ready") as response:
        assert response.status == 503
        assert "CF_OUT" in await response.text()
    async with session.post(f"{door}/api/chat", json={"message": "count"}) as response:
        text = await response.text()
    assert "event: done" in text
    async with session.get(f"{door}/ready") as response:
        assert response.status == 200
