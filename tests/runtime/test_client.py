"""The fast lane beside ordinary NATS, and what it needs of nats-py."""

import asyncio
import gc
import inspect
import json
import os
import signal
import string
import weakref
from collections.abc import Awaitable, Callable
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.aio.subscription import Subscription
from nats.aio.transport import TcpTransport
from nats.errors import ConnectionClosedError, NoRespondersError, OutboundBufferLimitError
from nats.errors import Error as NatsError
from nats.protocol.parser import Parser

from capibara_flow.runtime import brokers, connection
from capibara_flow.runtime.client import TokenClient, description, encoded, flushed, header, status
from tests.runtime.rig import Rig
from tests.waiting import until
from topics.streams import Layout
from topics.usage import ReadUsage


class Ear:
    """Remembers what it heard."""

    def __init__(self) -> None:
        self.heard: list[tuple[bytes, bytes, bytes]] = []

    def __call__(self, subject: bytes, headers: bytes, data: bytes) -> None:
        self.heard.append((subject, headers, data))

    @property
    def data(self) -> list[bytes]:
        return [data for _, _, data in self.heard]


@pytest.fixture
async def client(rig: Rig) -> TokenClient:
    return await rig.client("edge")


def inbox(name: str = "x") -> str:
    return f"_INBOX_edge.{name}"


Publish = Callable[..., Awaitable[None]]


@pytest.fixture
async def publish(rig: Rig) -> Publish:
    """Publish from another connection, and return when the broker has it."""
    plain = Client()
    await plain.connect(connection.addresses(rig.settings, "caller"), **connection.options(rig.settings, "caller"))
    rig.clients.append(plain)

    async def publish(subject: str, body: bytes, headers: dict[str, str] | None = None) -> None:
        await plain.publish(subject, body, headers=headers)
        await flushed(plain)

    return publish


# --- listening -------------------------------------------------------------------------------------------------

# An edge may listen to cf.live, which the broker publishes when a caller's output is stored: cf.out with headers of its own.
OUT, LIVE = "cf.out.T1.data.main", "cf.live.T1.main"


async def test_listening_gets_headers_and_data_as_they_came(client: TokenClient, publish: Publish):
    ear = Ear()
    await client.listen(LIVE, ear)
    await flushed(client)
    await publish(OUT, b"one")
    await publish(OUT, b"two", {"Some": "header"})
    await until(lambda: len(ear.heard) == 2)
    [(subject, first, one), (_, second, two)] = ear.heard
    assert (subject, one, two) == (LIVE.encode(), b"one", b"two")
    assert (header(first, b"Nats-Sequence"), header(first, b"Nats-Last-Sequence")) == (b"1", b"0")
    assert (header(second, b"Nats-Sequence"), header(second, b"Nats-Last-Sequence")) == (b"2", b"1")
    assert (header(first, b"Some"), header(second, b"Some")) == (b"", b"header")
    assert second.startswith(b"NATS/1.0\r\n")
    assert second.endswith(b"\r\n\r\n")


async def test_a_message_without_headers_has_empty_ones(rig: Rig):
    client, ear = await rig.client("router"), Ear()
    edge = await rig.client("edge")
    await client.listen("cf.ctl.*.cancel", ear)
    await flushed(client)
    await edge.publish("cf.ctl.T1.cancel", b"stop")
    await until(lambda: ear.heard)
    assert ear.heard == [(b"cf.ctl.T1.cancel", b"", b"stop")]


async def test_ordinary_subscriptions_and_requests_work_on_the_same_connection(client: TokenClient, publish: Publish):
    ear = Ear()
    seen: list[Msg] = []

    async def see(message: Msg) -> None:
        seen.append(message)

    await client.listen(LIVE, ear)
    await client.subscribe(LIVE, cb=see)
    waiting = await client.subscribe("cf.live.T2.main")
    await flushed(client)
    await publish(OUT, b"a", {"Some": "header"})
    await publish("cf.out.T2.data.main", b"b")
    reply = await client.request("$JS.API.STREAM.MSG.GET.CF_OUT", b'{"seq": 1}', timeout=10)
    await until(lambda: ear.heard and seen)
    assert (await waiting.next_msg(timeout=10)).data == b"b"
    assert ear.data == [seen[0].data] == [b"a"]
    assert (seen[0].headers or {})["Some"] == "header"
    assert b'"seq":1' in reply.data


async def test_whoever_is_cancelled_while_the_reply_comes_ends(rig: Rig, monkeypatch: pytest.MonkeyPatch):
    client = await rig.client("caller")
    asking: asyncio.Task[Msg]

    def replied(*reply: bytes) -> None:
        TokenClient._replied(client, *reply)
        asking.cancel()

    monkeypatch.setattr(client, "_replied", replied)
    asking = asyncio.create_task(client.request("$JS.API.STREAM.MSG.GET.CF_CTL", b'{"seq": 1}', timeout=20))
    with pytest.raises(asyncio.CancelledError):
        await asking
    assert not client._coming


async def test_a_request_that_nobody_hears_or_answers_ends(rig: Rig, monkeypatch: pytest.MonkeyPatch):
    client = await rig.client("edge")
    with pytest.raises(NoRespondersError):
        await client.request(ReadUsage(turn="R", since=0, until=1).subject, b"{}", timeout=20)
    late: list[tuple[bytes, ...]] = []
    monkeypatch.setattr(client, "_replied", lambda *reply: late.append(reply))
    with pytest.raises(TimeoutError) as told:
        await client.request("$JS.API.STREAM.MSG.GET.CF_OUT", b'{"seq": 1}', timeout=0.05)
    assert isinstance(told.value, NatsError)
    await until(lambda: late)
    monkeypatch.undo()
    client._replied(*late[0])  # nobody waits for it any more
    assert (await client.request("$JS.API.STREAM.MSG.GET.CF_OUT", b'{"seq": 1}', timeout=20)).data
    assert not client._coming


async def test_many_requests_at_once_get_their_own_replies(rig: Rig, publish: Publish):
    client = await rig.client("edge")
    for number in range(200):
        await publish(OUT, b"%d" % number)
    asked = [client.request("$JS.API.STREAM.MSG.GET.CF_OUT", b'{"seq": %d}' % number, timeout=20) for number in range(1, 201)]
    answers = [json.loads(reply.data)["message"] for reply in await asyncio.gather(*asked)]
    assert [each["seq"] for each in answers] == list(range(1, 201))
    assert not client._coming


async def test_many_messages_come_in_order(client: TokenClient, publish: Publish, rig: Rig):
    ear = Ear()
    await client.listen(LIVE, ear)
    await flushed(client)
    plain = await rig.client("caller")
    for number in range(3000):
        await plain.publish(OUT, str(number).encode())
    await until(lambda: len(ear.heard) == 3000)
    assert ear.data == [str(number).encode() for number in range(3000)]


async def test_after_a_reconnect_listening_goes_on(rig: Rig, client: TokenClient, publish: Publish):
    ear, deaf = Ear(), Ear()
    await client.listen(LIVE, ear)
    subscription = await client.listen(LIVE, deaf)
    await flushed(client)
    await publish(OUT, b"before")
    await until(lambda: ear.heard and deaf.heard)
    await rig.restart()
    await until(lambda: client.stats["reconnects"] == 1 and client.is_connected)
    await flushed(client)
    await client.deafen(subscription)
    await flushed(client)
    await publish(OUT, b"after")
    await until(lambda: len(ear.heard) == 2)
    assert ear.data == [b"before", b"after"]
    assert deaf.data == [b"before"]


async def test_deaf_ears_hear_nothing(client: TokenClient, publish: Publish):
    ear, other = Ear(), Ear()
    subscription = await client.listen(LIVE, ear)
    await client.listen(LIVE, other)
    await client.deafen(subscription)
    await client.deafen(subscription)  # twice is once
    await flushed(client)
    await publish(OUT, b"a")
    await until(lambda: other.heard)
    assert not ear.heard
    assert list(client._subs) == [client._inbox_id, *client._ears]
    assert len(client._ears) == 1


async def test_whoever_was_deafened_while_the_broker_was_away_stays_so(rig: Rig, client: TokenClient, publish: Publish):
    ear, other = Ear(), Ear()
    subscription = await client.listen(LIVE, ear)
    await client.listen(LIVE, other)
    await rig.restart()  # our connections learn of it when we wait for the next time
    await client.force_reconnect()
    await client.deafen(subscription)
    await until(lambda: client.is_connected)
    await flushed(client)
    await until(lambda: rig.clients[-1].is_connected)
    await publish(OUT, b"a")
    await until(lambda: other.heard)
    assert not ear.heard
    assert list(client._subs) == [client._inbox_id, *client._ears]
    assert len(client._ears) == 1


async def test_deafening_after_the_end_is_no_fault(client: TokenClient):
    subscription = await client.listen(LIVE, Ear())
    await client.close()
    await client.deafen(subscription)
    assert not client._ears


async def test_an_ear_that_fails_is_told_and_harms_nobody(rig: Rig, publish: Publish):
    errors: list[Exception] = []

    async def failed(error: Exception) -> None:
        errors.append(error)

    client = TokenClient()
    options = connection.options(rig.settings, "edge") | {"error_cb": failed}
    await client.connect(connection.addresses(rig.settings, "edge"), **options)
    rig.clients.append(client)
    ear = Ear()

    def fail(subject: bytes, headers: bytes, data: bytes) -> None:
        raise ValueError("an ear that hurts")

    await client.listen(LIVE, fail)
    await client.listen(LIVE, ear)
    await flushed(client)
    await publish(OUT, b"a")
    await publish(OUT, b"b")
    await until(lambda: len(ear.heard) == 2)
    assert [str(error) for error in errors] == ["an ear that hurts"] * 2


async def test_closing_without_a_broker_is_no_fault(rig: Rig):
    client = await rig.client("caller")
    await rig.restart(away=0)
    await client.force_reconnect()
    client.send(OUT, b"a" * 1000, reply=client.new_inbox(), headers=encoded({}))
    assert client.pending_data_size > 1000
    await client.close()
    assert client.is_closed
    assert not client._subs


async def test_closing_while_the_old_connection_ends_is_no_fault(client: TokenClient):
    await client.force_reconnect()
    await asyncio.sleep(0)  # the search for a broker waits for that end
    await client.close()
    assert client.is_closed


@pytest.mark.parametrize("seconds", [0, 0.05, 0.2, 0.3])
async def test_closing_ends_the_search_for_a_broker(rig: Rig, seconds: float):
    clients = [await rig.client("caller") for _ in range(8)]
    await asyncio.to_thread(rig.broker.kill)
    for client in clients:
        await until(lambda client=client: client.is_reconnecting)
    await asyncio.sleep(seconds)  # so the search is in another place
    searches = [client._reconnection_task for client in clients]
    await asyncio.gather(*(client.close() for client in clients))
    assert all(search is not None and search.done() for search in searches)


async def test_closing_ends_a_search_that_overhears_it(client: TokenClient):
    async def search() -> None:
        with suppress(asyncio.CancelledError):
            await asyncio.Event().wait()
        await asyncio.Event().wait()

    client._reconnection_task = asyncio.create_task(search())
    await asyncio.sleep(0)
    await client.close()
    assert client._reconnection_task.done()


async def test_an_ear_has_no_queue_and_goes_without_the_collector(client: TokenClient):
    subscription = await client.listen(LIVE, Ear())
    assert subscription._pending_queue is client._nothing
    there = weakref.ref(subscription)
    await client.deafen(subscription)
    await flushed(client)
    gc.disable()
    try:
        del subscription
        assert there() is None
    finally:
        gc.enable()


# --- sending ---------------------------------------------------------------------------------------------------


async def test_a_ping_takes_no_room_for_ever(client: TokenClient):
    for _ in range(20):
        await client.flush()
    await until(lambda: client._pending_data_size == 0)


async def test_where_only_the_flusher_writes_a_ping_is_written_too(client: TokenClient, monkeypatch: pytest.MonkeyPatch):
    class Socket:  # as nats-py's over a WebSocket: what is written waits for `drain`
        def __init__(self) -> None:
            self.waiting: list[bytes] = []

        def __getattr__(self, name: str) -> object:
            if name == "_io_writer":
                raise AttributeError(name)
            return getattr(real, name)

        def write(self, payload: bytes) -> None:
            self.waiting.append(payload)

        def writelines(self, payload: list[bytes]) -> None:
            self.waiting += payload

        async def drain(self) -> None:
            waiting, self.waiting = self.waiting, []
            real.writelines(waiting)
            await real.drain()

    real = client._transport
    monkeypatch.setattr(client, "_transport", Socket())
    try:
        await client.flush(timeout=20)
        assert json.loads((await client.request("$JS.API.STREAM.MSG.GET.CF_OUT", b'{"seq": 1}', timeout=20)).data)
    finally:
        monkeypatch.undo()


async def test_when_it_came_back_is_known_whoever_else_wants_to_hear_of_it(rig: Rig):
    broker = brokers.broker(rig.settings, "router")
    await broker.start()
    connection = broker.config.connection_state.connection
    await connection.force_reconnect()
    await until(lambda: connection.returned > 0)
    await broker.stop()


async def test_an_ordinary_client_receives_what_is_sent(rig: Rig):
    sender, plain = await rig.client("caller"), Client()
    await plain.connect(connection.addresses(rig.settings, "observer"), **connection.options(rig.settings, "observer"))
    rig.clients.append(plain)
    subscription = await plain.subscribe(OUT)
    await flushed(plain)
    headers = {"Nats-Expected-Last-Subject-Sequence": "0", "Some": "header: with a colon", "Empty": ""}
    reply = sender.new_inbox()
    ear = Ear()
    await sender.listen(reply, ear)
    await flushed(sender)
    sender.send(OUT, b"body\r\nof two lines", reply=reply, headers=encoded(headers))
    assert sender._pending_data_size
    for _ in range(3):
        await asyncio.sleep(0)
    assert not sender._pending_data_size  # it did not wait for anything else that would take it along, such as a ping
    message = await subscription.next_msg(timeout=10)
    assert (message.subject, message.reply, message.data) == (OUT, reply, b"body\r\nof two lines")
    assert message.headers == headers
    await until(lambda: ear.heard)
    assert [json.loads(data) for data in ear.data] == [{"stream": "CF_OUT", "seq": 1}]


async def test_what_is_sent_and_published_in_one_breath_arrives_whole_and_in_order(rig: Rig):
    sender, ear = await rig.client("caller"), Ear()
    edge = await rig.client("edge")
    await edge.listen(LIVE, ear)
    await flushed(edge)
    reply = sender.new_inbox()
    for number in range(0, 600, 3):
        sender.send(OUT, b"%d" % number, reply=reply, headers=encoded({"Some": "header"}))
        await sender.publish(OUT, b"%d" % (number + 1))
        sender.send(OUT, b"%d" % (number + 2), reply=reply, headers=encoded({}))
    await until(lambda: len(ear.heard) == 600)
    assert ear.data == [b"%d" % number for number in range(600)]
    assert sender._pending_data_size == 0


async def test_what_is_sent_does_not_overtake_a_subscription(rig: Rig):
    client, ear = await rig.client("caller"), Ear()
    reply = client.new_inbox()
    await client.listen(reply, ear)
    assert client._pending  # the flusher has not had a turn since
    client.send(OUT, b"a", reply=reply, headers=encoded({}))
    await until(lambda: ear.heard)
    assert [json.loads(data) for data in ear.data] == [{"stream": "CF_OUT", "seq": 1}]


async def test_a_broker_that_takes_nothing_gets_everything_in_order_later(rig: Rig):
    sender, ear = await rig.client("caller"), Ear()
    edge = await rig.client("edge")
    await edge.listen(LIVE, ear)
    await flushed(edge)
    reply, body, sent = sender.new_inbox(), b"x" * 200_000, 0
    pid = rig.broker.pid
    assert pid
    os.kill(pid, signal.SIGSTOP)
    try:
        while len(sender._pending) < 3:  # the system takes some megabytes, then the connection is full
            sender.send(OUT, b"%d %b" % (sent, body), reply=reply, headers=encoded({}))
            await sender.publish(OUT, b"%d published" % (sent + 1))
            await asyncio.sleep(0)
            sent += 2
    finally:
        os.kill(pid, signal.SIGCONT)
    sender.send(OUT, b"%d last" % sent, reply=reply, headers=encoded({}))
    await until(lambda: len(ear.heard) > sent)
    assert [int(data.split()[0]) for data in ear.data] == list(range(sent + 1))
    assert (sender._pending, sender.stats["reconnects"]) == ([], 0)


async def test_what_is_sent_into_a_connection_that_has_just_gone_is_kept_for_the_next_one(rig: Rig):
    client, ear = await rig.client("caller"), Ear()
    reply = client.new_inbox()
    await client.listen(reply, ear)
    await flushed(client)
    client._transport._io_writer.transport.abort()
    assert client.is_connected  # nobody has noticed
    client.send(OUT, b"a", reply=reply, headers=encoded({}))
    await until(lambda: ear.heard)
    assert [json.loads(data) for data in ear.data] == [{"stream": "CF_OUT", "seq": 1}]
    assert client.stats["reconnects"] == 1


async def test_nothing_is_sent_on_a_connection_that_has_not_yet_said_whose_it_is(rig: Rig):
    client, ear = await rig.client("caller"), Ear()
    reply = client.new_inbox()
    await client.listen(reply, ear)
    await flushed(client)
    client.send(OUT, b"a", reply=reply, headers=encoded({}))
    client._status = Client.RECONNECTING  # as it is from the loss to the broker's answer, while there is a new connection already
    await asyncio.sleep(0.01)
    assert client._pending
    client._status = Client.CONNECTED
    await flushed(client)
    await until(lambda: ear.heard)
    assert [json.loads(data) for data in ear.data] == [{"stream": "CF_OUT", "seq": 1}]


async def test_sending_is_refused_where_publishing_would_be(rig: Rig):
    client = await rig.client("caller")
    reply, headers = client.new_inbox(), encoded({})
    await client.force_reconnect()
    with pytest.raises(OutboundBufferLimitError):
        client.send(OUT, b"x" * (client._max_pending_size + 1), reply=reply, headers=headers)
    await client.close()
    with pytest.raises(ConnectionClosedError):
        client.send(OUT, b"a", reply=reply, headers=headers)


async def test_what_is_sent_while_the_broker_is_away_arrives_afterwards(rig: Rig):
    client, ear = await rig.client("caller"), Ear()
    reply = client.new_inbox()
    await client.listen(reply, ear)
    await flushed(client)  # nothing is left to be written to the connection that ends now
    await client.force_reconnect()
    assert not client.is_connected
    client.send(OUT, b"a", reply=reply, headers=encoded({"Some": "header"}))
    await until(lambda: ear.heard)
    assert [json.loads(data) for data in ear.data] == [{"stream": "CF_OUT", "seq": 1}]


# --- headers ---------------------------------------------------------------------------------------------------


async def asked(client: TokenClient, subject: str, body: bytes) -> tuple[bytes, bytes]:
    """Headers and data of the first answer to a request."""
    ear, reply = Ear(), client.new_inbox()
    subscription = await client.listen(reply, ear)
    await client.publish(subject, body, reply=reply)
    await until(lambda: ear.heard)
    await client.deafen(subscription)
    return ear.heard[0][1:]


async def test_the_status_of_what_the_server_says_itself(rig: Rig, client: TokenClient, publish: Publish):
    get = "$JS.API.DIRECT.GET.CF_OUT"
    headers, _ = await asked(client, get, b'{"last_by_subj": "cf.out.T9.data.main"}')
    assert (status(headers), description(headers)) == (b"404", "Message Not Found")
    await publish(OUT, b"a", {"Some": "header"})

    async def answered() -> tuple[bytes, bytes] | None:
        found = await asked(client, get, b'{"seq": 1}')
        return None if status(found[0]) else found  # the broker has it, but need not have stored it yet

    headers, data = await until(answered)
    assert (status(headers), data, header(headers, b"Nats-Sequence"), header(headers, b"Some")) == (b"", b"a", b"1", b"header")
    ear, reply = Ear(), client.new_inbox()
    await client.listen(reply, ear)
    await client.publish(get, b'{"seq": 1, "next_by_subj": "cf.out.T1.data.main", "batch": 10}', reply=reply)
    await until(lambda: len(ear.heard) == 2)
    [(_, first, _), (_, last, _)] = ear.heard
    assert (status(first), status(last), description(last)) == (b"", b"204", "EOB")
    assert header(last, b"Nats-Num-Pending") == b"0"
    await rig.admin.delete_stream("CF_OUT")
    headers, data = await asked(client, get, b'{"seq": 1}')
    assert (status(headers), description(headers), data) == (b"503", "", b"")


names = st.text(string.ascii_letters + string.digits + "-_", min_size=1, max_size=20)
values = st.text(st.characters(exclude_categories=["Cs", "Cc", "Zl", "Zp"]), max_size=40).map(str.strip)
headers_of = st.dictionaries(names, values, max_size=8)


@given(headers_of, names)
def test_what_was_encoded_is_found(headers: dict[str, str], other: str):
    raw = encoded(headers)
    for name, value in headers.items():
        assert header(raw, name.encode()) == value.encode()
    assert status(raw) == b""
    if other not in headers:
        assert header(raw, other.encode()) == b""


@given(
    st.dictionaries(names, st.text(string.ascii_letters + string.digits + " :;,-_/", max_size=40).map(str.strip), min_size=1, max_size=8)
)
async def test_nats_py_reads_what_was_encoded(headers: dict[str, str]):
    assert await Client()._process_headers(encoded(headers)) == headers


@given(st.integers(100, 999), st.text(string.ascii_letters + " ", max_size=30), headers_of)
def test_a_status_and_its_words_are_found(code: int, words: str, headers: dict[str, str]):
    rest = encoded(headers).removeprefix(b"NATS/1.0")
    raw = f"NATS/1.0 {code} {words}".encode() + rest
    assert (status(raw), description(raw)) == (str(code).encode(), words)
    assert all(header(raw, name.encode()) == value.encode() for name, value in headers.items())
    bare = f"NATS/1.0 {code}".encode() + rest
    assert (status(bare), description(bare)) == (str(code).encode(), "")


@given(headers_of)
def test_nothing_is_found_in_nothing(headers: dict[str, str]):
    assert status(b"") == b""
    assert all(header(b"", name.encode()) == b"" for name in headers)


# --- nats-py ---------------------------------------------------------------------------------------------------


def test_the_private_hooks_of_nats_py_are_still_there():
    # TokenClient overrides `_process_msg`, to which the parser hands every message with its headers unread, and writes as
    # `_send_command` does, to `_pending`, which the flusher sends, all in one go, once `_flush_queue` wakes it; or where the flusher
    # writes, to `_io_writer` of its transport.
    # When this fails, nats-py changed and `TokenClient` must follow.
    assert list(inspect.signature(Client._process_msg).parameters) == ["self", "sid", "subject", "reply", "data", "headers"]
    assert inspect.iscoroutinefunction(Client._process_msg)
    assert "await self.nc._process_msg(sid, subject, reply, payload, hdr)" in inspect.getsource(Parser.parse)
    sending, flushing = inspect.getsource(Client._send_command), inspect.getsource(Client._flusher)
    assert "self._pending.append(cmd)" in sending
    assert "self._pending_data_size += len(cmd)" in sending
    assert "future: asyncio.Future = await self._flush_queue.get()" in flushing
    assert "self._transport.writelines(self._pending[:])\n                    self._pending = []" in flushing
    assert "return self._io_writer.writelines(payload)" in inspect.getsource(TcpTransport.writelines)
    # It answers requests by itself: what `request` builds of a reply, and asks of who publishes.
    assert "self._build_message(sid, subject, reply, data, hdr)" in inspect.getsource(Client._process_msg)
    assert "hdr = await self._process_headers(headers)" in inspect.getsource(Client._process_msg)
    own, theirs = (list(inspect.signature(kind.request).parameters.values()) for kind in (TokenClient, Client))
    assert [(each.name, each.default) for each in own] == [(each.name, each.default) for each in theirs]
    # And nobody is woken for what is published: all else of nats-py comes through here.
    assert "await self._flush_pending()" in inspect.getsource(Client._send_publish)
    assert list(inspect.signature(Client._flush_pending).parameters) == ["self", "force_flush"]
    client = Client()
    for attribute in (
        "_flush_queue",
        "_pending",
        "_pending_data_size",
        "_max_pending_size",
        "_subs",
        "_error_cb",
        "_reconnection_task",
        "_server_info",
    ):
        assert hasattr(client, attribute), attribute
    subscription = inspect.getsource(Subscription)
    assert "self._id = id" in subscription
    assert "self._pending_queue: asyncio.Queue[Msg] = asyncio.Queue(" in subscription
    # What `listen` takes the place of: with a future there is neither a task nor an iterator, and a queue is used by those alone.
    assert "        elif self._future:\n            # Used to handle the single response from a request.\n            pass" in subscription


def test_the_map_republishes_to_where_the_tests_listen():
    assert Layout().named("CF_OUT").republish == ("cf.out.*.data.*", "cf.live.{{wildcard(1)}}.{{wildcard(2)}}")
