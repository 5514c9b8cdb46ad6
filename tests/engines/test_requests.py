"""What a dialect is asked, and how an answer of another shape is taken."""

from typing import Any

import orjson
import pytest
from pydantic import ValidationError

from capibara_flow.domain.fleet import Expert
from capibara_flow.domain.sampling import chosen
from capibara_flow.engines.build import build_engine, build_expert
from capibara_flow.engines.http import HttpChat, error_text, refusal
from capibara_flow.engines.llama_completion import CompletionReading, LlamaCompletion
from capibara_flow.engines.ollama import OllamaChat
from capibara_flow.engines.openai_chat import OpenAIChat, OpenAIReading
from capibara_flow.engines.pool import Pool
from capibara_flow.errors import BadRequest, EngineBroke, EngineBusy, EngineRefusesUs, EngineUnreachable
from capibara_flow.ports import Finish, Piece, Tally, Text
from topics.chat import ChatRequest, Sampling

URL = "http://engine:8000"
SCHEMA = {"type": "object", "properties": {"n": {"type": "integer"}}}
FULL = Sampling(
    temperature=0.5, top_p=0.5, top_k=5, max_tokens=5, repeat_penalty=1.5, presence_penalty=1, frequency_penalty=1, seed=1, stop=("x",)
)


def expert(dialect: str, **changes: Any) -> Expert:
    return Expert.model_validate({"name": "e", "dialect": dialect, "urls": (URL,), **changes})


def request(*roles: str, **fields: Any) -> ChatRequest:
    return ChatRequest.model_validate({"messages": [{"role": role, "content": "hi"} for role in roles or ("user",)], **fields})


def body(dialect: str, asked: ChatRequest, **changes: Any) -> dict[str, Any]:
    engine = build_engine(expert(dialect, **changes), URL)
    assert isinstance(engine, HttpChat)
    return engine.body(asked)


def test_later_samplings_win_and_silence_does_not() -> None:
    merged = chosen(Sampling(temperature=0.1, top_k=3, stop=("a",)), Sampling(temperature=0.9))
    assert merged == {"temperature": 0.9, "top_k": 3, "stop": ["a"]}


def test_plain_openai_gets_standard_fields_only() -> None:
    standard = {"model", "messages", "stream", "stream_options", "temperature", "top_p", "max_tokens", "seed", "stop"}
    asked = request("user", "assistant", sampling=FULL)
    assert set(body("openai", asked)) == standard | {"presence_penalty", "frequency_penalty"}


@pytest.mark.parametrize("dialect", ["llama_server", "vllm"])
def test_a_continuation_carries_both_flags(dialect: str) -> None:
    flags = {"continue_final_message": True, "add_generation_prompt": False}
    assert flags.items() <= body(dialect, request("user", "assistant")).items()
    assert not flags.keys() & body(dialect, request("user")).keys()


def test_a_scripted_expert_continues_whatever_its_dialect() -> None:
    engine = build_engine(expert("openai", scripted=True), URL)
    assert engine.abilities.prefill
    assert body("openai", request("user", "assistant"), scripted=True)["continue_final_message"] is True
    assert not build_engine(expert("openai"), URL).abilities.prefill


@pytest.mark.parametrize(
    ("base", "chat"),
    [
        ("http://h:1", "http://h:1/v1/chat/completions"),
        ("http://h:1/v1", "http://h:1/v1/chat/completions"),
        ("http://v1", "http://v1/v1/chat/completions"),
        ("http://h/openai/v1/", "http://h/openai/v1/chat/completions"),
        ("http://h/v1beta/openai", "http://h/v1beta/openai/chat/completions"),
    ],
)
def test_an_address_may_or_may_not_end_in_its_version(base: str, chat: str) -> None:
    assert OpenAIChat(expert("openai"), base).chat_url == chat


def test_health_is_asked_where_the_dialect_has_it() -> None:
    assert OpenAIChat(expert("vllm"), "http://h/v1").health_url == "http://h/health"
    assert OpenAIChat(expert("openai"), "http://h/v1").health_url == "http://h/v1/models"
    assert OllamaChat(expert("ollama"), "http://h/api").health_url == "http://h/api/version"
    assert LlamaCompletion(expert("llama_completion"), "http://h/v1").chat_url == "http://h/completion"


def test_completion_has_defaults_of_its_own_and_the_templates_stops() -> None:
    asked = body("llama_completion", request())
    assert (asked["temperature"], asked["top_p"], asked["repeat_penalty"], asked["n_predict"]) == (0.7, 0.9, 1.2, 200)
    assert "<|im_end|>" in asked["stop"]
    assert body("llama_completion", request(), sampling={"max_tokens": 5})["n_predict"] == 5


def test_a_schema_goes_where_the_dialect_wants_it() -> None:
    wanted = {"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA}}
    asked = request(response_format=wanted)
    assert body("vllm", asked)["response_format"] == wanted
    assert body("llama_completion", asked)["json_schema"] == SCHEMA
    assert body("ollama", asked)["format"] == SCHEMA
    assert body("ollama", request(response_format={"type": "json_object"}))["format"] == "json"
    assert "format" not in body("ollama", request(response_format={"type": "text"}))


def test_ollama_refuses_what_it_cannot_express() -> None:
    with pytest.raises(BadRequest, match="tool_choice"):
        body("ollama", request(tools=[{"type": "function"}], tool_choice="required"))
    assert "tools" not in body("ollama", request(tools=[{"type": "function"}], tool_choice="none"))
    far = {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "https://h/x.png"}}]}
    with pytest.raises(BadRequest, match="inline"):
        body("ollama", ChatRequest.model_validate({"messages": [far]}))


def test_ollama_gets_broken_arguments_as_they_are() -> None:
    call = {"id": "c", "function": {"name": "f", "arguments": '{"a": '}}
    asked = ChatRequest.model_validate({"messages": [{"role": "assistant", "tool_calls": [call]}, {"role": "tool", "content": "?"}]})
    assert body("ollama", asked)["messages"][0]["tool_calls"][0]["function"]["arguments"] == {"unreadable": '{"a": '}


def test_every_expert_is_a_pool_of_its_addresses() -> None:
    several, one = build_expert(expert("vllm", urls=(URL, URL + "0"))), build_expert(expert("vllm"))
    assert isinstance(several, Pool)
    assert [len(each.facts()["replicas"]) for each in (several, one)] == [2, 1]
    with pytest.raises(ValueError, match="no address"):
        build_expert(Expert.model_validate({"name": "e", "weights": "w", "launch": {"engine": "vllm"}}))


def test_errors_are_read_in_every_form() -> None:
    bodies = [b'{"error":{"message":"no"}}', b'{"error":"no"}', b'{"message":"no"}', b'{"detail":"no"}', b" no "]
    assert {error_text(each) for each in bodies} == {"no"}
    assert error_text(b"") == "no reason given"


@pytest.mark.parametrize(
    ("status", "error"),
    [
        (302, EngineUnreachable),
        (502, EngineUnreachable),
        (504, EngineUnreachable),
        (529, EngineBusy),
        (401, EngineRefusesUs),
        (403, EngineRefusesUs),
        (500, EngineBroke),
        (418, BadRequest),
    ],
)
def test_other_statuses(status: int, error: type[Exception]) -> None:
    refused = refusal(status, b"x", "small")
    assert (type(refused), "small" in str(refused)) == (error, True)


def test_what_an_engine_does_not_support_is_a_bad_request_even_as_500() -> None:
    assert type(refusal(500, b'{"error":{"code":500,"message":"image input is not supported"}}', "e")) is BadRequest
    assert EngineRefusesUs.status == 502


@pytest.mark.parametrize("url", ["http://user:hunter2@h:1/v1", "https://hunter2@h", "http://h:1@hunter2", "user:hunter2@h"])
def test_a_secret_in_an_address_is_refused_and_not_repeated(url: str) -> None:
    with pytest.raises(ValidationError, match="api_key") as caught:
        expert("openai", urls=(url,))
    assert "hunter2" not in caught.value.errors()[0]["msg"]


def test_an_at_sign_behind_the_host_is_no_secret() -> None:
    assert expert("openai", urls=("http://h:1/models/@cf/small",)).urls == ("http://h:1/models/@cf/small",)


def read(reading: OpenAIReading | CompletionReading, *frames: dict[str, Any] | bytes) -> list[Piece]:
    raw = [frame if isinstance(frame, bytes) else orjson.dumps(frame) for frame in frames]
    return [*reading.pieces(raw), *reading.end()]


def chunk(text: str | None = None, reason: str | None = None, **fields: Any) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": {"content": text}, "finish_reason": reason}], **fields}


def test_a_finish_reason_is_enough_without_usage_and_done() -> None:
    assert read(OpenAIReading(), chunk("a", "stop")) == [Text("a"), Finish("stop")]


def test_usage_may_come_with_every_chunk() -> None:
    usages = [{"prompt_tokens": 3, "completion_tokens": n} for n in (1, 2)]
    pieces = read(OpenAIReading(), chunk("a", usage=usages[0]), chunk("b", "stop", usage=usages[1]))
    assert pieces == [Text("a"), Text("b"), Tally(3, 2), Finish("stop")]


@pytest.mark.parametrize(
    "frame",
    [
        b"{not json",
        b"[]",
        b'"text"',
        b'{"choices":{}, "error":"x"}',
        b'{"choices":[7]}',
        b'{"choices":[{"delta":{"content":[1]}}]}',
        b'{"object":"error","message":"old vLLM","code":400}',
        b'{"choices":[{"delta":{},"finish_reason":"error"}]}',
        b'{"choices":[{"delta":{},"finish_reason":"abort"}]}',
        b'{"choices":[{"delta":{"tool_calls":[null]}}]}',
        b"[DONE]",
    ],
)
def test_what_is_not_an_answer_breaks_after_what_was_said(frame: bytes) -> None:
    reading = OpenAIReading()
    assert reading.pieces([orjson.dumps(chunk("before")), frame]) == [Text("before")]
    with pytest.raises(EngineBroke):
        reading.end()


def test_nothing_counts_after_done() -> None:
    assert read(OpenAIReading(), chunk("a", "stop"), b"[DONE]", chunk("b")) == [Text("a"), Finish("stop")]


def test_an_error_after_the_finish_reason_is_an_error() -> None:
    with pytest.raises(EngineBroke, match="late"):
        read(OpenAIReading(), chunk("a", "stop"), {"error": {"message": "late"}})


def test_old_llama_servers_say_stopped_limit() -> None:
    assert read(CompletionReading(), {"content": "a", "stop": True, "stopped_limit": True}) == [Text("a"), Tally(0, 0), Finish("length")]
