"""A fake of ``ports.UsageLog`` that remembers."""

import asyncio
from collections import Counter
from dataclasses import dataclass, field
from datetime import UTC, datetime

from capibara_flow.errors import BadRequest, StoreUnavailable
from capibara_flow.ports import Spent, SpentDay


@dataclass
class FakeUsage:
    """``ports.UsageLog``: *kept* is by turn, branch and time; *statements* counts what was written at once.

    While it is *away* it cannot be reached; *lost* answers of it do not arrive, though it has done what it was asked.
    """

    kept: dict[tuple[str, str, datetime], Spent] = field(default_factory=dict)
    statements: list[int] = field(default_factory=list)
    away: bool = False
    lost: int = 0

    async def record(self, *spent: Spent) -> None:
        await asyncio.sleep(0.01)
        self._check()
        if any("\0" in each.expert for each in spent):
            raise BadRequest("a store cannot keep this")
        self.statements.append(len(spent))
        for each in spent:
            self.kept.setdefault((each.turn, each.branch, each.when), each)
        if self.lost:
            self.lost -= 1
            raise StoreUnavailable("no answer came")

    async def by_day(self, since: datetime, until: datetime, tenant: str | None = None) -> list[SpentDay]:
        self._check()
        answers, prompt, completion = Counter(), Counter(), Counter()
        for each in self.kept.values():
            if since <= each.when < until and tenant in (None, each.tenant):
                where = (each.when.astimezone(UTC).date(), each.tenant, each.expert)
                answers[where] += 1
                prompt[where] += each.prompt_tokens
                completion[where] += each.completion_tokens
        return [SpentDay(*where, answers[where], prompt[where], completion[where]) for where in sorted(answers)]

    async def aclose(self) -> None:
        return None

    def _check(self) -> None:
        if self.away:
            raise StoreUnavailable("the store cannot be reached")
