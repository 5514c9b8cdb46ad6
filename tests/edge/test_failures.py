"""Engines that fail, behind a whole installation: a broken answer never looks like a finished one."""

import json
from pathlib import Path
from typing import Any

import pytest
from aiohttp import ClientSession

from capibara_flow.runtime.embedded import EmbeddedBroker
from capibara_flow.settings import Settings, WorkerSettings
from tests.conftest import settings_for
from tests.edge.client import ask, counts, events, names, text_of
from tests.waiting import until

FAILING = ["error", "break", "hang", "down", "silent"]


@pytest.fixture
def fleet_file(engine: str, tmp_path: Path) -> Path:
    """An expert whose engine may not be silent for long, and one whose engine is not there."""
    timeouts = "timeouts = { connect_seconds = 1, first_token_seconds = 0.3, between_tokens_seconds = 0.3 }\n"
    file = tmp_path / "fleet.toml"
    file.write_text(
        f'[[experts]]\nname = "scripted"\nurls = ["{engine}"]\n{timeouts}'
        f'[[experts]]\nname = "nowhere"\nurls = ["http://127.0.0.1:9"]\n{timeouts}',
        encoding="utf-8",
    )
    return file


@pytest.fixture
def settings(broker: EmbeddedBroker, fleet_file: Path) -> Settings:
    """Workers try again soon, and not often."""
    return settings_for(broker, fleet_file, worker=WorkerSettings(retry_seconds=0.05, max_deliver=2, patience_seconds=0))


async def completed(door: str, question: str, **body: Any) -> tuple[int, str]:
    asked = {"messages": [{"role": "user", "content": question}], **body}
    async with ClientSession() as session, session.post(f"{door}/v1/chat/completions", json=asked) as response:
        return response.status, await response.text()


@pytest.mark.parametrize("question", FAILING)
async def test_a_native_stream_ends_with_an_error_and_never_with_done(door: str, question: str) -> None:
    stream = await ask(door, message=question)
    assert stream[-1].name == "error"
    assert "done" not in names(stream)
    problem = stream[-1].data
    assert (problem["status"], problem["title"], problem["retryable"]) == (502, "engine broke", True)
    assert problem["detail"]


@pytest.mark.parametrize("question", FAILING)
async def test_a_stream_of_openai_s_has_an_error_frame_and_no_end(door: str, question: str) -> None:
    status, text = await completed(door, question, stream=True)
    assert status == 200
    assert "[DONE]" not in text
    *_, last = (line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: "))
    error = json.loads(last)["error"]
    assert error["code"] in {"engine_broke", "answer_reset"}
    assert error["type"] == "server_error"
    assert '"finish_reason":"' not in text


@pytest.mark.parametrize("question", FAILING)
async def test_a_whole_answer_that_fails_has_its_status(door: str, question: str) -> None:
    status, text = await completed(door, question)
    assert status == 502
    assert json.loads(text)["error"]["code"] == "engine_broke"
    async with ClientSession() as session, session.post(f"{door}/api/chat", json={"message": question, "stream": False}) as response:
        assert response.status == 502
        assert response.content_type == "application/problem+json"
        assert (await response.json(content_type=None))["turn"] == response.headers["X-Capibara-Turn"]


async def test_a_refusal_of_the_engine_is_the_client_s_to_mend_and_is_not_tried_again(door: str, engine: str) -> None:
    before = (await counts(engine))["requests"]
    stream = await ask(door, message="refuse")
    assert (stream[-1].name, stream[-1].data["status"], stream[-1].data["title"]) == ("error", 400, "bad request")
    assert (await completed(door, "refuse"))[0] == 400
    assert (await counts(engine))["requests"] == before + 2


async def test_an_engine_that_is_not_there_is_named_as_the_reason(door: str) -> None:
    stream = await ask(door, message="hello", model="nowhere")
    assert names(stream) == ["turn", "routed", "error"]
    assert (stream[-1].data["status"], stream[-1].data["title"]) == (502, "engine unreachable")
    assert (await completed(door, "hello", model="nowhere"))[0] == 502


async def test_an_engine_that_was_busy_once_is_asked_again(door: str) -> None:
    stream = await ask(door, message="busy once")
    assert names(stream) == ["turn", "routed", "token", "usage", "done"]
    assert text_of(stream) == "now"
    assert stream[-2].data["attempts"] == 2


async def test_half_an_answer_is_gone_on_with(door: str) -> None:
    stream = await ask(door, message="stumbles once")
    assert names(stream) == ["turn", "routed", "token", "continued", "token", "usage", "done"]
    assert text_of(stream) == "one two three four five"
    usage = stream[-2].data
    assert (usage["attempts"], usage["completion_tokens"]) == (2, 5)
    assert usage["burnt_tokens"] >= 5


async def test_half_an_answer_is_no_whole_answer_either(door: str) -> None:
    status, text = await completed(door, "stumbles once")
    assert status == 200
    assert json.loads(text)["choices"][0]["message"]["content"] == "one two three four five"


async def test_openai_s_dialect_has_no_word_for_going_on_and_needs_none(door: str) -> None:
    _, text = await completed(door, "stumbles once", stream=True)
    *chunks, end = (line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: "))
    assert end == "[DONE]"
    said = [choice["delta"].get("content") or "" for chunk in chunks for choice in json.loads(chunk)["choices"]]
    assert "".join(said) == "one two three four five"


async def test_a_reader_who_comes_later_sees_the_same_error(door: str) -> None:
    stream = await ask(door, message="error")
    async with ClientSession() as session, session.get(f"{door}/api/chat/{stream[0].data['turn']}/events") as response:
        assert events(await response.text()) == stream[1:]


async def test_a_silent_engine_is_let_go(door: str, engine: str) -> None:
    await ask(door, message="hang")

    async def let_go() -> bool:
        return (await counts(engine))["aborted"] == 2

    await until(let_go)


async def test_one_failing_turn_does_not_disturb_the_others(door: str) -> None:
    for question in (*FAILING, "refuse"):
        await ask(door, message=question)
        assert text_of(await ask(door, message="count")) == "one two three four five"
