"""Whatever the feed does, a reader sees each message once and in order."""

from dataclasses import dataclass, field

from hypothesis import given
from hypothesis import strategies as st

from capibara_flow.domain.reading import Cursor, Verdict


@dataclass
class Reader:
    """A follower without a broker: *stream* is what is stored so far, *seen* what its client got."""

    cursor: Cursor
    stream: list[int] = field(default_factory=list)
    seen: list[int] = field(default_factory=list)

    def hear(self, index: int, answers: int) -> None:
        """The live message of that index; a gap is healed with *answers* messages at most, as from a replica that lags behind."""
        sequence, previous = self.stream[index], self.stream[index - 1] if index else 0
        verdict = self.cursor.judge(sequence, previous)
        if verdict is Verdict.GAP:
            self.poll(answers)
        elif verdict is Verdict.DELIVER:
            self.seen.append(sequence)

    def poll(self, answers: int | None = None) -> None:
        """Read the stream behind the cursor."""
        behind = [sequence for sequence in self.stream if sequence > self.cursor.last]
        self.seen += [sequence for sequence in behind[:answers] if self.cursor.stored(sequence)]


sequences = st.lists(st.integers(1, 200), unique=True, min_size=1, max_size=30).map(sorted)
#: Live messages by their place among those stored, and how much a heal brings.
feeds = st.lists(st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 40)), max_size=4), max_size=30)


@given(sequences, feeds, st.integers(0, 220))
def test_any_loss_repetition_and_reordering_yields_each_once_and_in_order(
    messages: list[int], feed: list[list[tuple[float, int]]], after: int
) -> None:
    reader = Reader(Cursor(after))
    for turn, message in enumerate(messages):
        reader.stream.append(message)
        for place, answers in feed[turn] if turn < len(feed) else []:
            reader.hear(int(place * len(reader.stream)), answers)
        assert reader.seen == [each for each in reader.stream if each > after][: len(reader.seen)]
    reader.poll()
    assert reader.seen == [each for each in messages if each > after]


@given(sequences, st.integers(0, 220))
def test_a_perfect_feed_needs_no_healing(messages: list[int], after: int) -> None:
    cursor = Cursor(after)
    verdicts = [cursor.judge(sequence, previous) for previous, sequence in zip([0, *messages], messages, strict=False)]
    assert verdicts == [Verdict.DUPLICATE if each <= after else Verdict.DELIVER for each in messages]


@given(sequences, st.integers(0, 29))
def test_a_loss_shows_at_the_next_message(messages: list[int], lost: int) -> None:
    cursor = Cursor()
    pairs = list(zip([0, *messages], messages, strict=False))
    lost %= len(pairs)
    for previous, sequence in pairs[:lost]:
        assert cursor.judge(sequence, previous) is Verdict.DELIVER
    for previous, sequence in pairs[lost + 1 : lost + 2]:
        assert cursor.judge(sequence, previous) is Verdict.GAP
        assert cursor.last < previous


@given(sequences)
def test_what_was_seen_is_never_new_again(messages: list[int]) -> None:
    cursor = Cursor()
    for sequence in messages:
        assert cursor.stored(sequence)
    for sequence in messages:
        assert not cursor.stored(sequence)
        assert cursor.judge(sequence, 0) is Verdict.DUPLICATE
    assert cursor.last == messages[-1]
