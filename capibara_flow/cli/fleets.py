"""From ``--engine`` and ``--model`` to a fleet file that the children read."""

import json
import os
import re
import time
import tomllib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from capibara_flow.errors import CannotStart

#: As many as our own engine has slots.
LOCAL_CONCURRENCY = 2
#: For the packaged model. So small, it wanders off at an engine's usual 0.8, and without a penalty it repeats itself to the
#: end of its context: of 16 answers to "What is the capital of France?" and "What is a capybara?" 9 did, with it none.
SMALL_SAMPLING: Mapping[str, float] = {"temperature": 0.2, "repeat_penalty": 1.15, "max_tokens": 400}
#: The same weights, let off the leash: for what has no one right answer.
CREATIVE_SAMPLING: Mapping[str, float] = {"temperature": 0.9, "top_p": 0.95, "repeat_penalty": 1.15, "max_tokens": 400}
_DIALECTS = {"llamacpp": "llama_server", "vllm": "vllm"}


@dataclass(frozen=True)
class Served:
    """A model that an engine serves: *model* is its name there, ``None`` when the engine would not tell."""

    name: str
    url: str
    model: str | None = None
    dialect: str = "openai"
    scripted: bool = False
    concurrency: int = 64
    sampling: Mapping[str, float] = field(default_factory=dict)


def local(alias: str, port: int, sampling: Mapping[str, float] | None = None) -> Served:
    """The model that our own engine serves on *port*; a model that somebody brought is sampled as its engine does."""
    url = f"http://127.0.0.1:{port}/v1"
    return Served(alias, url, alias, "llama_server", concurrency=LOCAL_CONCURRENCY, sampling=sampling or {})


def small_pair(alias: str, port: int) -> list[Served]:
    """The packaged model as two experts of one engine: *alias*, which keeps to the point, and one that plays."""
    plays = local(alias, port, CREATIVE_SAMPLING)
    return [local(alias, port, SMALL_SAMPLING), replace(plays, name=f"{alias}-creative")]


def small_policy(alias: str) -> str:
    """Which of the ``small_pair`` answers what, as a fleet file says it."""
    plays = _quoted(f"{alias}-creative")
    return f"\n[policy]\ndefault = {_quoted(alias)}\ncreative_writing = {plays}\nconversation = {plays}\n"


def listed(path: Path) -> list[Served]:
    """Who is in the fleet file at *path*, as far as can be told here; the children check it in full."""
    try:
        experts = tomllib.loads(path.read_text(encoding="utf-8")).get("experts", [])
        return [Served(each["name"], next(iter(each.get("urls", ())), "")) for each in experts]
    except OSError as error:
        raise CannotStart(f"--fleet {path}: {error.strerror}") from error
    except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        raise CannotStart(f"--fleet {path}: not a fleet file: {error!r}") from error


def expert_name(text: str) -> str:
    """*text* as an expert's name: lower case, no folders, no file ending, nothing that a subject would not bear."""
    short = re.sub(r"\.gguf$", "", text.rsplit("/", 1)[-1], flags=re.IGNORECASE)
    return re.sub(r"[^a-z0-9_-]+", "-", short.lower()).strip("-")[:48] or "engine"


def uniquely_named(served: Iterable[Served]) -> list[Served]:
    """The same, with names told apart by a number where two are alike."""
    taken: set[str] = set()
    result = []
    for each in served:
        wanted, name, count = expert_name(each.name), expert_name(each.name), 1
        while name in taken:
            count += 1
            name = f"{wanted}-{count}"
        taken.add(name)
        result.append(replace(each, name=name))
    return result


def fleet_toml(served: Iterable[Served]) -> str:
    """The fleet file of *served*; each expert also answers to its model's own name."""
    return "\n".join(_expert_toml(each) for each in served)


def _expert_toml(served: Served) -> str:
    # JSON strings are TOML strings, as long as nothing outside ASCII is escaped.
    lines = ["[[experts]]", f"name = {_quoted(served.name)}", f"dialect = {_quoted(served.dialect)}", f"urls = [{_quoted(served.url)}]"]
    if served.model is not None:
        lines.append(f"model = {_quoted(served.model)}")
    # Who named an engine knows what it can do; what it cannot, it refuses itself.
    lines += [f"scripted = {str(served.scripted).lower()}", f"concurrency = {served.concurrency}", "tools = true"]
    if served.sampling:
        lines.append(f"sampling = {{ {', '.join(f'{name} = {value}' for name, value in served.sampling.items())} }}")
    return "\n".join(lines) + "\n"


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def write_private(path: Path, text: str) -> None:
    """Write *text* so that only we can read it: it may hold keys. Replaces *path* in one step."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    part.unlink(missing_ok=True)
    with open(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
        file.write(text)
    part.replace(path)


def models_at(url: str, index: int, *, ask: Callable[[str], Any], pause: Callable[[], None], patience_seconds: float = 5) -> list[Served]:
    """What the engine at *url* serves, asked by ``GET URL/models``, and with the version before it that engines are called with.

    One expert ``engine-INDEX`` when it does not tell.
    """
    base = address = url.rstrip("/")
    end = time.monotonic() + patience_seconds
    while True:
        try:
            listed = ask(f"{address}/models")["data"]
            found = [_served(url, each) for each in listed if isinstance(each, dict) and each.get("id")]
        except (OSError, ValueError, KeyError, TypeError):
            # Not up yet, the other of the two addresses, or a dialect without a list.
            found, address = [], base if address != base or base.endswith("/v1") else f"{base}/v1"
        if found or time.monotonic() > end:
            return found or [Served(f"engine-{index}", url)]
        pause()


def _served(url: str, listed: dict[str, Any]) -> Served:
    owner = str(listed.get("owned_by", ""))
    return Served(str(listed["id"]), url, str(listed["id"]), _DIALECTS.get(owner, "openai"), scripted="script" in owner)


def ask_json(url: str) -> Any:
    """The JSON at *url*; raises ``OSError`` or ``ValueError``."""
    import urllib.request  # noqa: PLC0415  brings TLS, 6 MB, which only a supervisor with foreign engines needs

    with urllib.request.urlopen(url, timeout=2) as response:  # noqa: S310  `up` lets only http and https through
        return json.load(response)
