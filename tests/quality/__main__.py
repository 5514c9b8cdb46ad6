"""Append the figures of routing to ``figures.csv``.

python -m tests.quality [--embedder universal] [--clinc FOLDER]
"""

import argparse
import tempfile
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

from tests.figures import append, code
from tests.quality.clinc import convert
from tests.quality.measure import FRESH, HERE, OWN, UNSEEN, Answered, answered

FIGURES = HERE / "figures.csv"


def rows(name: str, embedder: str, told: Answered) -> Iterator[dict[str, object]]:
    """A row for each figure of the set *name*."""
    found: dict[str, Any] = told.figures
    flat = {"accuracy": found["accuracy"], "calibration_error": found["calibration_error"]}
    flat |= {f"accuracy_{lang}": each["accuracy"] for lang, each in found["per_language"].items()}
    flat |= {"accuracy_hard": found["hard"]["accuracy"]} if found["hard"]["n"] else {}
    flat |= {"complexity_macro_f1": found["complexity"]["macro_f1"]} if found["complexity"] else {}
    flat |= {"out_of_scope_auroc": found["out_of_scope"]["auroc"]} if found["out_of_scope"] else {}
    flat |= {"median_ms": round(1000 * median(each.embedding + each.deciding for each in told.answers), 2)}
    common = {"date": datetime.now(UTC).isoformat(timespec="seconds"), **code(FIGURES), "embedder": embedder, "set": name}
    yield from ({**common, "n": found["n"], "figure": figure, "value": value} for figure, value in flat.items())


def main() -> None:
    """Measure, keep, show."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--embedder", default="universal")
    parser.add_argument("--clinc", type=Path, help="the folder of CLINC150; nothing of it is kept")
    given = parser.parse_args()
    own = answered(OWN, given.embedder)
    sets = {"own": own, "own/dev": own.half("dev"), "own/test": own.half("test"), "fresh": answered(FRESH, given.embedder)}
    sets["unseen"] = answered(UNSEEN, given.embedder)
    if given.clinc:
        with tempfile.TemporaryDirectory() as folder:
            routes, questions = convert(given.clinc, Path(folder))
            told = answered(questions, given.embedder, routes)
        pairs = [pair for pair in zip(told.questions, told.answers, strict=True) if pair[0].route != "default"]
        sets |= {"clinc150/val": Answered(*(tuple(part) for part in zip(*pairs, strict=True))), "clinc150/val+oos": told}
    kept = [row for name, told in sets.items() for row in rows(name, given.embedder, told)]
    append(FIGURES, kept)
    for row in kept:
        print(f"{row['set']:18} {row['figure']:22} {row['value']}")


if __name__ == "__main__":
    main()
