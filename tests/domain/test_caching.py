"""What may be given again, and to whom: a key changes with all that decides on an answer, and with nothing else."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from capibara_flow.domain.caching import LARGEST, CachedAnswer, Recording, cache_key
from capibara_flow.domain.fleet import Expert
from capibara_flow.ports import Finish, Load, Piece, Tally, Text, ToolFragment
from topics.chat import ChatRequest, Sampling

COOL = Sampling(temperature=0)
PIXEL = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}}
TOOL = {"type": "function", "function": {"name": "weather"}}
ANY_TEXT = st.text(st.characters(exclude_categories=()), max_size=20)


def expert(**fields: object) -> Expert:
    return Expert.model_validate({"name": "phi", "urls": ["http://127.0.0.1:1"], "sampling": COOL, **fields})


def asking(text: str = "hola", **fields: object) -> ChatRequest:
    return ChatRequest.model_validate({"messages": [{"role": "user", "content": text}], **fields})


def key(
    request: ChatRequest | None = None, tenant: str = "acme", who: Expert | None = None, warmest: float = 0, grounded: bool = False
) -> str | None:
    return cache_key(tenant, who or expert(), request or asking(), warmest=warmest, grounded=grounded)


def test_a_key_says_nothing_and_is_safe_in_a_subject() -> None:
    found = key()
    assert found is not None
    assert len(bytes.fromhex(found)) == 32


@pytest.mark.parametrize(
    "other",
    [
        {"tenant": "evil"},
        {"who": expert(name="phi2")},
        {"who": expert(model="phi-4")},
        {"who": expert(template="mistral")},
        {"who": expert(sampling=Sampling(temperature=0, max_tokens=7))},
        {"request": asking("Hola")},
        {"request": asking("hola ")},
        {"request": asking(sampling={"max_tokens": 5})},
        {"request": asking(sampling={"seed": 5})},
        {"request": asking(sampling={"stop": ["a"]})},
        {"request": asking(response_format={"type": "json_object"})},
        {"request": asking(messages=[{"role": "system", "content": "hola"}])},
        {"request": asking(messages=[{"role": "system", "content": "be brief"}, {"role": "user", "content": "hola"}])},
        {"request": asking(messages=[{"role": "user", "content": "hola", "name": "ana"}])},
    ],
)
def test_what_decides_on_an_answer_decides_on_its_key(other: dict[str, object]) -> None:
    assert key(**other) not in {None, key()}  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "same",
    [
        {"request": asking(model="phi")},
        {"request": asking(sampling={"temperature": 0})},
        {"who": expert(urls=["http://127.0.0.1:2"], concurrency=9, price={"prompt": 3}, priority=7)},
        {"warmest": 0.5},
    ],
)
def test_what_does_not_matter_does_not(same: dict[str, object]) -> None:
    assert key(**same) == key()  # type: ignore[arg-type]


def test_stops_may_come_in_any_order() -> None:
    assert key(asking(sampling={"stop": ["a", "b"]})) == key(asking(sampling={"stop": ["b", "a"]}))


@pytest.mark.parametrize(
    "request_",
    [
        asking(tools=[TOOL]),
        asking(messages=[{"role": "user", "content": [{"type": "text", "text": "hola"}, PIXEL]}]),
        asking(messages=[{"role": "tool", "content": "5", "tool_call_id": "c"}, {"role": "user", "content": "hola"}]),
        asking(
            messages=[
                {"role": "assistant", "tool_calls": [{"id": "c", "function": {"name": "f", "arguments": "{}"}}]},
                {"role": "user", "content": "hola"},
            ]
        ),
    ],
    ids=["tools", "image", "a tool's answer", "a tool call"],
)
def test_turns_with_tools_or_images_have_no_key(request_: ChatRequest) -> None:
    assert key(request_, warmest=2) is None


def test_turns_with_sources_have_no_key() -> None:
    assert key(grounded=True) is None


@pytest.mark.parametrize(
    ("asked", "default", "warmest", "kept"),
    [
        (0.3, None, 0.3, True),
        (0.31, None, 0.3, False),
        (None, 0.2, 0.3, True),
        (None, 0.9, 0.3, False),
        (0.1, 0.9, 0.3, True),
        (0.9, 0.1, 0.3, False),
        (None, None, 0.9, False),
        (None, None, 1.0, True),
    ],
)
def test_only_cool_answers_are_kept(asked: float | None, default: float | None, warmest: float, kept: bool) -> None:
    found = key(asking(sampling={"temperature": asked}), who=expert(sampling=Sampling(temperature=default)), warmest=warmest)
    assert (found is not None) is kept


@given(st.lists(st.tuples(st.sampled_from(["user", "assistant"]), ANY_TEXT), min_size=1, max_size=4), ANY_TEXT)
def test_conversations_that_differ_have_keys_that_differ(said: list[tuple[str, str]], more: str) -> None:
    messages = [{"role": role, "content": text} for role, text in said]
    before, after = (asking(messages=each) for each in (messages, [*messages, {"role": "user", "content": more}]))
    assert key(before) == key(before.model_copy())
    assert key(before) != key(after)


# --- recording -----------------------------------------------------------------------------------------------


def recorded(*pieces: Piece) -> CachedAnswer | None:
    recording = Recording()
    for piece in pieces:
        recording.take(piece)
    return recording.answer


def test_an_answer_is_said_again_as_it_was() -> None:
    answer = recorded(Load(3), Text(reasoning="hm"), Text(reasoning="m"), Text("Hola"), Text(" mundo"), Tally(5, 7), Finish("stop"))
    assert answer is not None
    assert answer.pieces() == (Text(reasoning="hmm"), Text("Hola mundo"), Tally(5, 7), Finish("stop"))


def test_where_the_engine_did_not_count_pieces_stand_in() -> None:
    answer = recorded(Text("a"), Text("b"), Finish("stop"))
    assert answer is not None
    assert answer.completion_tokens == 2


@pytest.mark.parametrize(
    "pieces",
    [
        (),
        (Text("a"),),
        (Text("a"), Finish("length")),
        (Text("a"), Finish("content_filter")),
        (Text("a"), ToolFragment(0, name="f"), Finish("stop")),
        (Text("a" * LARGEST), Text("a"), Finish("stop")),
    ],
    ids=["nothing", "broken off", "cut", "filtered", "a call", "too long"],
)
def test_what_is_not_whole_is_not_kept(pieces: tuple[Piece, ...]) -> None:
    assert recorded(*pieces) is None


@given(st.lists(st.builds(Text, ANY_TEXT, ANY_TEXT)), st.integers(0, 2**31))
def test_what_is_kept_can_be_read_or_is_no_answer(said: list[Text], tokens: int) -> None:
    answer = recorded(*said, Tally(tokens, tokens), Finish("stop"))
    assert answer is not None
    body = answer.body()
    assert body is not None
    whole = "".join(each.text + each.reasoning for each in said)
    readable = not any("\ud800" <= letter <= "\udfff" for letter in whole)
    assert CachedAnswer.of(body) == (answer if readable else None)


def test_what_is_too_large_has_no_body() -> None:
    assert CachedAnswer(text="é" * (LARGEST // 2), finish_reason="stop").body() is None


@given(st.binary(max_size=60))
def test_what_is_no_answer_of_ours_is_none(body: bytes) -> None:
    assert CachedAnswer.of(body) is None
    assert CachedAnswer.of(b'{"text": "a", "finish_reason": "stop", "other": 1}') is None
