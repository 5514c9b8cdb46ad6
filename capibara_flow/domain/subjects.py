"""What a conversation is about now: the last question, and the one before where it makes no sense alone."""

import re
from collections.abc import Sequence

from capibara_flow.domain.lexical import fold
from topics.chat import ChatMessage

#: Earlier questions that a chain of follow-ups may reach back over.
_FURTHEST = 4

#: Characters of a text that is read whole, and of the two ends that are read of a longer one.
_LONG, _FIRST, _LAST = 600, 200, 140

#: A question that goes on with the one before: "and in Java?", "¿y en Java?", "shorter, please", "now with tests".
_GOES_ON = re.compile(
    r"^\W*(and|but|or|also|then|now|so|what about|how about|same|again|instead|otherwise|more|less|shorter|longer|another"
    r"|why not|continue|go on|y|e|o|pero|tambien|ademas|entonces|ahora|luego|igual|lo mismo|otra|otro|de nuevo|en cambio"
    r"|mas|menos|sigue|continua|que tal (con|en|si))\b"
)

#: Words that stand for something said before: it must be known what.
_POINTS_BACK = re.compile(
    r"\b(it|that|this|those|these|them|eso|esto|aquello|ello|(haz|di|pon)(lo|la)"
    r"|(explic|mejor|arregl|acort|alarg|cambi|corrig|resum)(a|e)(me)?l[oa]"
    r"|\w{2,}(ar|er|ir)l[oa])\b"
)

#: What is whole although it is short.
_WHOLE = re.compile(
    r"^\W*(hi|hey|hello|hola|ola|buen[ao]s?|gracias|thanks?|thank you|thx|bye|chau|adios|good (morning|evening|night)|ok(ay)?|vale"
    r"|perfect[oa]?|genial|great|cool|jaja\w*|haha\w*|lol)\b"
)


def subject_of(messages: Sequence[ChatMessage]) -> str:
    """The text that routing looks at: the last user message, and below it the earlier ones that it goes on with.

    ``["sort a list in Python", "and in Java?"]`` gives ``"and in Java?\\nsort a list in Python"``; a question that stands by itself
    is given alone. Of long texts only the ``gist`` is there. Empty when no user said anything.
    """
    said = [message.text.strip() for message in messages if message.role == "user" and message.text.strip()]
    subject: list[str] = []
    for text in reversed(said[-_FURTHEST:]):
        subject.append(gist(text))
        if not is_elliptic(text):
            break
    return "\n".join(subject)


def gist(text: str) -> str:
    """A long text's two ends, for what is asked stands before or behind what it is asked about; a shorter text as it is."""
    return text if len(text) <= _LONG else f"{text[:_FIRST]}\n{text[-_LAST:]}"


def is_elliptic(text: str) -> bool:
    """Whether *text* is so short, and so joined to what was said before, that alone it may mean anything."""
    folded = fold(text)
    words = re.findall(r"\w+", folded)
    if not words or _WHOLE.search(folded) or "\n" in text:
        return not words
    if _GOES_ON.search(folded):
        return len(words) <= 10
    return len(words) <= 2 or (len(words) <= 6 and bool(_POINTS_BACK.search(folded)))
