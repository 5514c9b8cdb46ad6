"""The scripted engine: the script, the wire, and our own client against it."""

import asyncio
import os
import re
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import openai
import pytest
from hypothesis import given
from hypothesis import strategies as st

from capibara_flow.domain.fleet import Expert
from capibara_flow.engines.build import build_engine
from capibara_flow.engines.script import MOST_COUNTED, Answer, Fail, Script, load_script, rest_of
from capibara_flow.engines.scripted import serve
from capibara_flow.errors import EngineBroke, EngineBusy
from capibara_flow.ports import ChatEngine, Finish, Piece, Tally, Text, ToolFragment
from capibara_flow.settings import SettingsError
from tests.engines.listening import heard, text_in, until
from topics.chat import ChatRequest

SCRIPT = Path(__file__).with_name("answers.toml")


@pytest.fixture
async def url() -> AsyncIterator[str]:
    """The address of an engine that plays answers.toml."""
    runner, url = await serve(load_script(SCRIPT))
    yield url
    await runner.cleanup()


@pytest.fixture
async def engine(url: str) -> AsyncIterator[ChatEngine]:
    """Our client for it."""
    engine = build_engine(Expert(name="e", dialect="llama_server", urls=(url,), scripted=True, tools=True), url)
    yield engine
    await engine.aclose()


async def asked(engine: ChatEngine, *messages: dict[str, Any], into: list[Piece] | None = None, **sampling: Any) -> list[Piece]:
    return await heard(engine, ChatRequest.model_validate({"messages": messages, "sampling": sampling}), into)


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


async def counts(url: str) -> dict[str, int]:
    async with aiohttp.ClientSession() as session, session.get(f"{url}/counts") as response:
        result: dict[str, int] = await response.json()
        return result


async def counted(url: str, what: str) -> bool:
    return (await counts(url))[what] > 0


async def test_the_first_answer_that_fits_is_given(engine: ChatEngine) -> None:
    pieces = await asked(engine, user("Count, please"))
    assert [piece.text for piece in pieces[:5] if isinstance(piece, Text)] == ["one", " two", " three", " four", " five"]
    assert pieces[-2:] == [Tally(2, 5), Finish("stop")]
    assert text_in(await asked(engine, user("Anything else?"))) == "I have no line for that."


@pytest.mark.parametrize(("asked", "last"), [("3", 3), ("0", 0), ("٣", 3), ("three", 0), ("9" * 5000, MOST_COUNTED)])
def test_an_answer_counts_as_far_as_it_is_asked_to(asked: str, last: int) -> None:
    answer = Answer(when=r"up to (\w+)", counts=True)
    assert answer.spoken(f"Please go UP TO {asked}!") == tuple(f"{number} " for number in range(1, last + 1))


def test_tokens_of_a_burst_are_due_together_and_bursts_as_often_as_their_tokens_were() -> None:
    single, burst = Answer(delay_ms=40), Answer(delay_ms=40, burst=3)
    assert [round(single.due(index) * 1000) for index in range(4)] == [40, 80, 120, 160]
    assert [round(burst.due(index) * 1000) for index in range(7)] == [40, 40, 40, 160, 160, 160, 280]
    assert Answer().due(100) == 0


async def test_a_count_can_be_continued(engine: ChatEngine) -> None:
    pieces = await asked(engine, user("up to 5"), {"role": "assistant", "content": "1 2 "})
    assert (text_in(pieces), pieces[-1]) == ("3 4 5 ", Finish("stop"))


async def test_a_limit_cuts(engine: ChatEngine) -> None:
    pieces = await asked(engine, user("count"), max_tokens=2)
    assert (text_in(pieces), pieces[-1]) == ("one two", Finish("length"))


async def test_a_tool_call_and_the_word_after_it(engine: ChatEngine) -> None:
    pieces = await asked(engine, user("weather"))
    assert Text(reasoning="I need a tool.") in pieces
    assert [(each.name, each.arguments) for each in pieces if isinstance(each, ToolFragment)] == [("weather", '{"city": "Bogotá"}')]
    assert pieces[-1] == Finish("tool_calls")
    call = {"id": "call_scripted_0", "function": {"name": "weather", "arguments": "{}"}}
    wanted = {"role": "assistant", "tool_calls": [call]}
    told = {"role": "tool", "tool_call_id": "call_scripted_0", "content": "rain"}
    assert text_in(await asked(engine, user("weather"), wanted, told)) == "It rains."


@pytest.mark.parametrize(("question", "words"), [("break", "broke in the middle|without a finish"), ("error", "script wants an error")])
async def test_answers_break_where_the_script_says(engine: ChatEngine, question: str, words: str) -> None:
    pieces: list[Piece] = []
    with pytest.raises(EngineBroke, match=words):
        await asked(engine, user(question), into=pieces)
    assert text_in(pieces) == "one two"


async def test_a_broken_answer_can_be_continued(engine: ChatEngine) -> None:
    pieces = await asked(engine, user("break"), {"role": "assistant", "content": "one two"})
    assert (text_in(pieces), pieces[-1]) == (" three four five", Finish("stop"))


async def test_a_failure_may_happen_a_few_times_only(engine: ChatEngine) -> None:
    with pytest.raises(EngineBusy):
        await asked(engine, user("busy once"))
    assert text_in(await asked(engine, user("busy once"))) == "now"


@pytest.mark.parametrize("question", ["hang", "slow"])
async def test_who_goes_away_is_counted(engine: ChatEngine, url: str, question: str) -> None:
    stream = engine.stream(ChatRequest.model_validate({"messages": [user(question)]}))
    await anext(stream)
    await stream.aclose()
    await until(lambda: counted(url, "aborted"))
    found = await counts(url)
    assert (found["requests"], found["aborted"]) == (1, 1)
    assert 1 <= found["tokens"] < 4


async def runs(url: str) -> list[dict[str, Any]]:
    async with aiohttp.ClientSession() as session, session.get(f"{url}/runs") as response:
        return list(await response.json())


async def test_every_run_tells_what_was_asked_and_how_it_ended(engine: ChatEngine, url: str) -> None:
    stream = engine.stream(ChatRequest.model_validate({"messages": [user("hang")]}))
    await anext(stream)
    assert [(run["how"], run["ended"]) for run in await runs(url)] == [("running", None)]
    assert (await counts(url))["running"] == 1
    await stream.aclose()
    await until(lambda: counted(url, "aborted"))
    await asked(engine, user("up to 5"), {"role": "assistant", "content": "1 2 "})
    with pytest.raises(EngineBroke):
        await asked(engine, user("break"))
    told = await runs(url)
    assert [(run["number"], run["question"], run["prefix"], run["how"]) for run in told] == [
        (1, "hang", 0, "aborted"),
        (2, "up to 5", 4, "done"),
        (3, "break", 0, "broken"),
    ]
    assert [run["tokens"] for run in told][1:] == [3, 2]
    assert all(run["began"] <= run["ended"] for run in told)
    assert (await counts(url))["running"] == 0


async def test_it_is_always_labelled(url: str) -> None:
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none") as client:
        raw = await client.chat.completions.with_raw_response.create(model="gpt-9", messages=[{"role": "user", "content": "count"}])
        models = await client.models.list()
    completion = raw.parse()
    assert raw.headers["X-Capibara-Engine"] == "scripted"
    assert (completion.model, completion.system_fingerprint) == ("scripted", "scripted")
    assert completion.choices[0].message.content == "one two three four five"
    assert completion.usage
    assert completion.usage.completion_tokens == 5
    assert [(model.id, model.owned_by) for model in models.data] == [("scripted", "scripted")]


async def test_without_streaming_a_continuation_has_its_prefix(url: str) -> None:
    body = {"messages": [user("count"), {"role": "assistant", "content": "one tw"}], "continue_final_message": True}
    async with aiohttp.ClientSession() as session, session.post(f"{url}/v1/chat/completions", json=body) as response:
        assert (await response.json())["choices"][0]["message"]["content"] == "one two three four five"


@pytest.mark.parametrize("body", [b"{", b"[]", b"{}", b'{"messages":[]}', b'{"messages":[1]}'])
async def test_nonsense_is_refused(url: str, body: bytes) -> None:
    async with aiohttp.ClientSession() as session, session.post(f"{url}/v1/chat/completions", data=body) as response:
        assert response.status == 400
        assert "error" in await response.json()


@given(st.text(max_size=60), st.integers(0, 60))
def test_a_text_in_tokens_can_be_continued_from_anywhere(text: str, cut: int) -> None:
    tokens = Answer(text=text).spoken("")
    start, rest = rest_of(tokens, text[:cut])
    assert "".join(tokens) == text
    assert text[:cut] + "".join(rest) == text
    assert len(rest) == len(tokens) - start


def test_another_beginning_is_answered_from_the_start() -> None:
    assert rest_of(("one", " two"), "zwei") == (0, ("one", " two"))


@pytest.mark.parametrize(
    ("toml", "words"),
    [
        ("[[answer]\n", "not TOML"),
        ("[[answer]]\nwhen = '('\n", "not a regular expression"),
        ("[[answer]]\nfoo = 1\n", "foo"),
        ("[[answer]]\ntext = 'a'\ntokens = ['b']\n", "one of text, tokens and counts"),
        ("[[answer]]\nwhen = '(a)'\ntext = 'a'\ncounts = true\n", "one of text, tokens and counts"),
        ("[[answer]]\nwhen = 'a'\ncounts = true\n", "needs a group"),
        ("[[answer]]\nburst = 0\n", "burst"),
        ("[[answer]]\nfail = { before = 200 }\n", "before"),
    ],
)
def test_a_wrong_script_names_file_key_and_reason(tmp_path: Path, toml: str, words: str) -> None:
    path = tmp_path / "script.toml"
    path.write_text(toml, encoding="utf-8")
    with pytest.raises(SettingsError, match=rf"script\.toml: .*{words}"):
        load_script(path)


def test_an_absent_script_is_named(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"nowhere\.toml: cannot be read"):
        load_script(tmp_path / "nowhere.toml")


async def test_a_hang_without_streaming_is_counted_too() -> None:
    runner, url = await serve(Script(answer=(Answer(text="a", fail=Fail(hang_after=0)),)))
    async with aiohttp.ClientSession() as session:
        task = asyncio.create_task(session.post(f"{url}/v1/chat/completions", json={"messages": [user("x")]}))
        await until(lambda: counted(url, "requests"))
        task.cancel()
        await until(lambda: counted(url, "aborted"))
    await runner.cleanup()


async def test_it_runs_as_a_process_and_ends_when_asked() -> None:
    command = [sys.executable, "-m", "capibara_flow.engines.scripted", str(SCRIPT)]
    process = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE, env=dict(os.environ))
    assert process.stdout
    line = (await asyncio.wait_for(process.stdout.readline(), 30)).decode()
    url = re.search(r"http://127\.0\.0\.1:\d+", line)
    assert url
    assert (await counts(url[0]))["requests"] == 0
    process.send_signal(signal.SIGTERM)
    assert await asyncio.wait_for(process.wait(), 30) == 0
