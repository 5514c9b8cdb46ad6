"""Making a broker agree with ``topics.streams``: create what is missing, update what differs."""

from collections.abc import Awaitable, Callable
from dataclasses import asdict
from typing import TypeVar

import stamina
from nats.js import JetStreamContext
from nats.js.api import (
    AckPolicy,
    ConsumerConfig,
    DiscardPolicy,
    RePublish,
    RetentionPolicy,
    StorageType,
    StreamConfig,
)
from nats.js.errors import APIError, BadRequestError, NotFoundError, ServerError, ServiceUnavailableError

from topics.streams import Consumer, Layout, Stream

#: JetStream's codes for "stream name already in use with a different configuration" and "insufficient storage resources".
_EXISTS_DIFFERENTLY, _NO_ROOM = 10058, 10047
#: And for "no suitable peers for placement".
_NO_PEERS = 10005
_PATIENCE = 40.0  # seconds

Asked = TypeVar("Asked")
Done = TypeVar("Done")


def stream_config(stream: Stream) -> StreamConfig:
    """*stream* in the words of JetStream."""
    work = stream.keeps == "work"
    return StreamConfig(
        name=stream.name,
        subjects=list(stream.subjects),
        retention=RetentionPolicy.WORK_QUEUE if work else RetentionPolicy.LIMITS,
        discard=DiscardPolicy.NEW if work or stream.bucket or stream.refuses else DiscardPolicy.OLD,
        storage=StorageType.FILE,
        num_replicas=stream.replicas,
        max_age=stream.max_age,
        max_msgs=stream.max_messages,
        max_bytes=stream.max_bytes,
        max_msgs_per_subject=stream.max_per_subject,
        duplicate_window=min(stream.dedupe_window, stream.max_age),
        allow_direct=stream.direct,
        republish=RePublish(src=stream.republish[0], dest=stream.republish[1]) if stream.republish else None,
        # As NATS ADR-8 and ADR-48 want it of a bucket; a key that runs out leaves a marker for as long as a turn is kept.
        deny_delete=stream.bucket,
        allow_rollup_hdrs=stream.bucket,
        allow_msg_ttl=stream.bucket or None,
        subject_delete_marker_ttl=stream.max_age if stream.bucket else None,
    )


def consumer_config(consumer: Consumer) -> ConsumerConfig:
    """*consumer* in the words of JetStream."""
    return ConsumerConfig(
        name=consumer.durable,  # with a name, the API subject names stream, consumer and filter: so it can be permitted exactly
        durable_name=consumer.durable,
        filter_subject=consumer.filter,
        ack_policy=AckPolicy.EXPLICIT,
        ack_wait=consumer.ack_wait,
        max_deliver=-1,  # a stage counts, and ends the turn beyond consumer.max_deliver; the broker would only fall silent
        max_ack_pending=consumer.max_ack_pending,
        inactive_threshold=consumer.idle_seconds or None,
    )


async def ensure_stream(jetstream: JetStreamContext, stream: Stream) -> None:
    """Create *stream* if it is missing; an existing one is left as it is."""
    try:
        await jetstream.add_stream(stream_config(stream))
    except (BadRequestError, ServerError) as error:
        # A broker looks for room before it looks whether the stream is there.
        if error.err_code not in {_EXISTS_DIFFERENTLY, _NO_ROOM}:
            raise


async def ensure_consumer(jetstream: JetStreamContext, consumer: Consumer) -> None:
    """Create *consumer*, or bring it up to date."""
    await jetstream.add_consumer(consumer.stream, consumer_config(consumer))


async def apply(jetstream: JetStreamContext, layout: Layout, consumers: tuple[Consumer, ...]) -> list[str]:
    """Make the broker agree with *layout*; idempotent. Returns a line for everything done.

    A cluster that is just coming up, or electing, is asked again for a while.
    """
    done = [await _patiently(_agree, jetstream, stream) for stream in layout.streams]
    for consumer in consumers:
        await _patiently(ensure_consumer, jetstream, consumer)
        done.append(f"ensured  {consumer.stream} > {consumer.durable}")
    return done


async def _agree(jetstream: JetStreamContext, stream: Stream) -> str:
    config = stream_config(stream)
    try:
        before = (await jetstream.stream_info(stream.name)).config
    except NotFoundError:
        await jetstream.add_stream(config)
        return f"created  {stream.name}"
    after = (await jetstream.update_stream(config)).config
    return f"{'kept    ' if asdict(after) == asdict(before) else 'updated '} {stream.name}"


async def _patiently(step: Callable[[JetStreamContext, Asked], Awaitable[Done]], jetstream: JetStreamContext, asked: Asked) -> Done:
    async for attempt in stamina.retry_context(on=_may_pass, attempts=None, timeout=_PATIENCE, wait_max=2):
        with attempt:
            return await step(jetstream, asked)
    raise AssertionError("stamina ends with a result or an error")


def _may_pass(error: Exception) -> bool:
    """Whether *error* is one of a cluster without a leader, or whose nodes have not found each other yet."""
    return isinstance(error, TimeoutError | ServiceUnavailableError) or (isinstance(error, APIError) and error.err_code == _NO_PEERS)
