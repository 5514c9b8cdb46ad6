"""Record the examples as this version writes them: python -m tests.recorded.

What is recorded already stays as it is; only files of classes that have none yet are added.
"""

from collections import defaultdict
from pathlib import Path

from capibara_flow import __version__
from tests.recorded.examples import examples

HERE = Path(__file__).parent


def record(folder: Path) -> list[Path]:
    """Write the files that *folder* does not have; which these are."""
    lines: dict[str, list[bytes]] = defaultdict(list)
    for name, line in examples():
        lines[name].append(line)
    folder.mkdir(parents=True, exist_ok=True)
    files = {folder / f"{name}.jsonl": b"\n".join(found) + b"\n" for name, found in lines.items()}
    missing = [file for file in files if not file.exists()]
    for file in missing:
        file.write_bytes(files[file])
    return missing


if __name__ == "__main__":
    for written in record(HERE / __version__):
        print(written.relative_to(HERE))
