"""Usage: what experts did for tenants, day by day, to be asked for."""

from datetime import date
from typing import Annotated, ClassVar

from pydantic import Field

from topics.message import Part, Refusable, Request

#: Seconds since the epoch, as long as years have four digits.
Moment = Annotated[float, Field(ge=0, lt=253_402_300_800)]


class ReadUsage(Request):
    """Tell what *tenant*, or everybody where none is named, used from *since* to before *until*; the reply is a ``UsageListing``."""

    pattern: ClassVar[str] = "cf.ctl.{turn}.usage"
    tenant: str | None = None
    since: Moment
    until: Moment


class UsageDay(Part):
    """What *expert* did for *tenant* on *day* (UTC): *answers* that came to an end, and their tokens as the clients were told them."""

    day: date
    tenant: str
    expert: str
    answers: int
    prompt_tokens: int
    completion_tokens: int


class UsageListing(Refusable):
    """Usage by day, tenant and expert, as far as it is written down.

    *waiting* facts were not yet when it was read; there is *more* than one reply takes: ask for a shorter time, or for one tenant.
    """

    days: tuple[UsageDay, ...] = ()
    waiting: int = 0
    more: bool = False
