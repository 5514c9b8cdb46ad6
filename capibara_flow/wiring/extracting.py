"""The expert that lists what documents mention, if one is to do it."""

from collections.abc import Sequence
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING

from capibara_flow.domain.fleet import Fleet
from capibara_flow.engines.pools import Pools
from capibara_flow.errors import EngineBusy
from capibara_flow.settings import Settings, SettingsError
from capibara_flow.wiring.fleets import watched_fleet
from topics.knowledge import Mention, Passage

if TYPE_CHECKING:
    from capibara_flow.runtime.ingesting import Extract


async def extractor(settings: Settings, stack: AsyncExitStack) -> "Extract | None":
    """Who finds what passages mention, as the fleet has it at the moment of asking; nobody when no expert is named for it.

    Raises ``SettingsError`` when the fleet has no such expert with an address.
    """
    name = settings.knowledge.extractor
    if not name:
        return None
    fleet = await watched_fleet(settings, stack, lambda fleet: pools.reload(alone(fleet, name)))
    pools = Pools(alone(fleet.value, name))
    stack.push_async_callback(pools.aclose)

    async def extract(passages: Sequence[Passage], title: str) -> Sequence[Mention]:
        from capibara_flow.engines.extracting import ExpertExtractor  # noqa: PLC0415  needs what only who has documents has

        engine = next(iter(pools.values()), None)
        if engine is None:
            raise EngineBusy(f"{name}, which lists what documents mention, is not in the fleet now")
        return await ExpertExtractor(engine)(passages, title)

    return extract


def alone(fleet: Fleet, name: str) -> Fleet:
    """*fleet* with the expert called *name* and nobody else."""
    expert = fleet.find(name)
    if expert is None or not expert.urls:
        there = ", ".join(each.name for each in fleet.active if each.urls) or "none"
        raise SettingsError(f"CAPIBARA_KNOWLEDGE__EXTRACTOR: no expert with an address is called {name!r}; there are: {there}")
    return fleet.model_copy(update={"experts": (expert,)})
