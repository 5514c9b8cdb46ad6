"""Weights that come in packages of third parties: the release that we know, and the very bytes."""

import hashlib
import importlib.metadata
import importlib.util
from dataclasses import dataclass
from pathlib import Path

from capibara_flow.errors import CannotStart


@dataclass(frozen=True)
class Packaged:
    """The file *path* of the package *module*, as the release *version* of *distribution* has it."""

    distribution: str
    version: str
    module: str
    path: str
    sha256: str

    @property
    def requirement(self) -> str:
        """What to tell pip."""
        return f"{self.distribution}=={self.version}"

    def find(self) -> Path:
        """Where the file is; the package is not imported. Raises ``CannotStart`` unless this very release is installed."""
        found = importlib.util.find_spec(self.module)
        for folder in (found.submodule_search_locations if found else None) or ():
            if (path := Path(folder) / self.path).is_file():
                self._check_release()
                return path
        raise CannotStart(f"this embedding model is not installed: `pip install {self.requirement}` brings it")

    def read(self) -> bytes:
        """What the file holds; raises ``CannotStart`` unless it is installed and is the file that we know."""
        path = self.find()
        content = path.read_bytes()
        if hashlib.sha256(content).hexdigest() != self.sha256:
            raise CannotStart(f"{path} is not the file we know (its SHA-256 differs): install {self.requirement} again")
        return content

    def _check_release(self) -> None:
        try:
            installed = importlib.metadata.version(self.distribution)
        except importlib.metadata.PackageNotFoundError:
            installed = "unknown"
        if installed != self.version:
            raise CannotStart(f"{self.distribution} {installed} is installed, known is {self.version}: `pip install {self.requirement}`")
