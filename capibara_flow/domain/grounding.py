"""What a turn is grounded by: the question that is looked for, and the parts of a step put together. Pure."""

import re
from collections.abc import Iterable, Sequence

from pydantic import ValidationError

from capibara_flow.domain.lexical import fold
from capibara_flow.errors import BadRequest
from topics.chat import CallExpert, ChatMessage, ChatRequest
from topics.grounding import PartDone

_SHORT = 6  # words: a question of no more may rest on the one before
_MOST = 2000  # characters of a question that are looked for: the beginning and the end of a longer one
#: What a part may give to the call that follows.
_GIFTS = frozenset({"sources", "context"})

#: A greeting, a thank-you or a goodbye, or several of them, and nothing else; read without accents.
_COURTESY = re.compile(
    r"(?:\W*\b(?:hi|hey|hello|hola|good (?:morning|afternoon|evening|night)|buenos dias|buen dia|buenas(?: (?:tardes|noches))?"
    r"|how are you|que tal|como (?:estas?|va)|thanks|thank you|(?:so|very) much|a lot|(?:muchas |mil )?gracias"
    r"|(?:good)?bye|adios|chau|hasta (?:luego|pronto|manana))\b)+\W*"
)
_LONGEST_COURTESY = 80  # characters

_FENCED = re.compile(r"```.*?(?:```|\Z)|`[^`\n]*`", re.DOTALL)
_CITED = re.compile(r"\[\s*(\d{1,4}(?:\s*(?:[,;]|-|–)\s*\d{1,4})*)\s*\]")
_NUMBER = re.compile(r"(\d+)(?:\s*[-–]\s*(\d+))?")


def query(request: ChatRequest) -> str:
    """What is looked for: the last question, with the one before it where it is too short to stand alone."""
    asked = [message.text.strip() for message in request.messages if message.role == "user" and message.text.strip()]
    last = asked[-1] if asked else ""
    if len(asked) > 1 and len(last.split()) <= _SHORT:
        last = f"{asked[-2]}\n{last}"
    return last if len(last) <= _MOST else f"{last[: _MOST // 2]}\n{last[-_MOST // 2 :]}"


def is_courtesy(request: ChatRequest) -> bool:
    """Whether the last that the user says only greets, thanks or takes leave: no document bears on that."""
    said = request.question.strip()
    return len(said) <= _LONGEST_COURTESY and _COURTESY.fullmatch(fold(said)) is not None


def grounded(request: ChatRequest, context: str) -> ChatRequest:
    """*request* with *context* in its system message: some templates take one only, and only as the first."""
    if not context:
        return request
    first, *others = request.messages
    if first.role == "system":
        messages = (ChatMessage(role="system", content=f"{first.text}\n\n{context}"), *others)
    else:
        messages = (ChatMessage(role="system", content=context), *request.messages)
    return request.model_copy(update={"messages": messages})


def put_together(call: CallExpert, shares: Iterable[PartDone]) -> CallExpert:
    """*call* with what all *shares* give to it; raises ``BadRequest`` when that cannot be."""
    gifts = {name: value for share in shares for name, value in share.gives.items() if name in _GIFTS}
    if not gifts:
        return call
    try:
        return CallExpert.model_validate({**call.model_dump(), **gifts})
    except ValidationError as error:
        raise BadRequest(f"what a worker gave cannot be used: {error.errors()[0]['msg']}") from error


def citations(answer: str, numbers: Sequence[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Which of the sources with these *numbers* an answer cites, and which numbers it cites that no source has; each once, in order.

    ``[1]``, ``[1, 3]`` and ``[2-4]`` are citations, except in code.
    """
    there = set(numbers)
    cited: dict[int, bool] = {}
    for found in _CITED.finditer(_FENCED.sub(" ", answer)):
        for first, last in _NUMBER.findall(found[1]):
            begin, end = int(first), int(last or first)
            span = range(begin, end + 1) if begin <= end <= begin + len(there) else (begin, end)
            cited.update((number, number in there) for number in span)
    return tuple(n for n, known in cited.items() if known), tuple(n for n, known in cited.items() if not known)
