"""What the door refuses, in both dialects: the right status, the right shape, words that help, and nothing is published."""

import json
import re
from collections.abc import AsyncIterator
from typing import Any

import pytest
from aiohttp import ClientResponse, ClientSession

from capibara_flow.settings import EdgeSettings
from tests.edge.serving import ANSWER, client
from tests.fakes import FakeTurns

NATIVE, OPENAI = "/api/chat", "/v1/chat/completions"
IMAGE = [{"type": "text", "text": "what is it?"}, {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}}]
TOOLS = [{"type": "function", "function": {"name": "weather"}}]
OPENAI_TYPES = {
    400: "invalid_request_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    413: "invalid_request_error",
}


@pytest.fixture
def turns() -> FakeTurns:
    return FakeTurns(*ANSWER)


@pytest.fixture
async def session(turns: FakeTurns) -> AsyncIterator[ClientSession]:
    async with client(turns, EdgeSettings(max_messages=3, max_body_bytes=20_000)) as session:
        yield session


async def refused(response: ClientResponse) -> tuple[int, str]:
    """Status and words of an error in the shape of its dialect."""
    body = await response.json(content_type=None)
    if response.url.path.startswith("/v1/"):
        assert response.content_type == "application/json"
        assert set(body) == {"error"}
        assert set(body["error"]) == {"message", "type", "param", "code"}
        assert body["error"]["type"] == OPENAI_TYPES[response.status]
        return response.status, body["error"]["message"]
    assert response.content_type == "application/problem+json"
    assert set(body) == {"type", "title", "status", "detail"}
    assert body["status"] == response.status
    return response.status, body["detail"]


def user(content: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": content}]}


Body = bytes | dict[str, Any]
Case = tuple[str, Body, int, str]
BOTH: list[tuple[Body, int, str]] = [
    (b"", 400, "the body is empty"),
    (b"  \n ", 400, "the body is empty"),
    (b"{}", 400, "messages"),
    (b"[]", 400, "object"),
    (b"null", 400, "object"),
    (b'"x"', 400, "object"),
    (b"{", 400, "Invalid JSON"),
    (b'{"messages": [}', 400, "Invalid JSON"),
    (b'{"messages": [{"role": "user", "content": "\xff\xfe"}]}', 400, "Invalid JSON"),
    (b'{"messages": [{"role": "user", "content": "\\ud800"}]}', 400, "Invalid JSON"),
    (b'{"messages": ' + b"[" * 2000 + b"]" * 2000 + b"}", 400, "recursion limit"),
    ({"messages": []}, 400, "message"),
    ({"messages": "hello"}, 400, "messages: must be a valid array"),
    ({"messages": ["hello"]}, 400, "messages.0: must be an object"),
    ({"messages": [{"content": "x"}]}, 400, "messages.0.role: Field required"),
    ({"messages": [{"role": "king", "content": "x"}]}, 400, "messages.0.role: must be 'system', "),
    ({"messages": [{"role": "user", "content": 1}]}, 400, "messages.0.content: must be a valid array or a valid string"),
    (user(""), 400, "empty"),
    (user(" \n\t"), 400, "empty"),
    (user(None), 400, "empty"),
    (user([]), 400, "empty"),
    (user([{"type": "audio"}]), 400, "messages.0.content.0: type must be one of 'text', 'image_url'"),
    (user([{}]), 400, "messages.0.content.0: type must be given"),
    (user([{"type": "text", "text": 5}]), 400, "messages.0.content.0.text: must be a valid string"),
    (user([{"type": "image_url"}]), 400, "messages.0.content.0.image_url: Field required"),
    (user([{"type": "image_url", "image_url": {"url": 5}}]), 400, "messages.0.content.0.image_url.url: must be a valid string"),
    ({"messages": [{"role": "assistant", "content": "only me"}]}, 400, "empty"),
    ({"messages": [{"role": "user", "content": "x"}] * 4}, 400, "4 messages are too many; the limit is 3"),
    ({**user("x"), "model": 1}, 400, "model"),
    ({**user("x"), "model": "gpt-4"}, 404, "no expert is called 'gpt-4'; there are: auto, plain, painter"),
    ({**user("x"), "model": "retired"}, 404, "no expert is called 'retired'"),
    ({**user(IMAGE), "model": "plain"}, 400, "plain does not take images"),
    ({**user(IMAGE), "model": "plain", "stream": True}, 400, "plain does not take images"),
    ({**user("x"), "model": "painter", "tools": TOOLS}, 400, "painter does not take tools"),
    ({**user("x"), "model": "painter", "tools": TOOLS, "stream": True}, 400, "painter does not take tools"),
    ({**user("x"), "model": "painter", "tools": TOOLS, "stream": False}, 400, "painter does not take tools"),
    ({**user(IMAGE), "tools": TOOLS}, 400, "no expert of this fleet takes images and tools"),
    ({**user("x"), "stream": "yes"}, 400, "stream"),
    ({**user("x"), "stream": 1}, 400, "stream"),
    ({**user("x"), "tools": {}}, 400, "tools"),
    ({**user("x"), "tools": ["x"]}, 400, "tools"),
    (user("x" * 20_000), 413, "larger than 20000 bytes"),
]
NATIVE_ONLY: list[tuple[Body, int, str]] = [
    ({"message": ""}, 400, "the message is empty"),
    ({"message": 5}, 400, "message"),
    ({"message": None}, 400, "give either 'message' or 'messages'"),
    ({"message": "x", "messages": []}, 400, "give either 'message' or 'messages'"),
    ({"message": "x", "colour": "red"}, 400, "colour: Extra inputs are not permitted"),
    ({"message": "x", "sampling": {"temperature": 2.1}}, 400, "sampling.temperature"),
    ({"message": "x", "sampling": {"temperature": "0.5"}}, 400, "sampling.temperature"),
    ({"message": "x", "sampling": {"temprature": 0.5}}, 400, "sampling.temprature"),
    ({"message": "x", "sampling": {"max_tokens": 0}}, 400, "sampling.max_tokens"),
    ({"message": "x", "sampling": {"max_tokens": 2**31}}, 400, "sampling.max_tokens: must be less than or equal to 2147483647"),
    ({"message": "x", "sampling": {"top_k": 2**31}}, 400, "sampling.top_k"),
    ({"message": "x", "sampling": {"seed": 2**63}}, 400, "sampling.seed: must be less than or equal to 9223372036854775807"),
    ({"message": "x", "sampling": {"seed": -(2**63) - 1}}, 400, "sampling.seed"),
    (b'{"message": "x", "sampling": {"repeat_penalty": 1e999}}', 400, "sampling.repeat_penalty: must be a finite number"),
    (b'{"message": "x", "sampling": {"temperature": NaN}}', 400, "sampling.temperature"),
]
OPENAI_ONLY: list[tuple[Body, int, str]] = [
    ({**user("x"), "temperature": -0.1}, 400, "temperature"),
    ({**user("x"), "temperature": 3}, 400, "temperature"),
    ({**user("x"), "top_p": 0}, 400, "top_p"),
    ({**user("x"), "n": 2}, 400, "n: must be 1"),
    ({**user("x"), "logprobs": True}, 400, "logprobs"),
    ({**user("x"), "max_tokens": 0}, 400, "max_tokens"),
    ({**user("x"), "max_tokens": 1.5}, 400, "max_tokens"),
    ({**user("x"), "max_tokens": 10**30}, 400, "max_tokens: must be less than"),
    ({**user("x"), "max_completion_tokens": 2**31}, 400, "max_completion_tokens: must be less than"),
    ({**user("x"), "seed": 2**63}, 400, "seed: must be less than"),
    ({**user("x"), "seed": -(10**4000)}, 400, "seed: must be greater than"),
    ({**user("x"), "top_k": 10**20}, 400, "top_k: must be less than"),
    ({**user("x"), "stop": ["x"] * 17}, 400, "stop: must have at most 16 items"),
    ({**user("x"), "stop": 5}, 400, "stop: must be a valid array or a valid string"),
    ({**user("x"), "tool_choice": 5}, 400, "tool_choice: must be a valid string or an object"),
]
CASES: list[Case] = [
    *((path, *case) for path in (NATIVE, OPENAI) for case in BOTH),
    *((NATIVE, *case) for case in NATIVE_ONLY),
    *((OPENAI, *case) for case in OPENAI_ONLY),
]


#: How our own language, and its libraries, would say it.
_OURS = re.compile(r"Value error|[Tt]uple|tagged|union|dict\[|\bstr\b|OpenAI|Part\b|Input|validation|discriminator")


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[0]} {case[1]!s:.60}")
async def test_a_bad_request_is_refused_with_words_that_help(session: ClientSession, turns: FakeTurns, case: Case) -> None:
    path, body, status, words = case
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    async with session.post(path, data=data) as response:
        got, said = await refused(response)
    assert got == status, said
    assert words in said
    assert not _OURS.search(said), said
    assert turns.opened == []


@pytest.mark.parametrize("path", [NATIVE, OPENAI])
async def test_a_body_that_is_not_encoded_as_it_says_is_the_client_s_fault(session: ClientSession, path: str) -> None:
    async with session.post(path, data=b"no deflate", headers={"Content-Encoding": "deflate"}) as response:
        status, said = await refused(response)
    assert (status, "cannot be read" in said) == (400, True)


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", NATIVE, 405),
        ("PUT", NATIVE, 405),
        ("GET", OPENAI, 405),
        ("DELETE", "/v1/models", 405),
        ("OPTIONS", NATIVE, 405),
        ("GET", "/nowhere", 404),
        ("GET", "/v1/nowhere", 404),
        ("POST", "/v1/embeddings", 404),
        ("GET", "/page/../app.py", 404),
        ("GET", "/page/%2e%2e/app.py", 404),
    ],
)
async def test_paths_and_methods_that_are_not_there(session: ClientSession, method: str, path: str, status: int) -> None:
    async with session.request(method, path) as response:
        assert (await refused(response))[0] == status
        assert ("Allow" in response.headers) == (status == 405)


GOOD: list[tuple[str, Body]] = [
    (NATIVE, {"message": "NUL \0, emoji \U0001f9ab, right-to-left \u202e, line \u2028"}),
    (NATIVE, b'{"message": "\\ud83e\\uddab"}'),
    (NATIVE, {"message": "x", "sampling": {"temperature": 0, "stop": ["a"]}, "model": "auto", "stream": False}),
    (NATIVE, {**user(IMAGE)}),
    (NATIVE, {**user("x"), "tools": [{"deep": json.loads("[" * 150 + "]" * 150)}]}),
    (NATIVE, {"message": "x", "sampling": {"seed": -(2**63), "max_tokens": 2**31 - 1}}),
    (OPENAI, {**user("x"), "seed": 2**63 - 1, "max_tokens": 2**31 - 1}),
    (OPENAI, {**user("x"), "stop": "\n", "temperature": 1}),
    (OPENAI, {**user("x"), "stop": ["a", "b"]}),
    (OPENAI, {**user("x"), "stop": None, "n": None, "stream": None, "tools": None, "max_tokens": None, "logprobs": False}),
    (OPENAI, {**user("x"), "user": "ann", "metadata": {}, "parallel_tool_calls": False, "unknown": [1]}),
    (OPENAI, user([{"type": "text", "text": "x", "cache_control": {"type": "ephemeral"}}])),
    (
        OPENAI,
        {
            "messages": [
                {"role": "developer", "content": "be short"},
                {
                    "role": "assistant",
                    "content": None,
                    "refusal": None,
                    "tool_calls": [{"index": 0, "id": "a", "type": "function", "function": {"name": "f", "arguments": "{", "x": 1}}],
                },
                {"role": "tool", "tool_call_id": "a", "content": "rain"},
            ]
        },
    ),
]


@pytest.mark.parametrize(("path", "body"), GOOD, ids=lambda each: str(each)[:60])
async def test_what_looks_odd_but_is_allowed(session: ClientSession, turns: FakeTurns, path: str, body: Body) -> None:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    async with session.post(path, data=data) as response:
        assert response.status == 200, await response.text()
        await response.read()
    assert len(turns.opened) == 1


async def test_what_is_wrong_in_a_conversation_without_messages(session: ClientSession) -> None:
    async with session.post(OPENAI, json={"messages": []}) as response:
        assert (await refused(response))[1] == "messages: must have at least 1 item"
    async with session.post(NATIVE, data=b"[]") as response:
        assert (await refused(response))[1] == "the body must be an object"


OURS = "http://ours.example:5001"


@pytest.mark.parametrize(("method", "path"), [("POST", NATIVE), ("POST", OPENAI), ("DELETE", f"{NATIVE}/x")])
@pytest.mark.parametrize("origin", ["https://evil.example", "null", "", "http://ours.example", "http://ours.example:5001.evil.example"])
async def test_a_page_of_somebody_else_does_nothing_here(
    session: ClientSession, turns: FakeTurns, method: str, path: str, origin: str
) -> None:
    for kind in ("text/plain", "application/json"):
        headers = {"Origin": origin, "Content-Type": kind, "Host": OURS.removeprefix("http://"), "Sec-Fetch-Site": "cross-site"}
        async with session.request(method, path, data=json.dumps(user("x")), headers=headers) as response:
            status, said = await refused(response)
        assert (status, "pages of this origin" in said) == (403, True)
    assert turns.opened == []
    assert turns.cancelled == []


@pytest.mark.parametrize("path", [NATIVE, OPENAI])
@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Content-Type": "application/x-www-form-urlencoded"},  # as curl -d says
        {"Origin": OURS},
        {"Origin": OURS.replace("http:", "https:")},  # behind a proxy that speaks TLS for us
        {"Origin": "https://chat.example", "Sec-Fetch-Site": "same-origin"},  # and one that has another name for us
        {"Origin": "http://localhost:8000", "Sec-Fetch-Site": "cross-site"},  # one of edge.origins
    ],
    ids=str,
)
async def test_our_own_page_and_whoever_is_no_page_may_ask(session: ClientSession, path: str, headers: dict[str, str]) -> None:
    headers = {"Host": OURS.removeprefix("http://"), **headers}
    async with session.post(path, data=json.dumps(user("x")), headers=headers) as response:
        assert response.status == 200


async def test_words_arrive_as_they_were_sent(session: ClientSession, turns: FakeTurns) -> None:
    words = 'NUL \0, emoji \U0001f9ab, \u202e, \u2028, \\, " and \x7f'
    async with session.post(NATIVE, json={"message": words}) as response:
        assert response.status == 200
        await response.read()
    assert turns.opened[0][0].request.question == words


async def test_sampling_of_both_dialects_means_the_same(session: ClientSession, turns: FakeTurns) -> None:
    native = {"temperature": 0.5, "max_tokens": 7, "repeat_penalty": 1.1, "stop": ["a"], "seed": 1, "top_k": 3}
    async with session.post(NATIVE, json={"message": "x", "sampling": native}) as response:
        await response.read()
    theirs = {"temperature": 0.5, "max_completion_tokens": 7, "repetition_penalty": 1.1, "stop": "a", "seed": 1, "top_k": 3}
    async with session.post(OPENAI, json={**user("x"), **theirs}) as response:
        await response.read()
    assert turns.opened[0][0].request == turns.opened[1][0].request
