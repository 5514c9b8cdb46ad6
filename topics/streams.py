"""The JetStream streams and consumers as data; ``capibara streams apply`` makes a broker agree with them."""

import hashlib
from dataclasses import dataclass, field, replace
from typing import Literal

MINUTE, HOUR, DAY = 60, 3600, 24 * 3600
#: The streams of two key-value buckets: who reads a turn now (by turn), what an ``Idempotency-Key`` stands for (by its hash, and turn).
READERS, KEYS = "KV_CF_READERS", "KV_CF_KEYS"
#: And of one that may forget what is oldest: answers that may be given again (by the hash of all that decides on them, and turn).
ANSWERS = "KV_CF_ANSWERS"
#: And of one that holds what each process tells of itself, again and again: whoever falls silent is forgotten after so many seconds.
REPORTS, REPORT_SECONDS = "KV_CF_REPORTS", 20
#: And of one that names the lanes in which turns wait for an expert: who sends one there tells it first, again after so many seconds.
LANES, LANE_SECONDS, LANE_AGAIN_SECONDS = "KV_CF_LANES", HOUR, 10 * MINUTE
#: The queue of calls.
CALLS = "CF_WORK_CALL"
#: What was decided and done: facts of every stage.
LOG = "CF_LOG"
#: The lane that every expert has: what is neither urgent nor idle of who asks without a name.
FIRST_LANE = "0"
#: Documents on their way in, in pieces.
DOCUMENTS = "CF_DOC"
GIBIBYTE = 1024**3


@dataclass(frozen=True)
class Stream:
    """One JetStream stream: what it keeps, for how long (seconds), and how much (messages, bytes)."""

    name: str
    subjects: tuple[str, ...]
    keeps: Literal["work", "limits"]
    max_age: int
    max_messages: int
    max_bytes: int
    dedupe_window: int = 2 * MINUTE
    max_per_subject: int = -1
    direct: bool = False
    #: Whether it refuses what is new when it is full, as a queue does, though it is none; else it forgets what is oldest.
    refuses: bool = False
    republish: tuple[str, str] | None = None
    #: The stream of a key-value bucket: only the last message of a subject counts, and may say for how long.
    bucket: bool = False
    replicas: int = 1


@dataclass(frozen=True)
class Consumer:
    """One durable pull consumer: *ack_wait* in seconds, *max_ack_pending* messages at once over all its processes."""

    stream: str
    durable: str
    filter: str
    ack_wait: float = 5.0
    max_deliver: int = 4
    max_ack_pending: int = 2000
    #: After so many seconds without anybody who asks, the broker forgets it; 0: never.
    idle_seconds: float = 0.0
    #: Whether whoever takes from it may hold a message for a while and give it back: then not every delivery is an attempt.
    held: bool = False


@dataclass(frozen=True)
class Layout:
    """All streams, by name; the fields are what an operator may change.

    *answer_age* is for how long answers may be given again, in seconds; 0: never.
    *storage* (bytes) is shared out, so that no stream can starve another: a log that is full forgets, a queue that is full refuses.
    """

    turn_age: int = HOUR
    dead_age: int = 24 * HOUR
    log: bool = True
    answer_age: int = 0
    storage: int = 8 * GIBIBYTE
    replicas: int = 1
    streams: tuple[Stream, ...] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "streams", tuple(self._all()))

    def _all(self) -> list[Stream]:
        asked = ("cf.work.*.>", "cf.log.{{wildcard(1)}}.asked.>") if self.log else None
        share = self.storage // 64
        streams = [
            Stream("CF_WORK_ROUTER", ("cf.work.*.router",), "work", 15 * MINUTE, 20_000, 6 * share, 15 * MINUTE, republish=asked),
            Stream(CALLS, ("cf.work.*.call.*.*",), "work", 15 * MINUTE, 20_000, 7 * share, 15 * MINUTE, republish=asked),
            Stream("CF_WORK_RETRIEVER", ("cf.work.*.retriever",), "work", 15 * MINUTE, 20_000, 4 * share, 15 * MINUTE, republish=asked),
            Stream("CF_WORK_INGESTER", ("cf.work.*.ingester",), "work", DAY, 100_000, share, 15 * MINUTE, republish=asked),
            Stream("CF_JOIN", ("cf.join.*.*.*",), "limits", 15 * MINUTE, -1, 2 * share, 15 * MINUTE, max_per_subject=1, direct=True),
            Stream(DOCUMENTS, (piece_subject("*", "*"),), "limits", DAY, -1, 6 * share, direct=True, refuses=True),
            Stream(
                "CF_OUT",
                ("cf.out.*.lease.*", "cf.out.*.data.*"),
                "limits",
                self.turn_age,
                -1,
                18 * share,
                max_per_subject=100_000,
                direct=True,
                republish=("cf.out.*.data.*", "cf.live.{{wildcard(1)}}.{{wildcard(2)}}"),
            ),
            Stream(
                "CF_CTL", ("cf.ctl.*.cancel", "cf.ctl.*.erased"), "limits", self.turn_age, -1, 2 * share, max_per_subject=1, direct=True
            ),
            Stream("CF_DEAD", ("cf.dead.*.*",), "limits", self.dead_age, 100_000, 2 * share, direct=True),
            self._bucket(READERS, reader_key("*"), due_key("*")),
            self._bucket(KEYS, claim_key("*", "*")),
            replace(self._bucket(REPORTS, report_key("*", "*")), max_age=REPORT_SECONDS, dedupe_window=REPORT_SECONDS),
            replace(self._bucket(LANES, lane_key("*", "*")), max_age=LANE_SECONDS),
        ]
        if self.log:
            left = 10 if self.answer_age else 12
            streams.append(Stream(LOG, ("cf.log.>",), "limits", self.turn_age, -1, left * share, direct=True))
        if self.answer_age:
            subjects = (answer_key("*", "*"),)
            streams.append(Stream(ANSWERS, subjects, "limits", self.answer_age, -1, 2 * share, max_per_subject=1, direct=True))
        return [replace(stream, replicas=self.replicas) for stream in streams]

    def _bucket(self, name: str, *subjects: str) -> Stream:
        return Stream(name, subjects, "limits", self.turn_age, -1, self.storage // 64, max_per_subject=1, direct=True, bucket=True)

    def named(self, name: str) -> Stream:
        """The stream called *name*; raises ``KeyError``."""
        return {stream.name: stream for stream in self.streams}[name]


def subject_token(name: str) -> str:
    """*name* as it may stand in a subject or durable: whatever is not a letter, digit, ``-`` or ``_`` becomes ``_``."""
    return "".join(letter if letter.isascii() and (letter.isalnum() or letter in "-_") else "_" for letter in name)[:64]


def router_consumer() -> Consumer:
    """The one consumer of all routers."""
    return Consumer("CF_WORK_ROUTER", "router", "cf.work.*.router")


def retriever_consumer() -> Consumer:
    """The one consumer of all retrievers."""
    return Consumer("CF_WORK_RETRIEVER", "retriever", "cf.work.*.retriever")


def ingester_consumer() -> Consumer:
    """The one consumer of all ingesters."""
    return Consumer("CF_WORK_INGESTER", "ingester", "cf.work.*.ingester")


def accountant_consumer() -> Consumer:
    """The one consumer of all accountants: what callers tell the log of ended calls. What cannot be kept now may take a while."""
    return Consumer(LOG, "accountant", "cf.log.*.caller", ack_wait=30.0)


def piece_subject(turn: str, number: int | str) -> str:
    """Where one piece of a document waits to be taken in."""
    return f"cf.doc.{turn}.{number}"


def undertaker_consumer() -> Consumer:
    """The one consumer of all undertakers: whoever stops a turn is heard by them."""
    return Consumer("CF_CTL", "undertaker", "cf.ctl.*.cancel")


def absence_consumer() -> Consumer:
    """Tells undertakers of turns that nobody reads any more, and of those that are overdue."""
    return Consumer(READERS, "undertaker", "$KV.CF_READERS.>")


def reader_key(turn: str) -> str:
    """Where the lease of the readers of *turn* is."""
    return f"$KV.CF_READERS.{turn}"


def due_key(turn: str) -> str:
    """Where it stands that *turn*, which nobody has to read, is due."""
    return f"$KV.CF_READERS.{turn}.due"


def claim_key(key: str, turn: str) -> str:
    """Where it stands that *turn* has claimed the idempotency key with the hash *key*."""
    return f"$KV.CF_KEYS.{key}.{turn}"


def answer_key(key: str, turn: str) -> str:
    """Where the answer is kept that *turn* has made, and that may be given again to who asks what has the hash *key*."""
    return f"$KV.CF_ANSWERS.{key}.{turn}"


def every_stream() -> tuple[str, ...]:
    """The names of all streams that there can be: what was switched on once may still be kept."""
    return tuple(stream.name for stream in Layout(log=True, answer_age=HOUR).streams)


def report_key(worker: str, process: str) -> str:
    """Where *process* (a token) tells what it knows as a *worker*."""
    return f"$KV.CF_REPORTS.{worker}.{process}"


def lane_key(expert: str, lane: str) -> str:
    """Where it stands that turns wait in *lane* of *expert* (a token): its value is the tenant who came there last."""
    return f"$KV.CF_LANES.{expert}.{lane}"


def erased_mark(turn: str) -> str:
    """Where it stands that *turn* was erased; only who knows the turn finds it, and nothing can be read from it."""
    return f"cf.ctl.{hashlib.sha256(f'erased:{turn}'.encode()).hexdigest()[:32]}.erased"


def traces(turn: str) -> tuple[str, ...]:
    """Every subject that can hold something of *turn*: to erase these is to erase it."""
    return f"cf.*.{turn}.>", reader_key(turn), due_key(turn), claim_key("*", turn), answer_key("*", turn)


def caller_consumer(expert: str, lane: str = FIRST_LANE) -> Consumer:
    """The consumer of one expert's callers for one lane; those of a queue must not overlap, so each lane has its own."""
    token = subject_token(expert)
    first = Consumer(CALLS, f"caller-{token}", f"cf.work.*.call.{token}.{lane}", held=True)
    return first if lane == FIRST_LANE else replace(first, durable=f"{first.durable}@{lane}", idle_seconds=2 * LANE_SECONDS)


def served(consumer: Consumer) -> tuple[str, str]:
    """The expert (a token) and the lane of a callers' *consumer*."""
    expert, lane = consumer.filter.split(".")[-2:]
    return expert, lane
