"""Who has documents, by what retrievers tell."""

from typing import Any

from capibara_flow.runtime.holdings import Holdings
from tests.waiting import until


async def test_whoever_has_documents_is_known_as_long_as_a_retriever_tells() -> None:
    told: list[dict[str, Any]] = [{"worker": "retriever", "facts": {"tenants": ["acme"]}}]

    async def reports() -> list[dict[str, Any]]:
        return told

    holdings = Holdings(reports, every=0.01)
    assert not holdings("acme")
    holdings.start()
    await until(lambda: holdings("acme"))
    assert not holdings("other")
    told[:] = []
    await until(lambda: not holdings("acme"))
    await holdings.stop()


async def test_reports_of_others_and_of_other_versions_tell_nothing() -> None:
    looks = []

    async def reports() -> list[dict[str, Any]]:
        looks.append(1)
        strange = [{}, {"worker": "retriever"}, {"worker": "retriever", "facts": {"tenants": "acme"}}]
        return [*strange, {"worker": "caller", "facts": {"tenants": ["acme"]}}, {"worker": "retriever", "facts": {"tenants": [1, None]}}]

    holdings = Holdings(reports, every=0.01)
    holdings.start()
    await until(lambda: len(looks) > 2)
    assert not holdings("acme")
    await holdings.stop()
