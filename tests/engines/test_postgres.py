"""PostgreSQL beyond the suite of all lists of documents: our own server, its faults and its end; migrations; usage."""

import asyncio
import os
import shutil
import sys
import tempfile
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, timedelta
from pathlib import Path

import asyncpg
import psutil
import pytest

from capibara_flow.engines.keys import scope_key
from capibara_flow.engines.postgres import binaries
from capibara_flow.engines.postgres.binaries import find_binaries
from capibara_flow.engines.postgres.database import Database
from capibara_flow.engines.postgres.documents import PostgresDocuments
from capibara_flow.engines.postgres.embedded import EmbeddedPostgres
from capibara_flow.engines.postgres.migrations import APPLIED, HYPERTABLE, SCHEMA, STEPS, migrate
from capibara_flow.engines.postgres.usage import PostgresUsage
from capibara_flow.errors import BadRequest, CannotStart, StoreInUse, StoreUnavailable
from capibara_flow.ports import Edition, Spent, SpentDay, Standing, UsageLog
from tests.engines.postgres_servers import connected, fresh, timescale
from tests.engines.test_documents import HERE, document
from tests.fakes_usage import FakeUsage
from tests.runtime.container import missing
from tests.waiting import until

NOON = datetime(2026, 3, 1, 12, tzinfo=UTC)


async def test_strangers_do_not_come_in(postgres: EmbeddedPostgres):
    for url in (postgres.url.replace(postgres.url.split(":")[2].split("@")[0], "guess"), postgres.url.replace("capibara:", "postgres:")):
        database = Database(url)
        with pytest.raises(CannotStart, match=rf"PostgreSQL at 127.0.0.1:{postgres.port}/capibara does not let us in") as told:
            await PostgresDocuments(database).scopes()
        assert "guess" not in str(told.value)
        await database.aclose()
    assert (postgres.folder / "password").stat().st_mode & 0o077 == 0
    assert postgres.data.stat().st_mode & 0o077 == 0
    assert psutil.Process(postgres.pid).uids().real != 0


async def test_what_was_committed_survives_a_kill_in_the_middle_and_the_store_finds_back_by_itself(postgres: EmbeddedPostgres):
    async with fresh(postgres.url) as url, connected(url) as database:
        documents, brief = PostgresDocuments(database), PostgresDocuments(Database(url, patience_seconds=0.2))
        done: list[str] = []

        async def write() -> None:
            for number in range(100_000):
                await documents.ready(document(f"{number:06}"))
                done.append(f"{number:06}")

        await brief.scopes()
        writing = asyncio.create_task(write())
        await until(lambda: len(done) > 20)
        await asyncio.to_thread(postgres.kill)
        with pytest.raises(StoreUnavailable, match=rf"PostgreSQL at 127.0.0.1:{postgres.port}/test_\d+ cannot be reached"):
            await brief.scopes()
        before = len(done)
        postgres.restart()  # from this thread, for the server ends with the one that started it
        await until(lambda: len(done) > before + 20)
        writing.cancel()
        with suppress(asyncio.CancelledError):
            await writing
        kept = [each.id for each in await documents.listed(HERE, 1_000_000)]
        assert kept[: len(done)] == done
        assert len(kept) <= len(done) + 1
        assert len(await brief.scopes()) == 1
        await brief.aclose()
        await brief._database.aclose()


async def test_a_connection_that_the_server_ends_is_replaced_unseen(postgres: EmbeddedPostgres):
    async with fresh(postgres.url) as url, connected(url) as database:
        documents = PostgresDocuments(database)
        await documents.ready(document())
        stranger = await asyncpg.connect(postgres.url)
        await stranger.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname LIKE 'test_%'")
        await stranger.close()
        assert await documents.find(HERE, "1") == document()


async def test_what_postgres_cannot_keep_is_refused_at_once(postgres: EmbeddedPostgres):
    async with fresh(postgres.url) as url, connected(url) as database:
        for words in ("nul \0", "half \ud800 of a pair"):
            with pytest.raises(BadRequest, match="PostgreSQL cannot keep this"):
                await PostgresDocuments(database).ready(document(title=words))


async def test_the_tables_are_made_once_by_many_at_once_and_a_newer_release_is_left_alone(postgres: EmbeddedPostgres):
    async with fresh(postgres.url) as url:
        many = [Database(url, connections=1) for _ in range(5)]
        await asyncio.gather(*(PostgresDocuments(each).scopes() for each in many))
        async with connected(url) as database:
            rows = await database.fetch("SELECT number, name FROM capibara.migrations ORDER BY number")
            assert [tuple(row) for row in rows] == [(number, name) for number, (name, _) in enumerate(STEPS, 1)]
            assert not database.hypertable
            await database.change(("INSERT INTO capibara.migrations (number, name) VALUES ($1, 'later')", len(STEPS) + 1))
        for each in many:
            await each.aclose()
        async with connected(url) as database:
            with pytest.raises(CannotStart, match="made by a newer release"):
                await PostgresDocuments(database).scopes()


_LISTED = """INSERT INTO capibara.documents
        (scope, id, state, tenant, collection, title, address, digest, language, updated, owner, passages)
    VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12)"""


async def test_what_an_earlier_release_listed_is_ready_or_unfinished_as_it_was(postgres: EmbeddedPostgres):
    async with fresh(postgres.url) as url:
        stranger = await asyncpg.connect(url)
        for statement in (SCHEMA, APPLIED):
            await stranger.execute(statement)
        earlier = STEPS[: [name for name, _ in STEPS].index("editions")]
        for number, (name, statements) in enumerate(earlier, 1):
            await stranger.execute(statements)
            await stranger.execute("INSERT INTO capibara.migrations (number, name) VALUES ($1, $2)", number, name)
        listed = {"ready": document("1", passages=1), "begun": document("2"), "leaving": document("3")}
        for state, one in listed.items():
            about = (one.title, one.address, one.digest, one.language, one.updated, one.owner, one.passages)
            await stranger.execute(_LISTED, scope_key(HERE), one.id, state, HERE.tenant, HERE.collection, *about)
        await stranger.close()
        async with connected(url) as database:
            documents = PostgresDocuments(database)
            assert await documents.listed(HERE, 9) == [listed["ready"]]
            assert await documents.left(HERE, "2") == [listed["begun"]]
            assert await documents.left(HERE, "3") == [listed["leaving"]]
            assert await documents.standing(HERE, ["1", "2", "3"]) == Standing(0, {"1": Edition("", 0)})
            assert {each.id for each in await documents.unfinished()} == {"2", "3"}


async def counts_usage(usage: UsageLog) -> None:
    """Record some, twice, and read the days back."""
    some = [
        Spent("ana", "phi", 10, 20, NOON, "T1"),
        Spent("ana", "phi", 1, 2, NOON, "T1", "two"),
        Spent("ana", "phi", 5, 5, NOON + timedelta(hours=11, minutes=59), "T2"),
        Spent("ana", "phi", 7, 7, datetime.fromisoformat("2026-03-02T00:30:00+01:00"), "T3"),
        Spent("ana", "phi", 3, 3, NOON + timedelta(days=1), "T4"),
        Spent("b'", "gpt", 2**40, 0, NOON, "T5"),
    ]
    for _ in range(2):
        await usage.record(*some)
    await usage.record()
    since, until = NOON - timedelta(hours=12), NOON + timedelta(days=30)
    days = [SpentDay(date(2026, 3, 1), "ana", "phi", 4, 23, 34), SpentDay(date(2026, 3, 2), "ana", "phi", 1, 3, 3)]
    assert await usage.by_day(since, until, "ana") == days
    assert await usage.by_day(since, until) == [days[0], SpentDay(date(2026, 3, 1), "b'", "gpt", 1, 2**40, 0), days[1]]
    assert await usage.by_day(since, until, "nobody") == await usage.by_day(until, until + timedelta(days=1)) == []
    assert [day.answers for day in await usage.by_day(NOON, NOON + timedelta(minutes=1), "ana")] == [2]


async def test_usage_is_summed_by_day(postgres: EmbeddedPostgres):
    await counts_usage(FakeUsage())
    async with fresh(postgres.url) as url, connected(url) as database:
        await counts_usage(PostgresUsage(database))
        assert not database.hypertable


@dataclass
class FakeConnection:
    """Answers what ``migrate`` asks about the extension, and remembers what it did."""

    installed: bool = False
    available: bool = False
    superuser: bool = False
    preloaded: bool = False
    hypertable: bool = False
    did: list[str] = field(default_factory=list)

    def transaction(self) -> "FakeConnection":
        return self

    async def __aenter__(self) -> None: ...

    async def __aexit__(self, *_: object) -> None: ...

    async def execute(self, statement: str, *_: object) -> None:
        self.did.append(statement)

    async def fetchval(self, statement: str) -> object:
        answers = {
            "FROM pg_extension": self.installed,
            "pg_available_extensions": self.available,
            "rolsuper": self.superuser,
            "shared_preload": self.preloaded,
            "hypertables": self.hypertable,
            "migrations": len(STEPS),
        }
        return next(answer for words, answer in answers.items() if words in statement)


@pytest.mark.parametrize(
    ("there", "deeds"),
    [
        ({}, None),
        ({"available": True}, None),
        ({"available": True, "superuser": True}, None),
        ({"available": True, "superuser": True, "preloaded": True}, ["CREATE EXTENSION timescaledb", HYPERTABLE]),
        ({"installed": True}, [HYPERTABLE]),
        ({"installed": True, "hypertable": True}, []),
    ],
)
async def test_usage_becomes_a_hypertable_once_where_nobody_need_be_asked(there: dict[str, bool], deeds: list[str] | None):
    connection = FakeConnection(**there)
    assert await migrate(connection) is (deeds is not None)
    assert connection.did[3:] == (deeds or [])


@pytest.mark.docker
@pytest.mark.timeout(900)
def test_usage_is_a_hypertable_where_timescale_is_and_reads_the_same():
    if reason := missing():
        pytest.skip(f"no Docker engine answers, so hypertables were not tested: {reason}")

    async def twice(url: str) -> None:
        async with fresh(url) as here:
            for _ in range(2):
                async with connected(here) as database:
                    await counts_usage(PostgresUsage(database))
                    assert database.hypertable

    with timescale() as url:
        asyncio.run(twice(url))


def test_a_folder_has_one_server_and_the_data_come_back_with_the_next(postgres_folder: Path):
    with EmbeddedPostgres(postgres_folder, durable=False) as first:
        url = first.url
        second = EmbeddedPostgres(postgres_folder, durable=False)
        second.lock_seconds = 0.1
        with pytest.raises(StoreInUse, match="another PostgreSQL uses"):
            second.start()
        asyncio.run(_say(url, "CREATE TABLE kept AS SELECT 42 AS answer"))
    assert not first.alive
    with EmbeddedPostgres(postgres_folder, durable=False) as next_one:
        assert next_one.url.split("@")[0] == url.split("@")[0]
        assert asyncio.run(_say(next_one.url, "SELECT answer FROM kept")) == 42


def test_half_made_data_are_made_anew_and_a_lost_password_is_replaced(tmp_path: Path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "half").touch()
    with EmbeddedPostgres(tmp_path, durable=False) as server:
        url = server.url
    assert list(tmp_path.glob("data.broken-*/half"))
    (tmp_path / "password").unlink()
    with EmbeddedPostgres(tmp_path) as server:
        assert server.url.split("@")[0] != url.split("@")[0]
        assert asyncio.run(_say(server.url, "SELECT 1")) == 1


async def _say(url: str, statement: str) -> object:
    connection = await asyncpg.connect(url)
    try:
        return await connection.fetchval(statement)
    finally:
        await connection.close()


PARENT = """
import pathlib, sys, time
from capibara_flow.engines.postgres.embedded import EmbeddedPostgres
server = EmbeddedPostgres(pathlib.Path(sys.argv[1]))
server.start()
print(server.pid, flush=True)
time.sleep(600)
"""


async def test_the_server_ends_with_its_parent_however_that_ends_and_its_folder_is_free_then(postgres_folder: Path):
    parent = await asyncio.create_subprocess_exec(sys.executable, "-c", PARENT, str(postgres_folder), stdout=asyncio.subprocess.PIPE)
    assert parent.stdout
    pid = int(await parent.stdout.readline())
    assert psutil.pid_exists(pid)
    parent.kill()
    await parent.wait()
    await until(lambda: not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE)
    with EmbeddedPostgres(postgres_folder, durable=False) as server:
        assert server.alive


def test_a_server_that_cannot_be_had_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CAPIBARA_POSTGRES_BIN", str(tmp_path))
    with pytest.raises(CannotStart, match="has no postgres and initdb in it: correct or unset it"):
        find_binaries()
    monkeypatch.delenv("CAPIBARA_POSTGRES_BIN")
    (tmp_path / "file").touch()
    with pytest.raises(CannotStart, match="choose another folder"):
        EmbeddedPostgres(tmp_path / "file" / "folder").start()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root runs the server as somebody else")
def test_an_installation_that_only_root_can_read_is_copied_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    hidden, common = tmp_path / "hidden", Path(tempfile.mkdtemp(dir="/var/tmp"))
    try:
        common.chmod(0o755)
        monkeypatch.setattr(binaries, "_TEMPORARY", str(common))
        hidden.mkdir(mode=0o700)
        shutil.copytree(find_binaries().parent, hidden / "pginstall", symlinks=True)
        monkeypatch.setenv("CAPIBARA_POSTGRES_BIN", str(hidden / "pginstall" / "bin"))
        with EmbeddedPostgres(tmp_path / "folder", durable=False) as server:
            assert server.alive
        [copy] = common.iterdir()
        before = copy.stat()
        assert binaries.readable(find_binaries()) == copy / "bin"
        assert copy.stat() == before
        copy.chmod(0o777)  # anybody may have changed it
        monkeypatch.setattr(tempfile, "gettempdir", lambda: str(common))
        with pytest.raises(CannotStart, match="only root can read"):
            binaries.readable(find_binaries())
    finally:
        shutil.rmtree(common)


def test_a_server_that_does_not_start_shows_its_log(postgres_folder: Path):
    with EmbeddedPostgres(postgres_folder, durable=False) as server:
        server.stop()
        (server.data / "postgresql.conf").write_text("no_such_setting = 1\n", encoding="utf-8")
        with pytest.raises(CannotStart, match=r"(?s)did not start; its log, .*no_such_setting"):
            server.start()
