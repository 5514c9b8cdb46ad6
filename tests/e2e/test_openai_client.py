"""The official ``openai`` client, sync and async, against a whole installation."""

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from typing import Any

import openai
import pytest
from openai import AsyncOpenAI, OpenAI
from openai.types.chat import ChatCompletionChunk

from tests.edge.client import ask, text_of

FRANCE = "The capital of France is Paris."
QUESTION: list[Any] = [{"role": "user", "content": "capital of France?"}]
WEATHER: list[Any] = [{"role": "user", "content": "weather?"}]
TOOLS: list[Any] = [
    {
        "type": "function",
        "function": {"name": "weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}},
    }
]


@pytest.fixture
async def client(door: str) -> AsyncIterator[AsyncOpenAI]:
    async with AsyncOpenAI(base_url=f"{door}/v1", api_key="sk-any", max_retries=0, timeout=30) as client:
        yield client


@pytest.fixture
def blocking(door: str) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{door}/v1", api_key="sk-any", max_retries=0, timeout=30) as client:
        yield client


def says(content: str) -> list[Any]:
    return [{"role": "user", "content": content}]


async def test_a_whole_completion(client: AsyncOpenAI) -> None:
    completion = await client.chat.completions.create(model="auto", messages=QUESTION)
    (choice,) = completion.choices
    assert (choice.message.role, choice.message.content, choice.finish_reason) == ("assistant", FRANCE, "stop")
    assert (completion.object, completion.model) == ("chat.completion", "scripted")
    assert completion.usage is not None
    assert completion.usage.model_dump(include={"prompt_tokens", "completion_tokens", "total_tokens"}) == {
        "prompt_tokens": 3,
        "completion_tokens": 7,
        "total_tokens": 10,
    }


async def test_a_streamed_completion(client: AsyncOpenAI) -> None:
    chunks = [chunk async for chunk in await client.chat.completions.create(model="script", messages=QUESTION, stream=True)]
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == FRANCE
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [None] * (len(chunks) - 1) + ["stop"]
    assert {chunk.id for chunk in chunks} == {chunks[0].id}
    assert {(chunk.model, chunk.object) for chunk in chunks} == {("scripted", "chat.completion.chunk")}
    assert all(chunk.usage is None for chunk in chunks)


async def test_usage_comes_last_when_it_is_asked_for(client: AsyncOpenAI) -> None:
    stream = await client.chat.completions.create(model="auto", messages=QUESTION, stream=True, stream_options={"include_usage": True})
    *_, last = [chunk async for chunk in stream]
    assert last.choices == []
    assert last.usage is not None
    assert (last.usage.prompt_tokens, last.usage.completion_tokens, last.usage.total_tokens) == (3, 7, 10)


async def test_an_id_names_the_turn_that_can_be_read_natively(client: AsyncOpenAI, door: str) -> None:
    response = await client.chat.completions.with_raw_response.create(model="auto", messages=QUESTION)
    completion = response.parse()
    assert completion.id == "chatcmpl-" + response.headers["x-capibara-turn"]
    assert response.headers["x-capibara-route"] == "default"
    first = (await ask(door, message="count"))[0].data
    assert abs(completion.created - first["created"]) < 60


@pytest.mark.parametrize("stream", [False, True])
async def test_a_tool_is_called_and_its_result_answered(client: AsyncOpenAI, stream: bool) -> None:
    if stream:
        chunks = [each async for each in await client.chat.completions.create(model="auto", messages=WEATHER, tools=TOOLS, stream=True)]
        call, reason = joined(chunks), chunks[-1].choices[0].finish_reason
    else:
        completion = await client.chat.completions.create(model="auto", messages=WEATHER, tools=TOOLS, tool_choice="auto")
        (choice,) = completion.choices
        assert choice.message.tool_calls
        assert choice.message.content is None
        assert choice.message.reasoning_content == "I need a tool."  # type: ignore[attr-defined]  # an extension
        call, reason = choice.message.tool_calls[0].model_dump(), choice.finish_reason
    assert reason == "tool_calls"
    assert call["function"]["name"] == "weather"
    assert json.loads(call["function"]["arguments"]) == {"city": "Bogotá"}
    said = {"role": "assistant", "content": None, "tool_calls": [call]}
    result = {"role": "tool", "tool_call_id": call["id"], "content": "rain"}
    answer = await client.chat.completions.create(model="auto", messages=[*WEATHER, said, result], tools=TOOLS)
    assert answer.choices[0].message.content == "It rains."


def joined(chunks: list[ChatCompletionChunk]) -> dict[str, Any]:
    """The one tool call of a stream, its ``index`` kept as clients often do."""
    fragments = [call for chunk in chunks for call in chunk.choices[0].delta.tool_calls or ()]
    assert {fragment.index for fragment in fragments} == {0}
    named = next(each for each in fragments if each.function and each.function.name)
    assert named.function is not None
    arguments = "".join(each.function.arguments or "" for each in fragments if each.function)
    return {"index": 0, "id": named.id, "type": named.type, "function": {"name": named.function.name, "arguments": arguments}}


async def test_a_message_may_be_sent_back_as_it_came(client: AsyncOpenAI) -> None:
    first = await client.chat.completions.create(model="auto", messages=QUESTION)
    conversation: list[Any] = [*QUESTION, first.choices[0].message, {"role": "user", "content": "count"}]
    second = await client.chat.completions.create(model="auto", messages=conversation)
    assert second.choices[0].message.content == "one two three four five"
    tool = await client.chat.completions.create(model="auto", messages=WEATHER, tools=TOOLS)
    asked = tool.choices[0].message
    assert asked.tool_calls
    result: Any = {"role": "tool", "tool_call_id": asked.tool_calls[0].id, "content": "rain"}
    third = await client.chat.completions.create(model="auto", messages=[*WEATHER, asked, result], tools=TOOLS)
    assert third.choices[0].message.content == "It rains."


async def test_what_we_do_not_know_is_tolerated(client: AsyncOpenAI) -> None:
    completion = await client.chat.completions.create(
        model="auto",
        messages=QUESTION,
        user="ann",
        stop="\0",
        temperature=0,
        top_p=0.5,
        max_completion_tokens=3,
        seed=7,
        n=1,
        metadata={"a": "b"},
        parallel_tool_calls=False,
        extra_body={"capibara": {"x": 1}, "min_p": 0.1, "stream_options": None},
    )
    assert (completion.choices[0].message.content, completion.choices[0].finish_reason) == ("The capital of", "length")


async def test_models_are_the_experts_and_auto(client: AsyncOpenAI) -> None:
    models = [model async for model in await client.models.list()]
    assert [model.id for model in models] == ["auto", "scripted", "paint"]
    assert all(model.object == "model" and model.owned_by == "capibara" for model in models)


@pytest.mark.parametrize("stream", [False, True])
async def test_errors_are_the_ones_that_the_client_knows(client: AsyncOpenAI, stream: bool) -> None:
    with pytest.raises(openai.NotFoundError, match="no expert is called 'gpt-4'") as unknown:
        await client.chat.completions.create(model="gpt-4", messages=QUESTION, stream=stream)
    assert unknown.value.code == "model_not_found"
    for body in ({"temperature": 3}, {"n": 2}, {"messages": []}, {"logprobs": True}):
        with pytest.raises(openai.BadRequestError) as refused:
            await client.chat.completions.create(**{"model": "auto", "messages": QUESTION, "stream": stream, **body})
        assert next(iter(body)) in str(refused.value)
        assert refused.value.type == "invalid_request_error"


async def test_a_refusal_of_the_engine_is_a_bad_request(client: AsyncOpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="the script wants status 400"):
        await client.chat.completions.create(model="auto", messages=says("refuse"))


async def test_a_refusal_in_mid_stream_is_an_error(client: AsyncOpenAI) -> None:
    stream = await client.chat.completions.create(model="auto", messages=says("refuse"), stream=True)
    with pytest.raises(openai.APIError, match="the script wants status 400"):
        async for _ in stream:
            pass


async def test_a_stopped_turn_is_an_error_in_mid_stream(client: AsyncOpenAI, door: str) -> None:
    stream = await client.chat.completions.create(model="auto", messages=says("hang"), stream=True)
    said: list[str] = []

    async def read() -> None:
        async for chunk in stream:
            said.append(chunk.choices[0].delta.content or "")
            if "".join(said) == "one two":
                turn = chunk.id.removeprefix("chatcmpl-")
                await client.delete(f"{door}/api/chat/{turn}", cast_to=object)

    with pytest.raises(openai.APIError, match="cancelled"):
        await read()
    assert "".join(said) == "one two"


async def test_many_at_once_are_kept_apart(client: AsyncOpenAI) -> None:
    async def answered(question: str) -> str:
        stream = await client.chat.completions.create(model="auto", messages=says(question), stream=True)
        return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

    questions = ["capital of France?", "count", "slow", "nothing"] * 10
    answers = dict.fromkeys(questions, "")
    answers |= {"capital of France?": FRANCE, "count": "one two three four five"}
    answers |= {"slow": "tick tock tick tock", "nothing": "I have no line for that."}
    assert await asyncio.gather(*map(answered, questions)) == [answers[question] for question in questions]


async def test_the_blocking_client_works_as_well(blocking: OpenAI, door: str) -> None:
    def work() -> tuple[str | None, str, list[str]]:
        whole = blocking.chat.completions.create(model="auto", messages=QUESTION).choices[0].message.content
        with blocking.chat.completions.create(model="auto", messages=QUESTION, stream=True) as stream:
            streamed = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
        with pytest.raises(openai.NotFoundError):
            blocking.chat.completions.create(model="gpt-4", messages=QUESTION)
        with pytest.raises(openai.APIError, match="status 400"):
            list(blocking.chat.completions.create(model="auto", messages=says("refuse"), stream=True))
        return whole, streamed, [model.id for model in blocking.models.list()]

    assert await asyncio.to_thread(work) == (FRANCE, FRANCE, ["auto", "scripted", "paint"])
    assert text_of(await ask(door, message="count")) == "one two three four five"
