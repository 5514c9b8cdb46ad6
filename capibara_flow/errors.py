"""
Two questions decide every error's name: may we try again, and who must know?

* CapibaraError
  x Transient             the message comes again after a delay; the client waits
    - EngineFault         an engine cannot answer now
      - EngineBusy        it asked us to slow down
      - EngineUnreachable no connection, or none in time
      - EngineBroke       the stream ended without a finish reason, or stalled
    - LeaseLost           somebody else writes this answer now
    - BrokerUnavailable   the broker did not acknowledge in time
    - StoreUnavailable    a store of passages, entities or documents cannot be reached
      - StoreInUse        an embedded one is in the hands of another process
  x Terminal              the turn ends with a ``Failed`` that the client sees
    - BadRequest          the engine or a stage refuses this request for what it is
    - UnknownExpert       nobody of that name serves here
    - TurnExpired         its deadline has passed
    - TurnUnknown         no such turn
    - TurnGone            its output, or the part that is asked for, has aged out
    - KeyReused           an idempotency key that stood for another request
    - TooLarge            larger than the broker takes at once
    - EngineRefusesUs     the engine does not take the key that we are configured with
    - QueueFull           the queue takes no more now
    - Unauthorized        no key, or one that nobody has
    - EmbedderMismatch    what is kept was embedded by another model
    - DocumentRefused     a document that cannot be read, or is not worth keeping
    - DocumentUnknown     no such document
    - CannotStart         something that should run on this machine cannot
"""

from typing import ClassVar


class CapibaraError(Exception):
    """Base of everything that we raise on purpose; *status* is its HTTP face."""

    status: ClassVar[int] = 500
    retryable: ClassVar[bool] = False

    @property
    def title(self) -> str:
        """The name of the problem in words: ``EngineBusy`` is "engine busy"."""
        name = type(self).__name__
        return "".join(f" {letter.lower()}" if letter.isupper() else letter for letter in name).strip()


class Transient(CapibaraError):
    """Trying again later may help."""

    status = 503
    retryable = True


class EngineFault(Transient):
    """An engine cannot answer now; another one may."""


class EngineBusy(EngineFault):
    """The engine asked us to slow down."""


class EngineUnreachable(EngineFault):
    """No connection to the engine, or none in time."""

    status = 502


class EngineBroke(EngineFault):
    """The engine's stream ended without a finish reason, reported an error, or stalled."""

    status = 502


class LeaseLost(Transient):
    """Somebody else writes this answer now: what we were about to say was refused."""


class BrokerUnavailable(Transient):
    """The broker did not acknowledge in time."""


class StoreUnavailable(Transient):
    """A store of passages, entities or documents cannot be reached."""


class StoreInUse(StoreUnavailable):
    """An embedded store has one owner at a time, and that is another process, which may end."""


class Terminal(CapibaraError):
    """Trying again cannot help."""


class BadRequest(Terminal):
    """The engine or a stage refuses this request for what it is."""

    status = 400


class UnknownExpert(Terminal):
    """Nobody of that name serves here."""

    status = 404


class TurnExpired(Terminal):
    """The turn's deadline has passed."""

    status = 504


class TurnUnknown(Terminal):
    """No such turn."""

    status = 404


class TurnGone(Terminal):
    """The turn's output, or the part of it that is asked for, is no longer kept."""

    status = 410


class KeyReused(Terminal):
    """The idempotency key stood for another request before."""

    status = 422


class TooLarge(Terminal):
    """The request is larger than the broker takes at once."""

    status = 413


class EngineRefusesUs(Terminal):
    """The engine does not take the key that we are configured with: no fault of the client."""

    status = 502


class EmbedderMismatch(Terminal):
    """What is kept was embedded by another model, whose vectors cannot be compared."""

    status = 409


class DocumentRefused(Terminal):
    """A document that cannot be read, or in which there is nothing to find."""

    status = 422


class DocumentUnknown(Terminal):
    """No such document, or somebody else's."""

    status = 404


class QueueFull(Terminal):
    """The queue takes no more now; the client may come again after a while."""

    status = 503
    retryable = True


class Unauthorized(Terminal):
    """No key, or one that nobody has."""

    status = 401


class CannotStart(Terminal):
    """Something that should run on this machine cannot; the message says what to do about it, and until then it is not served."""

    status = 503
