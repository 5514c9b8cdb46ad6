"""One look at stores that change meanwhile: of each document its ready edition, whole, or nothing."""

from collections.abc import Awaitable, Callable, Collection, Iterable, Sequence

from capibara_flow.domain.ingesting import edition_in
from capibara_flow.ports import Standing
from topics.knowledge import Scope

#: Which editions of documents are ready: ``ports.Documents.standing``.
Stand = Callable[[Scope, Sequence[str]], Awaitable[Standing]]


class Moved(Exception):
    """A document that was looked for became ready in another edition meanwhile: who looks again sees that one whole."""


class View:
    """How *scope* stands from ``begin`` on, as *stand* tells; without it all that is found counts, as in a library that nobody changes.

    Passages that a release took in before there were editions count as long as they are there. A *last* view is not ``Moved``.
    """

    def __init__(self, scope: Scope, stand: Stand | None, *, last: bool = False) -> None:
        self._scope, self._stand, self._last = scope, stand, last
        self._since = 0

    async def begin(self) -> None:
        """Note how things stand, before anything is looked for."""
        if self._stand is not None:
            self._since = (await self._stand(self._scope, ())).revision

    async def ready(self, passages: Collection[str]) -> set[str]:
        """Those of *passages* (ids) that belong to an edition that is ready, and was when the look began; raises ``Moved``."""
        if self._stand is None:
            return set(passages)
        known = {id: edition_in(id) for id in passages}
        editions = await self._editions(told[0] for told in known.values() if told)
        return {id for id, told in known.items() if told is None or editions.get(told[0]) == told[1]}

    async def whole(self, wanted: Sequence[str], there: Collection[str]) -> None:
        """Raise ``Moved`` when what is not *there* any more of the *wanted* passages (ids) was replaced meanwhile."""
        missing = {told[0] for id in wanted if id not in there and (told := edition_in(id))}
        if missing and self._stand is not None:
            await self._editions(missing)

    async def _editions(self, documents: Iterable[str]) -> dict[str, str]:
        """Which edition of each of *documents* is ready; raises ``Moved``."""
        if self._stand is None or not (ids := sorted(set(documents))):
            return {}
        standing = await self._stand(self._scope, ids)
        if not self._last and any(each.revision > self._since for each in standing.editions.values()):
            raise Moved
        return {id: each.name for id, each in standing.editions.items()}
