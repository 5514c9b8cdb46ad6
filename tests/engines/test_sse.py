"""Cutting bytes into frames must not depend on how the network cuts them."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from capibara_flow.engines import sse
from capibara_flow.engines.sse import FrameTooLong, LineDecoder, SseDecoder

LINES = st.sampled_from(
    [b"data: a", b"data:b", b"data", b": ping", b":", b"event: x", b"id: 1", b"proxy error: gone", b"data: \xf0\x9f\xa6\xab", b""]
)
STREAMS = st.lists(st.tuples(LINES, st.sampled_from([b"\n", b"\r\n", b"\r", b"\n\n"])), max_size=30).map(
    lambda lines: b"".join(part for line in lines for part in line)
)


def cut(stream: bytes, at: list[int]) -> list[bytes]:
    edges = [0, *sorted({each % (len(stream) + 1) for each in at}), len(stream)]
    return [stream[a:b] for a, b in itertools.pairwise(edges)]


def by_the_book(stream: bytes) -> list[bytes]:
    """The algorithm of the standard, line by line; at the end of the stream an event counts even without its blank line."""
    events: list[bytes] = []
    data: list[bytes] = []
    for line in [*stream.replace(b"\r\n", b"\n").replace(b"\r", b"\n").split(b"\n"), b""]:
        if not line:
            events += [b"\n".join(data)] if data else []
            data = []
        elif line.partition(b":")[0] == b"data":
            data.append(line.partition(b":")[2].removeprefix(b" "))
    return events


@given(STREAMS, st.lists(st.integers(0, 500), max_size=40))
def test_any_cut_gives_the_events_of_the_standard(stream: bytes, at: list[int]) -> None:
    decoder = SseDecoder()
    events = [event for chunk in cut(stream, at) for event in decoder.feed(chunk)]
    assert events + decoder.end() == by_the_book(stream)


@given(st.lists(st.binary(max_size=20).map(lambda line: line.replace(b"\n", b"")), max_size=20), st.lists(st.integers(0, 500), max_size=20))
def test_lines_survive_any_cut(lines: list[bytes], at: list[int]) -> None:
    decoder = LineDecoder()
    found = [line for chunk in cut(b"\n".join(lines), at) for line in decoder.feed(chunk)]
    assert found + decoder.end() == [line for line in lines if line.strip()]


def test_an_event_is_there_as_soon_as_its_blank_line_is() -> None:
    for blank in (b"\n\n", b"\r\n\r\n", b"\r\r"):
        assert SseDecoder().feed(b"data: x" + blank) == [b"x"]


def test_a_line_that_is_no_event_is_remembered() -> None:
    decoder = SseDecoder()
    assert decoder.feed(b"data: x\n\nproxy error: gone\n") == [b"x"]
    assert decoder.end() == []
    assert decoder.stray == b"proxy error: gone"


@pytest.mark.parametrize("decoder", [SseDecoder(), LineDecoder()])
def test_a_frame_without_end_is_refused(decoder: SseDecoder | LineDecoder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sse, "MAX_FRAME_BYTES", 100)
    decoder.feed(b"x" * 100)
    with pytest.raises(FrameTooLong):
        decoder.feed(b"x")
