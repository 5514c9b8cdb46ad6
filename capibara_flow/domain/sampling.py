"""How tokens are drawn in the end: by the request, the expert, or the engine's own defaults."""

from typing import Any

from topics.chat import Sampling


def chosen(*samplings: Sampling) -> dict[str, Any]:
    """What the *samplings* set, later ones before earlier ones; what nobody set is absent."""
    merged: dict[str, Any] = {}
    for sampling in samplings:
        fields = sampling.model_dump(exclude_none=True)
        stop = fields.pop("stop")
        merged |= fields | ({"stop": list(stop)} if stop else {})
    return merged
