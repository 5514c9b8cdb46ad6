"""CLINC150 (Larson et al., 2019) for ``capibara eval routing``: its domains as routes, its intents as their topics.

    python -m tests.quality.clinc FOLDER OUT [--examples 20] [--none]

reads FOLDER (``domains.json`` and ``{train,val,oos_train,oos_val}.jsonl.gz``) and writes OUT/routes.toml and OUT/val.jsonl: nothing of
it is kept here.
"""

import argparse
import gzip
import json
from collections.abc import Iterable
from pathlib import Path


def convert(folder: Path, out: Path, examples: int = 20, *, none: bool = False) -> tuple[Path, Path]:
    """Write the routes (*examples* of each intent; with *none* the out-of-scope examples of the training part too) and the questions."""
    domains: dict[str, list[str]] = json.loads((folder / "domains.json").read_text())
    train = list(_lines(folder / "train.jsonl.gz"))
    parts = []
    for domain, intents in domains.items():
        parts.append(f"[[routes]]\nname = {json.dumps(domain)}\n\n[routes.topics]")
        for intent in intents:
            parts.append(f"{intent} = {_list([each['text'] for each in train if each['intent'] == intent][:examples])}")
    if none:
        parts.append(f"[none]\nexamples = {_list([each['text'] for each in _lines(folder / 'oos_train.jsonl.gz')])}")
    owner = {intent: domain for domain, intents in domains.items() for intent in intents}
    asked = [{"text": each["text"], "route": owner[each["intent"]]} for each in _lines(folder / "val.jsonl.gz")]
    asked += [{"text": each["text"], "route": "oos"} for each in _lines(folder / "oos_val.jsonl.gz")]
    out.mkdir(parents=True, exist_ok=True)
    routes, questions = out / "routes.toml", out / "val.jsonl"
    routes.write_text("\n".join(parts) + "\n", encoding="utf-8")
    questions.write_text("".join(json.dumps(each, ensure_ascii=False) + "\n" for each in asked), encoding="utf-8")
    return routes, questions


def _lines(path: Path) -> Iterable[dict[str, str]]:
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def _list(texts: list[str]) -> str:
    return "[\n" + "".join(f"    {json.dumps(text, ensure_ascii=False)},\n" for text in texts) + "]"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--examples", type=int, default=20)
    parser.add_argument("--none", action="store_true")
    given = parser.parse_args()
    print(*convert(given.folder, given.out, given.examples, none=given.none))
