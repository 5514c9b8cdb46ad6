"""Asking whoever serves a request, and reading the reply; and what is told of an error to whoever asked."""

from nats.errors import Error as NatsError
from nats.errors import NoRespondersError
from pydantic import ValidationError

from capibara_flow.domain.refusing import Refused
from capibara_flow.errors import BrokerUnavailable, CapibaraError, TooLarge
from capibara_flow.ports import Reply
from capibara_flow.runtime.client import TokenClient
from capibara_flow.runtime.output import fits
from topics.message import Refusable, Refusal, Request


def refusal(error: CapibaraError) -> Refusal:
    """What to tell of *error* whoever asked."""
    return Refusal(title=error.title, detail=str(error), status=error.status, retryable=error.retryable)


async def replied(
    client: TokenClient,
    request: Request,
    reply: type[Reply],
    *,
    seconds: float,
    nobody: str,
    late: str = "no answer came in time; ask again",
) -> Reply:
    """The reply to *request*, within *seconds*.

    Raises ``BrokerUnavailable`` that says so when *nobody* is there to reply, or it comes too *late* or not as expected, ``TooLarge``, and
    ``Refused`` when the reply says that it was not done.
    """
    body = request.model_dump_json(exclude_none=True).encode()
    if not fits(client, body):
        raise TooLarge(f"{len(body)} bytes are more than the broker takes at once")
    try:
        message = await client.request(request.subject, body, timeout=seconds, headers={"content-type": "application/json"})
        answer = reply.model_validate_json(message.data)
    except NoRespondersError as error:
        raise BrokerUnavailable(nobody) from error
    except (NatsError, TimeoutError, ValidationError) as error:
        raise BrokerUnavailable(late) from error
    if isinstance(answer, Refusable) and answer.refused:
        raise Refused(answer.refused)
    return answer
