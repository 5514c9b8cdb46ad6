"""All settings, one frozen tree: ``CAPIBARA_<GROUP>__<FIELD>`` in the environment, experts in one TOML file."""

import json
import re
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

import pydantic_settings
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, SecretStr, ValidationError
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from capibara_flow.domain.fleet import Fleet
from capibara_flow.domain.routes import Routes, parse_routes
from capibara_flow.domain.toml_lines import line_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pydantic_core import ErrorDetails

#: The routes of a fleet that names none of its own.
ROUTES = Path(__file__).parent / "routes" / "bb.toml"
Kind = TypeVar("Kind", bound=BaseModel)

ROLES = ("provisioner", "edge", "router", "caller", "retriever", "ingester", "undertaker", "accountant", "observer")


class Group(BaseModel):
    """A frozen group of settings."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class NatsSettings(Group):
    """How to reach the broker; *passwords* by role, as in ``nats.conf``. A URL with a user in it wins.

    For the broker of ``capibara up``: *sync* says when what it acknowledged is forced to the disk (``always``, or at intervals such
    as ``2m``, which is its own default), *store_key* is a passphrase that its store is encrypted with.
    """

    url: str = "nats://127.0.0.1:4222"
    passwords: dict[str, SecretStr] = {}
    replicas: int = Field(default=1, ge=1, le=5)
    sync: str = Field(default="2m", pattern=r"^(always|[1-9][0-9]*(ms|s|m|h))$")
    store_key: SecretStr | None = None


def _listed(value: object) -> object:
    """A list as people write it into an environment variable: JSON, or words between commas."""
    if not isinstance(value, str):
        return value
    if value.lstrip().startswith("["):
        return json.loads(value)
    return [word.strip() for word in value.split(",") if word.strip()]


def _lower(value: object) -> object:
    return value.lower() if isinstance(value, str) else value


class EdgeSettings(Group):
    """The door; a client that has *max_buffer_bytes* of its answer still to take makes its writer wait.

    A streamed turn that nobody has read for *abandon_seconds* is stopped. A document may have *document_bytes*, and is taken in within
    *ingest_seconds* or not at all.
    """

    host: str = "127.0.0.1"
    port: int = Field(default=5001, ge=0, le=65535)
    origins: Annotated[tuple[str, ...], NoDecode, BeforeValidator(_listed)] = ("http://localhost:8000",)
    max_body_bytes: int = Field(default=4 * 1024 * 1024, ge=1024)
    max_messages: int = Field(default=1000, ge=1)
    heartbeat_seconds: float = 15
    max_buffer_bytes: int = Field(default=32 * 1024, ge=1024)
    turn_seconds: float = Field(default=600, gt=0)
    abandon_seconds: float = Field(default=15, ge=1)
    document_bytes: int = Field(default=50 * 1024 * 1024, ge=1)
    ingest_seconds: float = Field(default=3600, gt=0)


class Key(Group):
    """A static API key and whom it stands for."""

    key: SecretStr
    principal: str
    tenant: str


class AuthSettings(Group):
    """Who may ask: anybody by address while *anonymous* is true, and whoever holds one of the *keys*."""

    anonymous: bool = True
    keys: tuple[Key, ...] = ()


class LogSettings(Group):
    """The log of turns, and the processes' own log lines."""

    enabled: bool = True
    turn_age_seconds: int = Field(default=3600, ge=10)
    dead_age_seconds: int = Field(default=24 * 3600, ge=10)
    level: Annotated[Literal["debug", "info", "warning", "error", "critical"], BeforeValidator(_lower)] = "info"
    format: Annotated[Literal["json", "console"], BeforeValidator(_lower)] = "json"


class FleetSettings(Group):
    """Where the experts are listed."""

    file: Path | None = None


class RouterSettings(Group):
    """How questions are read where the fleet has a policy: by the embedding model *embedder*, which remembers *cache_size* texts.

    Models: ``universal``, ``e5``, ``minilm``, or ``sentence-transformers:NAME`` for any of Hugging Face.
    """

    embedder: str = "universal"
    cache_size: int = Field(default=8192, ge=0)


class AnswersSettings(Group):
    """The cache of answers: each may be given again for *age_seconds* (0: never) to the same tenant and question.

    Only answers that were drawn at a temperature of *warmest* or below are kept.
    """

    age_seconds: int = Field(default=0, ge=0)
    warmest: float = Field(default=0.0, ge=0)


class WorkerSettings(Group):
    """How workers take work: *ack_wait_seconds* without a heartbeat and the message goes to somebody else.

    *max_deliver* processes at most may die at it. What goes wrong for a while, an engine that is down, say, is tried again every
    *retry_seconds* until the turn's deadline, or for *patience_seconds* in each delivery.

    Tenants who wait for an expert are served in turn; one with a weight of 2 in *tenant_weights* twice as often as one with 1, which all
    others have.
    """

    ack_wait_seconds: float = Field(default=5, gt=0)
    max_deliver: int = Field(default=6, ge=1)
    retry_seconds: float = Field(default=2, ge=0)
    patience_seconds: float | None = Field(default=None, ge=0)
    graceful_seconds: float = 30
    router_permits: int = Field(default=32, ge=1)
    tenant_weights: dict[str, Annotated[float, Field(ge=0.01, le=100)]] = {}
    metrics_port: int | None = None


class HostSettings(Group):
    """The experts that are started on this machine: at most *max_loaded_experts* at a time; unused, they are unloaded again (0: never).

    *reserve_mib* of the memory is left free. More than *queue_size* requests do not wait for room. A load may take *load_timeout_s*,
    an end *grace_s*.
    """

    max_loaded_experts: int = Field(default=1, ge=1)
    auto_unload_after_s: float = Field(default=300, ge=0)
    reserve_mib: int = Field(default=512, ge=0)
    queue_size: int = Field(default=64, ge=1)
    load_timeout_s: float = Field(default=600, gt=0)
    grace_s: float = Field(default=10, ge=0)


class KnowledgeSettings(Group):
    """Documents and the search in them: on once there is a *folder* for the stores that come along, or a server for each.

    *milvus* is the URI of a Milvus server (with *milvus_token*), *postgres* the URL of a PostgreSQL, *nebula* the ``host:port`` of a
    NebulaGraph (with *nebula_user* and *nebula_password*); what is not named is embedded, in *folder*, and then one process has it alone.
    *embedder* is a model as the router's. An *extractor*, an expert of the fleet, lists what passages mention; without one rules do. A turn
    is grounded in *sources* passages, of *context_tokens* in all, within *seconds*.
    The score of a passage is ``vector_weight * vector + graph_weight * graph + recency``, where *recency_weight* is the most that age
    can add: half of it after *recency_half_life_days*. Where no source has at least *relevance* (about 0: unrelated; 1: alike), a turn
    goes on without any; 0 grounds it in the best there are, whatever they say. Reading a document of at most *document_bytes* may take
    *parse_seconds* and *parse_memory_mib*.
    """

    folder: Path | None = None
    milvus: str = ""
    milvus_token: SecretStr | None = None
    postgres: SecretStr | None = None
    nebula: str = ""
    nebula_user: str = "root"
    nebula_password: SecretStr = SecretStr("nebula")
    embedder: str = "e5"
    extractor: str = ""
    sources: int = Field(default=10, ge=1, le=100)
    context_tokens: int = Field(default=2000, ge=100)
    seconds: float = Field(default=5, gt=0)
    vector_weight: float = Field(default=0.7, ge=0)
    graph_weight: float = Field(default=0.3, ge=0)
    recency_weight: float = Field(default=0.05, ge=0)
    recency_half_life_days: float = Field(default=365, gt=0)
    relevance: float = Field(default=0.1, ge=0, le=1)
    document_bytes: int = Field(default=50 * 1024 * 1024, ge=1)
    parse_seconds: float = Field(default=60, gt=0)
    parse_memory_mib: int = Field(default=2048, ge=256)
    permits: int = Field(default=16, ge=1)
    ingest_permits: int = Field(default=2, ge=1)

    @property
    def enabled(self) -> bool:
        """Whether there is a place for every store."""
        return self.folder is not None or bool(self.milvus and self.postgres and self.nebula)


class Settings(BaseSettings):
    """The whole tree."""

    model_config = SettingsConfigDict(
        env_prefix="CAPIBARA_", env_nested_delimiter="__", frozen=True, extra="ignore", nested_model_default_partial_update=True
    )

    nats: NatsSettings = NatsSettings()
    edge: EdgeSettings = EdgeSettings()
    auth: AuthSettings = AuthSettings()
    log: LogSettings = LogSettings()
    fleet: FleetSettings = FleetSettings()
    router: RouterSettings = RouterSettings()
    answers: AnswersSettings = AnswersSettings()
    worker: WorkerSettings = WorkerSettings()
    host: HostSettings = HostSettings()
    knowledge: KnowledgeSettings = KnowledgeSettings()

    @cached_property
    def experts(self) -> Fleet:
        """The fleet of the configured file; raises ``SettingsError`` naming file, line, key and reason."""
        return read_fleet(self.fleet_file)

    @property
    def fleet_file(self) -> Path:
        """Where the fleet is; raises ``SettingsError`` when no file was named."""
        if self.fleet.file is None:
            raise SettingsError("no fleet: set CAPIBARA_FLEET__FILE to a TOML file, or use `capibara up --engine URL`")
        return self.fleet.file


class SettingsError(ValueError):
    """A setting that cannot be used: the message names where, which and why."""


def read_fleet(path: Path) -> Fleet:
    """Read a fleet TOML file; raises ``SettingsError`` naming file, line, key and reason."""
    return read_toml(path, Fleet, "fleet")


def read_toml(path: Path, kind: type[Kind], what: str) -> Kind:
    """Read *path*, a TOML file that holds one *kind*; raises ``SettingsError``: ``file:line: key: reason``, *what* for the whole of it."""
    try:
        with _faults_of(path):
            text = path.read_text(encoding="utf-8")
            raw: dict[str, Any] = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        line = re.search(r"at line (\d+)", str(error))
        raise SettingsError(f"{path}:{line[1] if line else text.count(chr(10)) + 1}: not TOML: {error}") from error
    except UnicodeDecodeError as error:
        raise SettingsError(f"{path}: not TOML: {error}") from error
    try:
        return kind.model_validate_json(json.dumps(raw, default=str))
    except ValidationError as error:
        raise SettingsError("; ".join(_problem(path, text, each, what) for each in _own(error.errors()))) from error


@contextmanager
def _faults_of(path: Path) -> Iterator[None]:
    """What reading any file may meet, as ``SettingsError``."""
    try:
        yield
    except OSError as error:
        raise SettingsError(f"{path}: cannot be read: {error.strerror}") from error
    except RecursionError as error:
        raise SettingsError(f"{path}: not TOML that can be read: its values are nested too deeply") from error


def _own(found: "Sequence[ErrorDetails]") -> "list[ErrorDetails]":
    """Without lists that are called too short only because what is in them is wrong, which is told as well."""
    inner = {each["loc"][:length] for each in found for length in range(len(each["loc"]))}
    return [each for each in found if each["type"] != "too_short" or each["loc"] not in inner]


def _problem(path: Path, text: str, found: "ErrorDetails", what: str) -> str:
    line = line_of(text, found["loc"])
    key = ".".join(map(str, found["loc"])) or what
    return f"{path}{f':{line}' if line else ''}: {key}: {found['msg'].removeprefix('Value error, ')}"


def read_routes(path: Path = ROUTES) -> Routes:
    """Read a routes file, the one that comes along when none is named; raises ``SettingsError`` naming file, line, key and reason."""
    with _faults_of(path):
        try:
            return parse_routes(path.read_text(encoding="utf-8"), path.name if path == ROUTES else str(path))
        except UnicodeDecodeError as error:
            raise SettingsError(f"{path}: not UTF-8: {error.reason}") from error
        except ValueError as error:
            raise SettingsError(str(error)) from error


def load() -> Settings:
    """Settings of this process; raises ``SettingsError`` naming the variable and the reason."""
    try:
        return Settings()
    except ValidationError as error:
        problems = "; ".join(f"CAPIBARA_{'__'.join(map(str, each['loc'])).upper()}: {each['msg']}" for each in error.errors())
        raise SettingsError(problems) from error
    except pydantic_settings.SettingsError as error:
        group = str(error).split('"')[1]
        raise SettingsError(f"CAPIBARA_{group.upper()}, or one of its fields: not JSON, as lists and tables must be") from error
