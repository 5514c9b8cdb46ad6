"""A fake of ``ports.UsageLog`` that remembers."""

from collections import Counter
from dataclasses import dataclass, field
from datetime import UTC, datetime

from capibara_flow.ports import Spent, SpentDay


@dataclass
class FakeUsage:
    """``ports.UsageLog``: *kept* is by turn, branch and time."""

    kept: dict[tuple[str, str, datetime], Spent] = field(default_factory=dict)

    async def record(self, *spent: Spent) -> None:
        for each in spent:
            self.kept.setdefault((each.turn, each.branch, each.when), each)

    async def by_day(self, since: datetime, until: datetime, tenant: str | None = None) -> list[SpentDay]:
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
