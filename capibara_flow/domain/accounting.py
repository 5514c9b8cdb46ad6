"""What an ended call counts for."""

from datetime import UTC, datetime

from capibara_flow.errors import BadRequest
from capibara_flow.ports import Spent
from topics.chat import ExpertCalled

_MOST = 2**31 - 1  # tokens of one answer: what engines count in
_LAST = datetime(9999, 1, 1, tzinfo=UTC).timestamp()


def spent(fact: ExpertCalled, tenant: str) -> Spent | None:
    """What *tenant* used with the answer that ended with *fact*, or none when it did not end with it; raises ``BadRequest``.

    Counted are the tokens that the client was told in ``Usage``, which are to be billed: the prompt as the last attempt had it, and all
    of the answer that the client holds, whoever made it. The fact of the last call has them for all attempts together, so that of an
    answer that was passed on only this one counts, for the expert who ended it. What was burnt in vain is nobody's usage: it stays in the
    log. An answer that was given again from the cache counts as it was told; one that failed has no such fact, and does not count.
    What is written down stays when its turn is erased: it has figures and no words.
    """
    if not fact.final:
        return None
    tokens = fact.prompt_tokens, fact.completion_tokens
    if not all(0 <= count <= _MOST for count in tokens):
        raise BadRequest(f"{tokens[0]} and {tokens[1]} are no numbers of tokens")
    if not 0 <= fact.ended <= _LAST:
        raise BadRequest(f"a call that ended at {fact.ended}: that is no time")
    return Spent(tenant, fact.expert, *tokens, datetime.fromtimestamp(fact.ended, UTC), fact.turn, fact.branch)
