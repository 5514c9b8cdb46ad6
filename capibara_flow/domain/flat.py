"""Sources as rows of plain values, which TOON tells in one line each; and the way back."""

from collections.abc import Mapping, Sequence
from typing import Any

from topics.output import SourceShown

_PART = "part_"


def flattened(sources: Sequence[SourceShown]) -> list[dict[str, Any]]:
    """*sources* as rows with the same columns: offsets as ``start`` and ``end``, each part of the score as ``part_NAME``."""
    names = sorted({name for source in sources for name in source.parts})
    return [_row(source, names) for source in sources]


def _row(source: SourceShown, names: Sequence[str]) -> dict[str, Any]:
    plain = source.model_dump(exclude={"parts", "offsets"})
    start, end = source.offsets
    return plain | {"start": start, "end": end} | {f"{_PART}{name}": source.parts.get(name) for name in names}


def unflattened(row: Mapping[str, Any]) -> SourceShown:
    """The source that *row* tells of, as a newer version may tell it as well; raises ``pydantic.ValidationError`` and ``KeyError``."""
    parts = {name.removeprefix(_PART): value for name, value in row.items() if name.startswith(_PART) and value is not None}
    return source_of({**row, "offsets": (row["start"], row["end"]), "parts": parts})


def source_of(told: Mapping[str, Any]) -> SourceShown:
    """The source in *told*, without fields that this version does not know; raises ``pydantic.ValidationError``."""
    return SourceShown.model_validate({name: value for name, value in told.items() if name in SourceShown.model_fields})
