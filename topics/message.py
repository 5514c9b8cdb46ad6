"""What travels: a message knows its subject, is frozen, and refuses what it does not know."""

from typing import ClassVar, Self

from pydantic import BaseModel, ConfigDict

#: The headers that every message carries beside its body: who asked, until when, and the trace it belongs to.
TENANT, PRINCIPAL, DEADLINE, TRACE = "Cf-Tenant", "Cf-Principal", "Cf-Deadline", "traceparent"
#: And those of a turn that was forked from another one: that turn's id.
ORIGIN = "Cf-Origin"


class Part(BaseModel):
    """A piece of a message: frozen, and closed to unknown fields."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)  # inputs are people's words, errors go to logs


class Message(Part):
    """Base of all that is published; ``pattern`` is its subject with the names of its fields in braces."""

    pattern: ClassVar[str]
    turn: str

    @property
    def subject(self) -> str:
        """The subject that this very message is published to."""
        return self.pattern.format_map(_Fields(self))

    @property
    def dedupe(self) -> str:
        """Id under which JetStream stores this message at most once (``Nats-Msg-Id``)."""
        return f"{self.turn}:{type(self).__name__}"

    @classmethod
    def subjects(cls) -> str:
        """The NATS wildcard that matches every subject of this kind of message."""
        return ".".join("*" if token.startswith("{") else token for token in cls.pattern.split("."))

    @classmethod
    def read(cls, body: bytes) -> Self:
        """Parse *body*; raises ``pydantic.ValidationError`` on anything unexpected."""
        return cls.model_validate_json(body)


class _Fields(dict[str, str]):
    """Attributes of a message, looked up on demand by ``str.format_map``."""

    def __init__(self, message: Message) -> None:
        super().__init__()
        self._message = message

    def __missing__(self, name: str) -> str:
        return str(getattr(self._message, name))


class Command(Message):
    """Asks one worker to do one thing; lives in a work queue until somebody has done it."""


class Event(Message):
    """States one thing that happened."""


class Signal(Message):
    """Tells everybody who is concerned at once; whoever comes later finds the last one."""


class Share(Message):
    """One worker's part of what several do at the same time; kept until all parts are in."""


class Request(Message):
    """Asks one worker for something and waits for its reply; nobody keeps it."""


class Refusal(Part):
    """Why a request was not done: the problem's title and detail, its HTTP status, and whether asking again may help."""

    title: str
    detail: str
    status: int
    retryable: bool = False


class Refusable(Part):
    """A reply that may be *refused* instead of what was asked for."""

    refused: Refusal | None = None
