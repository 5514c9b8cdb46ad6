"""Answers that survive, and turns that stop: the whole installation, and claims checked at the engine."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from aiohttp import ClientResponse, ClientSession

from capibara_flow import wiring
from capibara_flow.runtime.embedded import EmbeddedBroker
from capibara_flow.settings import EdgeSettings
from tests.conftest import Installation, installed, settings_for
from tests.edge.client import Event, arriving, ask, text_of
from tests.waiting import until

pytestmark = pytest.mark.timeout(90)


@pytest.fixture
def fleet_file(engine: str, tmp_path: Path) -> Path:
    """One expert that answers one turn at a time and can be continued, and one that cannot be continued, with replicas."""
    file = tmp_path / "fleet.toml"
    file.write_text(
        f'default = "one"\nthen = ["two"]\n'
        f'[[experts]]\nname = "one"\nurls = ["{engine}"]\nscripted = true\nconcurrency = 1\n'
        f'[[experts]]\nname = "two"\nurls = ["{engine}", "{engine}"]\ntools = true\n'
        f'[[experts]]\nname = "nobody"\nurls = ["http://127.0.0.1:9/v1"]\n'
        f'[[rules]]\nroute = "lost"\nexpert = "nobody"\nthen = ["one"]\npatterns = ["^count"]\n',
        encoding="utf-8",
    )
    return file


@pytest.fixture
async def installation(broker: EmbeddedBroker, fleet_file: Path, engine: str) -> AsyncIterator[Installation]:
    """Doors that miss a reader soon."""
    settings = settings_for(broker, fleet_file, edge=EdgeSettings(abandon_seconds=1))
    async with installed(settings, engine) as running:
        yield running


async def counts(engine: str) -> dict[str, int]:
    """What the engine says that it has done."""
    async with ClientSession() as session, session.get(engine.removesuffix("/v1") + "/counts") as response:
        found: dict[str, int] = await response.json()
        return found


async def until_counted(engine: str, **wanted: int) -> None:
    """Return when the engine says so."""

    async def said() -> bool:
        found = await counts(engine)
        return all(found[name] == value for name, value in wanted.items())

    await until(said)


async def turn_of(stream: AsyncIterator[Event]) -> str:
    first = await anext(stream)
    assert first.name == "turn"
    return str(first.data["turn"])


async def stop(url: str, turn: str) -> None:
    async with ClientSession() as session, session.delete(f"{url}/api/chat/{turn}") as response:
        assert response.status == 202


async def rest(stream: AsyncIterator[Event]) -> list[Event]:
    return [event async for event in stream]


def chat(session: ClientSession, url: str, message: str, **more: Any) -> Any:
    """A streamed question."""
    return session.post(f"{url}/api/chat", json={"message": message, **more})


@pytest.mark.parametrize(("model", "how"), [("one", "prefill"), ("two", "skip")])
async def test_an_answer_that_breaks_off_goes_on_without_a_seam(door: str, model: str, how: str) -> None:
    stream = await ask(door, message="this one stumbles once", model=model)
    assert text_of(stream) == "one two three four five"
    names = [each.name for each in stream]
    assert "reset" not in names
    (continued,) = (each for each in stream if each.name == "continued")
    assert continued.data["how"] == how
    usage = next(each.data for each in stream if each.name == "usage")
    assert (usage["completion_tokens"], usage["attempts"]) == (5, 2)
    # How much of the first attempt arrived before the connection broke is the network's choice.
    assert usage["burnt_tokens"] == 5 if how == "prefill" else 5 < usage["burnt_tokens"] <= 8
    assert names[-1] == "done"


async def test_structured_output_is_never_half_of_two_answers(door: str, engine: str) -> None:
    stream = await ask(door, message="this one stumbles once", model="one", response_format={"type": "json_object"})
    assert text_of(stream) == "one two three four five"
    assert [each.data["how"] for each in stream if each.name == "continued"] == ["skip"]


async def test_the_route_s_next_expert_answers_for_one_that_is_down(door: str) -> None:
    stream = await ask(door, message="count to five")
    assert text_of(stream) == "one two three four five"
    assert next(each.data for each in stream if each.name == "routed")["model_id"] == "nobody"
    assert stream[-1].data["model_id"] == "one"


async def test_a_stop_in_mid_answer_reaches_the_engine(door: str, engine: str) -> None:
    async with ClientSession() as session, chat(session, door, "hang on") as response:
        stream = arriving(response)
        turn = await turn_of(stream)
        await until_counted(engine, running=1)
        await stop(door, turn)
        ends = await rest(stream)
    assert ends[-1].data["finish_reason"] == "cancelled"
    await until_counted(engine, running=0, aborted=1)


async def test_a_stop_of_a_turn_that_waits_ends_it_though_its_expert_is_at_work(door: str, engine: str) -> None:
    async with ClientSession() as session, chat(session, door, "hang on", model="one") as first:
        await until_counted(engine, running=1)
        async with chat(session, door, "hang on", model="one") as second:
            stream = arriving(second)
            await stop(door, await turn_of(stream))
            ends = await rest(stream)
        assert ends[-1].data["finish_reason"] == "cancelled"
        await until_counted(engine, requests=1, running=1)
        stream = arriving(first)
        await stop(door, await turn_of(stream))
        await rest(stream)
        assert text_of(await ask(door, message="slow", model="one")) == "tick tock tick tock"  # the queue has moved on
    await until_counted(engine, requests=2, aborted=1)


async def test_a_turn_that_waits_fails_when_its_time_is_up(door: str, engine: str) -> None:
    async with ClientSession() as session, chat(session, door, "hang on", model="one") as first:
        await until_counted(engine, running=1)
        async with chat(session, door, "hang on", model="one", timeout_seconds=1) as second:
            stream = arriving(second)
            turn = await turn_of(stream)
            ends = await rest(stream)
        assert (ends[-1].name, ends[-1].data["status"]) == ("error", 504)
        async with session.get(f"{door}/api/chat/{turn}/events") as again:  # it is kept: whoever comes later hears the same
            assert (await rest(arriving(again)))[-1] == ends[-1]
        await until_counted(engine, requests=1, running=1)
        stream = arriving(first)
        await stop(door, await turn_of(stream))


async def leave(response: ClientResponse, stream: AsyncIterator[Event]) -> None:
    """Go away once something was said."""
    async for event in stream:
        if event.name == "token":
            break
    response.close()


async def test_a_turn_that_nobody_reads_is_stopped_and_one_that_is_read_again_is_not(door: str, engine: str) -> None:
    async with ClientSession() as session:
        async with chat(session, door, "hang on") as response:
            left = arriving(response)
            turn = await turn_of(left)
            await leave(response, left)
        async with session.get(f"{door}/api/chat/{turn}/events") as response:
            stream = arriving(response)
            await anext(stream)
            await asyncio.sleep(4)  # twice as long as an absence may last: the broker's clock decides
            assert (await counts(engine))["running"] == 1
            await leave(response, stream)
        await until_counted(engine, running=0, aborted=1)
        async with session.get(f"{door}/api/chat/{turn}/events") as response:
            assert (await rest(arriving(response)))[-1].data["finish_reason"] == "cancelled"


async def test_a_turn_in_the_background_needs_no_reader(door: str, engine: str) -> None:
    async with ClientSession() as session:
        async with chat(session, door, "hang on", background=True) as response:
            stream = arriving(response)
            turn = await turn_of(stream)
            await leave(response, stream)
        await asyncio.sleep(4)  # as above
        assert (await counts(engine))["running"] == 1
        await stop(door, turn)
        await until_counted(engine, running=0, aborted=1)


async def test_an_erased_turn_leaves_nothing_and_no_run(door: str, engine: str, installation: Installation) -> None:
    async with ClientSession() as session, chat(session, door, "hang on") as response:
        stream = arriving(response)
        turn = await turn_of(stream)
        await until_counted(engine, running=1)
        async with session.delete(f"{door}/api/chat/{turn}", params={"erase": "true"}) as erased:
            assert erased.status == 200, await erased.text()
            assert (await erased.json())["erased"] > 0
        await until_counted(engine, running=0, aborted=1)
    async with wiring.connected(installation.settings, "provisioner") as operator:
        jetstream = operator.jetstream()
        for info in await jetstream.streams_info():
            found = await jetstream.stream_info(info.config.name or "", subjects_filter=">")
            assert not [subject for subject in found.state.subjects or () if turn in subject]


async def test_a_full_queue_of_calls_refuses_a_streamed_turn_before_any_work(door: str, installation: Installation) -> None:
    async with wiring.connected(installation.settings, "provisioner") as admin:
        jetstream = admin.jetstream()
        info = await jetstream.stream_info("CF_WORK_CALL")
        info.config.max_msgs = 1
        await jetstream.update_stream(info.config)
    async with ClientSession() as session, chat(session, door, "hang", model="one") as first:
        stream = arriving(first)
        turn = await turn_of(stream)
        while (await anext(stream)).name != "token":
            pass
        for path, body in (("/api/chat", {"message": "hi"}), ("/v1/chat/completions", {"messages": [{"role": "user", "content": "hi"}]})):
            async with session.post(f"{door}{path}", json={**body, "stream": True}) as refused:
                assert (refused.status, "Retry-After" in refused.headers) == (503, True)
        await stop(door, turn)
        await rest(stream)

        async def accepted() -> bool:
            async with chat(session, door, "count", model="one") as response:
                return response.status == 200

        await until(accepted)
