"""The ears of a ``TokenClient`` over a stream in memory: what is delivered, when and how often is the test's choice."""

import asyncio
import base64
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from nats.aio.msg import Msg

from capibara_flow.runtime.client import Hear, encoded
from topics.output import Output

_FIRST, _STRIDE = 11, 3  # sequences of one turn have gaps: other turns are stored between them


@dataclass(eq=False)
class Subscription:
    """What ``listen`` gives."""

    subject: str
    hear: Hear


@dataclass
class MemoryClient:
    """As much of a ``TokenClient`` as a reader of turns needs; *messages* of one turn are stored, *asked* counts reads of them."""

    messages: list[bytes] = field(default_factory=list)
    ears: list[Subscription] = field(default_factory=list)
    asked: int = 0
    published: list[str] = field(default_factory=list)
    sent: list[str] = field(default_factory=list)
    is_connected: bool = True
    is_closed: bool = False
    max_payload: int = 8 * 1024 * 1024

    async def listen(self, subject: str, hear: Hear) -> Subscription:
        self.ears.append(Subscription(subject, hear))
        return self.ears[-1]

    async def deafen(self, subscription: Subscription) -> None:
        if subscription in self.ears:
            self.ears.remove(subscription)

    def new_inbox(self) -> str:
        return f"_INBOX.{len(self.published)}"

    def jetstream(self) -> "MemoryClient":
        return self

    async def publish(self, subject: str, payload: bytes = b"", reply: str = "", **_: Any) -> None:
        self.published.append(subject)
        if subject.startswith("$JS.API.DIRECT.GET."):
            self.asked += 1
            await asyncio.sleep(0)  # the live feed goes on meanwhile
            self._answer(json.loads(payload), reply)
            await asyncio.sleep(0)

    def send(self, subject: str, payload: bytes, *, reply: str, headers: bytes) -> None:
        self.sent.append(subject)

    async def request(self, subject: str, payload: bytes = b"", **_: Any) -> Msg:
        """What the stream's leader says of one message, or of the last; there are no readers."""
        asked = json.loads(payload)
        places = range(len(self.messages)) if subject == "$JS.API.STREAM.MSG.GET.CF_OUT" else ()
        found = [place for place in places if asked.get("seq", self.sequence(place)) == self.sequence(place)]
        if not found:
            return Msg(cast(Any, self), data=json.dumps({"error": {"err_code": 10037}}).encode())
        data = base64.b64encode(self.messages[found[-1]]).decode()
        message = {"subject": "?", "seq": self.sequence(found[-1]), "data": data}
        return Msg(cast(Any, self), data=json.dumps({"message": message}).encode())

    def _answer(self, asked: dict[str, Any], reply: str) -> None:
        stored = [(self.sequence(place), data) for place, data in enumerate(self.messages)]
        found = [each for each in stored if each[0] >= asked["seq"]][: asked["batch"]]
        for sequence, data in found:
            self._hear(reply, encoded({"Nats-Sequence": str(sequence)}), data)
        self._hear(reply, b"NATS/1.0 204 EOB\r\n\r\n" if found else b"NATS/1.0 404 Message Not Found\r\n\r\n", b"")

    def _hear(self, subject: str, headers: bytes, data: bytes) -> None:
        for each in list(self.ears):
            if each.subject == subject or (subject == "live" and each.subject.startswith("cf.live.")):
                each.hear(each.subject.encode(), headers, data)

    @staticmethod
    def sequence(place: int) -> int:
        """The stream sequence of the message at *place*, counted from 0."""
        return _FIRST + _STRIDE * place

    @property
    def listened(self) -> bool:
        """Whether anybody listens to the live feed."""
        return any(each.subject.startswith("cf.live.") for each in self.ears)

    def store(self, outputs: Sequence[Output]) -> int:
        """Store *outputs* as one message, unheard; its place."""
        self.messages.append(b"\n".join(each.line() for each in outputs))
        return len(self.messages) - 1

    def deliver(self, place: int) -> None:
        """Let the message at *place* be heard on the live feed."""
        previous = self.sequence(place - 1) if place else 0
        self._hear("live", encoded({"Nats-Sequence": str(self.sequence(place)), "Nats-Last-Sequence": str(previous)}), self.messages[place])

    def say(self, *outputs: Output) -> None:
        """Store each of *outputs* in a message of its own, and let it be heard."""
        for each in outputs:
            self.deliver(self.store([each]))
