"""One embedded PostgreSQL for all of a process: it runs as long as anybody uses it, and what was written stays."""

import asyncio
import shutil
from pathlib import Path

import psutil
import pytest

from capibara_flow.engines.postgres.database import Database
from capibara_flow.engines.postgres.usage import PostgresUsage
from capibara_flow.settings import KnowledgeSettings
from capibara_flow.wiring import knowledge
from capibara_flow.wiring.knowledge import PASSAGES, library
from capibara_flow.wiring.postgres import embedded, postgres
from tests.engines.test_postgres import counts_usage
from tests.waiting import until


async def test_all_users_have_the_same_server_and_it_ends_behind_the_last(postgres_made: Path, tmp_path: Path):
    shutil.copytree(postgres_made, tmp_path / "postgres")
    settings = KnowledgeSettings(folder=tmp_path)
    server = embedded(settings)
    for _ in range(2):
        async with postgres(settings, passing=True) as passing:
            assert not server.wanted
            async with asyncio.TaskGroup() as group:
                several = [group.create_task(_url(settings)) for _ in range(3)]
            assert {each.result() for each in several} == {passing}
            async with postgres(settings) as lasting:
                assert (lasting, server.wanted) == (passing, True)
            assert not server.wanted
            database = Database(passing)
            await counts_usage(PostgresUsage(database))
            await database.aclose()
        assert not _running(tmp_path)


async def _url(settings: KnowledgeSettings) -> str:
    async with postgres(settings) as url:
        await asyncio.sleep(0.01)
        return url


def _running(folder: Path) -> list[int]:
    found = []
    for process in psutil.Process().children(recursive=True):
        if process.name() == "postgres" and str(folder) in " ".join(process.cmdline()) + process.cwd():
            found.append(process.pid)
    return found


async def test_a_server_that_is_named_is_taken_as_it_is_and_none_is_started(tmp_path: Path):
    async with postgres(KnowledgeSettings(postgres="postgresql://h/d", folder=tmp_path / "nowhere")) as url:
        assert url == "postgresql://h/d"


async def test_stores_that_are_just_being_opened_are_left_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    opening, said = asyncio.Event(), []

    async def slow(*_: object) -> None:
        opening.set()
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(1.2)  # a server that has just begun to start
            said.append("ended")

    monkeypatch.setattr(knowledge, "_open", slow)
    async with library(KnowledgeSettings(folder=tmp_path)) as found:
        waiting = asyncio.create_task(found.opened())
        await opening.wait()
    assert said == ["ended"]
    with pytest.raises(asyncio.CancelledError):
        await waiting


async def test_usage_in_the_folder_opens_no_documents_and_documents_do(tmp_path: Path):
    (tmp_path / "postgres").mkdir()
    settings = KnowledgeSettings(folder=tmp_path)
    async with library(settings) as found:
        assert found._looking is None
    (tmp_path / PASSAGES).touch()
    async with library(settings) as found:
        assert found._looking is not None
        await until(lambda: found._opening is not None)
