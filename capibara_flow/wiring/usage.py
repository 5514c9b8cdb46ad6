"""The books of this installation: usage in the PostgreSQL that documents have as well."""

import importlib.util
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from capibara_flow.errors import CannotStart
from capibara_flow.ports import UsageLog
from capibara_flow.runtime.accounting import Backlog, Books, Habits
from capibara_flow.runtime.client import TokenClient
from capibara_flow.settings import KnowledgeSettings, Settings
from capibara_flow.wiring.postgres import embedded, postgres
from capibara_flow.wiring.streams import layout
from topics.streams import DAY, accountant_consumer


def uncounted(settings: Settings) -> str:
    """Why no usage can be counted here, and what to do about it; empty when it can."""
    knowledge = settings.knowledge
    if not (knowledge.postgres or knowledge.folder):
        return "usage has no place: set CAPIBARA_KNOWLEDGE__POSTGRES to the URL of a PostgreSQL, or CAPIBARA_KNOWLEDGE__FOLDER to a folder"
    if not settings.log.enabled:
        return "usage is counted from the log of turns, which is off: CAPIBARA_LOG__ENABLED=true brings it back"
    if importlib.util.find_spec("asyncpg") is None:
        return "usage needs asyncpg: `pip install 'capibara-flow[rag]'` brings it"
    return ""


def books(settings: Settings, client: TokenClient) -> Books:
    """The books of *settings*, which see by *client* what waits; raises ``CannotStart`` where none can be kept.

    With a server that is named they are always open. The embedded one is for documents first: it is started for usage alone only when
    somebody asks, or before facts are forgotten.
    """
    if why := uncounted(settings):
        raise CannotStart(why)
    knowledge, kept = settings.knowledge, float(settings.log.turn_age_seconds)
    backlog = Backlog(client, accountant_consumer(), layout(settings))
    habits = Habits(due=min(DAY, kept / 2), kept=kept, look=min(30.0, kept / 20))
    if knowledge.postgres:
        return Books(lambda: _log(knowledge), backlog, habits, always=True)
    server = embedded(knowledge)
    return Books(lambda: _log(knowledge), backlog, habits, wanted=lambda: server.wanted)


@asynccontextmanager
async def _log(settings: KnowledgeSettings) -> AsyncIterator[UsageLog]:
    from capibara_flow.engines.postgres.database import Database  # noqa: PLC0415  only who opens the books loads it
    from capibara_flow.engines.postgres.usage import PostgresUsage  # noqa: PLC0415

    async with postgres(settings, passing=True) as url:
        log = PostgresUsage(Database(url, connections=2))
        try:
            yield log
        finally:
            await log.aclose()
