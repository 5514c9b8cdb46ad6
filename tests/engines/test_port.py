"""One suite for every dialect: whatever keeps ``ports.ChatEngine``'s promises passes."""

import asyncio
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing, asynccontextmanager
from typing import Any

import pytest
from structlog.testing import capture_logs

from capibara_flow.engines.build import build_engine
from capibara_flow.errors import BadRequest, EngineBroke, EngineBusy, EngineRefusesUs, EngineUnreachable
from capibara_flow.ports import ChatEngine, Finish, Piece, Tally, Text, ToolFragment
from tests.engines.dialects import CALL, DIALECTS, TEXT, FakeEngine, LlamaCompletion, LlamaServer, Ollama, Vllm
from tests.engines.listening import heard, text_in
from topics.chat import ChatRequest

PIXEL = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}}


@pytest.fixture(params=DIALECTS, ids=lambda dialect: dialect.name)
async def fake(request: pytest.FixtureRequest) -> AsyncIterator[FakeEngine]:
    """A fake server of each dialect in turn."""
    async with request.param() as server:
        yield server


@asynccontextmanager
async def engine_for(fake: FakeEngine, **expert: Any) -> AsyncIterator[ChatEngine]:
    engine = build_engine(fake.expert(**expert), fake.url)
    try:
        yield engine
    finally:
        await engine.aclose()


def asking(text: str = "¿Qué son los capibaras?", **fields: Any) -> ChatRequest:
    return ChatRequest.model_validate({"messages": [{"role": "user", "content": text}], **fields})


async def test_the_text_comes_in_order_and_the_finish_last(fake: FakeEngine) -> None:
    async with engine_for(fake) as engine:
        pieces = await heard(engine, asking())
    assert [piece.text for piece in pieces if isinstance(piece, Text)] == list(TEXT)
    assert pieces[-2:] == [Tally(prompt_tokens=11, completion_tokens=len(TEXT)), Finish("stop")]


async def test_a_limit_is_told_from_a_stop(fake: FakeEngine) -> None:
    fake.reason = "length"
    async with engine_for(fake) as engine:
        assert (await heard(engine, asking()))[-1] == Finish("length")


async def test_text_survives_being_cut_at_every_byte(fake: FakeEngine) -> None:
    fake.fault = "bytes"
    async with engine_for(fake) as engine:
        pieces = await heard(engine, asking())
    assert text_in(pieces) == "".join(TEXT)
    assert pieces[-1] == Finish("stop")


@pytest.mark.parametrize("fault", ["broken", "cut", "error", "proxy"])
async def test_a_stream_that_breaks_never_looks_finished(fake: FakeEngine, fault: str) -> None:
    fake.fault = fault
    pieces: list[Piece] = []
    async with engine_for(fake) as engine:
        with pytest.raises(EngineBroke):
            await heard(engine, asking(), pieces)
    assert text_in(pieces) == "".join(TEXT[:2])
    assert not any(isinstance(piece, Finish) for piece in pieces)


async def test_how_a_connection_broke_is_nothing_for_clients(fake: FakeEngine) -> None:
    fake.fault = "broken"
    async with engine_for(fake) as engine:
        with pytest.raises(EngineBroke) as caught:
            await heard(engine, asking())
    assert str(caught.value) == f"the connection to the server of {engine.expert.name} broke in the middle of the answer"


async def test_an_engines_own_error_is_passed_on_in_its_words(fake: FakeEngine) -> None:
    fake.fault = "error"
    async with engine_for(fake) as engine:
        with pytest.raises(EngineBroke, match="Compute error"):
            await heard(engine, asking())


@pytest.mark.parametrize("dialect", [LlamaServer, Vllm, LlamaCompletion], ids=lambda each: each.name)
async def test_a_proxys_last_words_explain_the_break(dialect: type[FakeEngine]) -> None:
    async with dialect() as fake, engine_for(fake) as engine:
        fake.fault = "proxy"
        with pytest.raises(EngineBroke, match="proxy error: Failed to read connection"):
            await heard(engine, asking())


@pytest.mark.parametrize("status", [400, 404, 413, 422])
async def test_a_refused_request_is_a_bad_request_in_the_engines_words(fake: FakeEngine, status: int) -> None:
    words = "request (3031 tokens) exceeds the available context size (2048 tokens)"
    body = (
        {"error": words} if isinstance(fake, Ollama) else {"error": {"code": status, "message": words, "type": "exceed_context_size_error"}}
    )
    fake.refuses = (status, body)
    async with engine_for(fake) as engine:
        with pytest.raises(BadRequest, match=r"3031 tokens"):
            await heard(engine, asking())


@pytest.mark.parametrize("status", [401, 403])
async def test_a_refused_key_is_not_the_clients_fault_and_the_engines_words_stay_with_us(fake: FakeEngine, status: int) -> None:
    fake.refuses = (status, {"error": {"message": "Invalid API Key", "type": "authentication_error"}})
    async with engine_for(fake) as engine:
        with capture_logs() as logged, pytest.raises(EngineRefusesUs, match="refuses our key") as caught:
            await heard(engine, asking())
    assert "Invalid API Key" not in str(caught.value)
    assert [(each["event"], each["said"]) for each in logged] == [("engine_refused", "Invalid API Key")]


@pytest.mark.parametrize("status", [429, 503])
async def test_a_busy_engine_is_busy(fake: FakeEngine, status: int) -> None:
    fake.refuses = (status, {"error": {"message": "Loading model", "type": "unavailable_error", "code": status}})
    async with engine_for(fake) as engine:
        with pytest.raises(EngineBusy, match="Loading model"):
            await heard(engine, asking())


async def test_an_engine_that_fails_inside_is_broken(fake: FakeEngine) -> None:
    fake.refuses = (500, {"error": {"message": "out of memory", "code": 500}})
    async with engine_for(fake) as engine:
        with pytest.raises(EngineBroke, match="out of memory"):
            await heard(engine, asking())


async def test_a_refused_connection_is_unreachable(fake: FakeEngine) -> None:
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{nobody.getsockname()[1]}"
        expert = fake.expert()
        engine = build_engine(expert, f"http://{address}")
        with capture_logs() as logged, pytest.raises(EngineUnreachable, match=f"the server of {expert.name} ") as caught:
            await heard(engine, asking())
        assert "127.0.0.1" not in str(caught.value)
        assert address in logged[0]["url"]
        with pytest.raises(EngineUnreachable):
            await engine.health()
        await engine.aclose()


@pytest.mark.parametrize("fault", ["mute", "headers"])
async def test_no_first_token_in_time_is_broken(fake: FakeEngine, fault: str) -> None:
    fake.fault = fault
    async with engine_for(fake, timeouts={"first_token_seconds": 0.1}) as engine:
        with pytest.raises(EngineBroke, match="silent"):
            await heard(engine, asking())
        await asyncio.wait_for(fake.aborted.wait(), 20)


async def test_no_next_token_in_time_is_broken(fake: FakeEngine) -> None:
    fake.fault = "silent"
    pieces: list[Piece] = []
    async with engine_for(fake, timeouts={"first_token_seconds": 60, "between_tokens_seconds": 0.1}) as engine:
        with pytest.raises(EngineBroke, match=r"silent for 0\.1 s"):
            await heard(engine, asking(), pieces)
        await asyncio.wait_for(fake.aborted.wait(), 20)
    assert text_in(pieces) == "".join(TEXT[:2])


@pytest.mark.parametrize("dialect", [LlamaServer, Vllm, LlamaCompletion], ids=lambda each: each.name)
async def test_keep_alives_are_no_tokens(dialect: type[FakeEngine]) -> None:
    async with dialect() as fake, engine_for(fake, timeouts={"first_token_seconds": 0.2}) as engine:
        fake.fault = "chatter"
        with pytest.raises(EngineBroke, match="silent"):
            await heard(engine, asking())


async def test_a_slow_reader_is_not_a_silent_engine(fake: FakeEngine) -> None:
    # In many packets, so that most of the answer still lies unread while the reader is away.
    fake.fault = "bytes"
    pieces: list[Piece] = []
    async with engine_for(fake, timeouts={"between_tokens_seconds": 0.1}) as engine, aclosing(engine.stream(asking())) as stream:
        async for piece in stream:
            if not pieces:
                await asyncio.sleep(0.5)
            pieces.append(piece)
    assert text_in(pieces) == "".join(TEXT)


async def test_closing_the_iterator_stops_the_engine(fake: FakeEngine) -> None:
    fake.fault = "silent"
    async with engine_for(fake) as engine:
        stream = engine.stream(asking())
        assert isinstance(await anext(stream), Text)
        await stream.aclose()
        await asyncio.wait_for(fake.aborted.wait(), 20)
    assert fake.aborts == 1


@pytest.mark.parametrize("fault", ["mute", "silent"])
async def test_cancelling_the_reader_stops_the_engine(fake: FakeEngine, fault: str) -> None:
    fake.fault = fault
    async with engine_for(fake) as engine:
        reader = asyncio.create_task(heard(engine, asking()))
        await asyncio.wait_for(fake.asked.wait(), 20)
        reader.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reader
        await asyncio.wait_for(fake.aborted.wait(), 20)


async def test_a_connection_serves_one_answer_after_the_other(fake: FakeEngine) -> None:
    async with engine_for(fake) as engine:
        for _ in range(3):
            await heard(engine, asking())
    assert len(fake.connections) == 1


async def test_an_answer_is_done_before_its_body_ends_and_the_connection_is_kept(fake: FakeEngine) -> None:
    async with engine_for(fake) as engine:
        for _ in range(3):
            fake.fault = "held"
            fake.release.clear()
            async with aclosing(engine.stream(asking())) as stream:
                async for piece in stream:
                    if isinstance(piece, Finish):
                        fake.release.set()
    assert len(fake.connections) == 1


async def test_a_token_count_that_never_comes_does_not_hold_the_answer_up() -> None:
    class Forgetful(LlamaServer):
        def closing(self) -> Iterator[bytes]:
            yield self.chunk({}, "stop")

    async with Forgetful() as fake, engine_for(fake, timeouts={"between_tokens_seconds": 0.1}) as engine, asyncio.timeout(30):
        fake.fault = "held"
        assert (await heard(engine, asking()))[-1] == Finish("stop")


async def test_an_idle_connection_that_the_engine_gave_up_costs_nothing(fake: FakeEngine) -> None:
    async with engine_for(fake) as engine:
        await heard(engine, asking())
        fake.hangs_up = 1
        assert text_in(await heard(engine, asking())) == "".join(TEXT)


async def test_an_engine_that_always_hangs_up_is_unreachable(fake: FakeEngine) -> None:
    fake.hangs_up = 9
    async with engine_for(fake) as engine:
        with pytest.raises(EngineUnreachable):
            await heard(engine, asking())
    assert len(fake.requests) == 2


async def test_a_number_that_json_cannot_hold_is_a_bad_request(fake: FakeEngine) -> None:
    async with engine_for(fake) as engine:
        with pytest.raises(BadRequest, match="JSON"):
            await heard(engine, asking(response_format={"type": "json_object", "schema": {"type": "integer", "maximum": 2**70}}))


async def test_answers_do_not_mix(fake: FakeEngine) -> None:
    async with engine_for(fake) as engine:
        answers = await asyncio.gather(*(heard(engine, asking()) for _ in range(8)))
    assert {text_in(pieces) for pieces in answers} == {"".join(TEXT)}


async def test_reasoning_is_kept_apart(fake: FakeEngine) -> None:
    if isinstance(fake, LlamaCompletion):
        pytest.skip("a bare prompt has no place for reasoning")
    fake.reasoning = ("Rodents?", " Yes.")
    async with engine_for(fake) as engine:
        pieces = await heard(engine, asking())
    assert "".join(piece.reasoning for piece in pieces if isinstance(piece, Text)) == "Rodents? Yes."
    assert text_in(pieces) == "".join(TEXT)


async def test_tool_calls_come_in_fragments_that_add_up(fake: FakeEngine) -> None:
    fake.tokens, fake.calls, fake.reason = (), (CALL, {**CALL, "id": "call_8"}), "tool_calls"
    async with engine_for(fake, tools=True) as engine:
        if not engine.abilities.tools:
            with pytest.raises(BadRequest, match="cannot call tools"):
                await heard(engine, asking(tools=[TOOL]))
            return
        pieces = await heard(engine, asking(tools=[TOOL], tool_choice="auto"))
    fragments = [piece for piece in pieces if isinstance(piece, ToolFragment)]
    arguments = {index: "".join(each.arguments for each in fragments if each.index == index) for index in (0, 1)}
    assert [each.name for each in fragments if each.name] == ["weather", "weather"]
    assert len({each.id for each in fragments if each.id}) == 2
    assert {text.replace(" ", "") for text in arguments.values()} == {'{"city":"Bogotá"}'}
    assert pieces[-1] == Finish("tool_calls")
    assert fake.requests[-1]["tools"] == [TOOL]


async def test_a_finished_tool_call_goes_back_to_the_engine(fake: FakeEngine) -> None:
    call = {"id": "call_7", "function": {"name": "weather", "arguments": '{"city":"Bogotá"}'}}
    messages = [
        {"role": "user", "content": "weather?"},
        {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_7", "content": "rain"},
    ]
    async with engine_for(fake, tools=True) as engine:
        if not engine.abilities.tools:
            pytest.skip("no tools in this dialect")
        await heard(engine, ChatRequest.model_validate({"messages": messages, "tools": [TOOL]}))
    asked, said = fake.requests[-1]["messages"][1:]
    if isinstance(fake, Ollama):
        assert asked["tool_calls"] == [{"function": {"name": "weather", "arguments": {"city": "Bogotá"}}}]
        assert said == {"role": "tool", "content": "rain", "tool_name": "weather"}
    else:
        assert asked == {"role": "assistant", "tool_calls": [{**call, "type": "function"}]}
        assert said == {"role": "tool", "tool_call_id": "call_7", "content": "rain"}


async def test_images_reach_whoever_can_see(fake: FakeEngine) -> None:
    picture = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{PIXEL}"}}
    request = ChatRequest.model_validate({"messages": [{"role": "user", "content": [{"type": "text", "text": "What?"}, picture]}]})
    async with engine_for(fake, modalities=("text", "image")) as engine:
        if not engine.abilities.images:
            with pytest.raises(BadRequest, match="cannot see"):
                await heard(engine, request)
            return
        await heard(engine, request)
    message = fake.requests[-1]["messages"][0]
    if isinstance(fake, Ollama):
        assert message == {"role": "user", "content": "What?", "images": [PIXEL]}
    else:
        assert message["content"][1]["image_url"]["url"].endswith(PIXEL)


async def test_an_image_for_the_blind_is_refused_not_dropped(fake: FakeEngine) -> None:
    picture = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{PIXEL}"}}
    async with engine_for(fake) as engine:
        with pytest.raises(BadRequest, match="cannot see images"):
            await heard(engine, ChatRequest.model_validate({"messages": [{"role": "user", "content": [picture]}]}))
    assert not fake.requests


async def test_an_answer_is_continued_where_it_stopped(fake: FakeEngine) -> None:
    begun = "".join(TEXT[:2])
    messages = [{"role": "user", "content": "¿Qué?"}, {"role": "assistant", "content": begun}]
    async with engine_for(fake) as engine:
        if not engine.abilities.prefill:
            pytest.skip("this dialect does not promise to continue")
        pieces = await heard(engine, ChatRequest.model_validate({"messages": messages}))
    assert begun + text_in(pieces) == "".join(TEXT)


async def test_sampling_is_the_requests_then_the_experts(fake: FakeEngine) -> None:
    expert = {"temperature": 0.1, "top_k": 7, "repeat_penalty": 1.1, "stop": ["END"]}
    async with engine_for(fake, sampling=expert) as engine:
        await heard(engine, asking(sampling={"temperature": 0.9, "max_tokens": 33}))
    body = fake.requests[-1]
    options = body.get("options", body)
    assert (options["temperature"], options["top_k"], options["stop"][-1]) == (0.9, 7, "END")
    limit = {"llama_completion": "n_predict", "ollama": "num_predict"}.get(fake.name, "max_tokens")
    penalty = "repetition_penalty" if fake.name == "vllm" else "repeat_penalty"
    assert (options[limit], options[penalty]) == (33, 1.1)


async def test_a_key_is_a_bearer_token_and_nothing_is_compressed(fake: FakeEngine) -> None:
    async with engine_for(fake, api_key="sk-secret") as engine:
        await heard(engine, asking())
    assert fake.headers[-1]["Authorization"] == "Bearer sk-secret"
    assert fake.headers[-1]["Accept-Encoding"] == "identity"


async def test_health_tells_ready_from_loading(fake: FakeEngine) -> None:
    async with engine_for(fake) as engine:
        await engine.health()
        fake.ready = 503
        with pytest.raises(EngineBusy):
            await engine.health()
        fake.ready = 500
        with pytest.raises(EngineUnreachable):
            await engine.health()
