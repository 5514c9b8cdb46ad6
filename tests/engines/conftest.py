"""Servers that all engine tests of a run share, because they take seconds to make."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from capibara_flow.engines.postgres.embedded import EmbeddedPostgres


@pytest.fixture(scope="session")
def postgres_made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the data of an embedded PostgreSQL that ran once: to be copied."""
    folder = tmp_path_factory.mktemp("postgres") / "made"
    with EmbeddedPostgres(folder, durable=False):
        return folder


@pytest.fixture
def postgres_folder(postgres_made: Path, tmp_path: Path) -> Path:
    """A copy of such a folder, for one test."""
    return shutil.copytree(postgres_made, tmp_path / "folder")


@pytest.fixture(scope="session")
def postgres(postgres_made: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedPostgres]:
    """A running server; whoever ends it starts it again. The folders above its own are for nobody else."""
    with EmbeddedPostgres(shutil.copytree(postgres_made, tmp_path_factory.mktemp("postgres") / "ours"), durable=False) as server:
        yield server


@pytest.fixture(scope="session")
def nebula_cluster() -> Iterator[tuple[str, int]]:
    """The address of a real NebulaGraph's graph service."""
    from tests.runtime.container import missing  # the embedding models are tested where there is nothing for Docker

    if reason := missing():
        pytest.skip(f"no Docker engine answers, so the suite ran on a stub of NebulaGraph's server only: {reason}")
    from tests.engines.nebula_cluster import cluster

    with cluster() as address:
        yield address
