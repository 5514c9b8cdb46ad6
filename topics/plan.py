"""The routing slip: what is still to be done for a turn travels with the turn."""

from pydantic import Field

from topics.message import Part


class Step(Part):
    """One stage of a plan, done by the worker of that name."""

    stage: str
    expert: str | None = None


class Plan(Part):
    """The steps that are left, first things first."""

    steps: tuple[Step, ...] = Field(default=(), max_length=32)

    @property
    def head(self) -> Step | None:
        """The next step, or none when the turn is complete."""
        return self.steps[0] if self.steps else None

    def after(self) -> "Plan":
        """The plan once its head is done."""
        return Plan(steps=self.steps[1:])
