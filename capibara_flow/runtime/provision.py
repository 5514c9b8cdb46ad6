"""Making a broker agree with ``topics.streams``: create what is missing, update what differs."""

from dataclasses import asdict

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
from nats.js.errors import BadRequestError, NotFoundError, ServerError

from topics.streams import Consumer, Layout, Stream

#: JetStream's codes for "stream name already in use with a different configuration" and "insufficient storage resources".
_EXISTS_DIFFERENTLY, _NO_ROOM = 10058, 10047


def stream_config(stream: Stream) -> StreamConfig:
    """*stream* in the words of JetStream."""
    work = stream.keeps == "work"
    return StreamConfig(
        name=stream.name,
        subjects=list(stream.subjects),
        retention=RetentionPolicy.WORK_QUEUE if work else RetentionPolicy.LIMITS,
        discard=DiscardPolicy.NEW if work else DiscardPolicy.OLD,
        storage=StorageType.FILE,
        num_replicas=stream.replicas,
        max_age=stream.max_age,
        max_msgs=stream.max_messages,
        max_bytes=stream.max_bytes,
        max_msgs_per_subject=stream.max_per_subject,
        duplicate_window=min(stream.dedupe_window, stream.max_age),
        allow_direct=stream.direct,
        republish=RePublish(src=stream.republish[0], dest=stream.republish[1]) if stream.republish else None,
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
    """Make the broker agree with *layout*; idempotent. Returns a line for everything done."""
    done = []
    for stream in layout.streams:
        config = stream_config(stream)
        try:
            before = (await jetstream.stream_info(stream.name)).config
        except NotFoundError:
            await jetstream.add_stream(config)
            done.append(f"created  {stream.name}")
            continue
        after = (await jetstream.update_stream(config)).config
        done.append(f"{'kept    ' if asdict(after) == asdict(before) else 'updated '} {stream.name}")
    for consumer in consumers:
        await ensure_consumer(jetstream, consumer)
        done.append(f"ensured  {consumer.stream} > {consumer.durable}")
    return done
