"""Every metric and the log's set-up, spelled once."""

import logging
import re
import sys
from collections.abc import Mapping
from typing import Any

import structlog
from prometheus_client import Counter, Gauge, Histogram

log: structlog.stdlib.BoundLogger = structlog.get_logger()

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)

#: How a turn ends for whoever opened it. Whose answer breaks off (``broken``) or who leaves early may still come back for the rest.
OUTCOMES = ("done", "failed", "cancelled", "left", "broken", "expired")

TURNS = Counter("capibara_turns", "Turns opened at this door, by how they ended for who opened them", ["outcome"])
RESUMES = Counter("capibara_resumes", "Readers that came back to a turn at this door")
OPEN_STREAMS = Gauge("capibara_open_streams", "Clients that follow a turn now")
TURN_SECONDS = Histogram("capibara_turn_duration_seconds", "From request to final event, at the door", buckets=_SECONDS)
FIRST_TOKEN_SECONDS = Histogram("capibara_first_token_seconds", "From call to first token", ["expert"], buckets=_SECONDS)
TOKENS = Counter("capibara_tokens", "Tokens counted by engines", ["expert", "direction"])
STAGE_SECONDS = Histogram("capibara_stage_duration_seconds", "One message's work at a stage", ["stage"], buckets=_SECONDS)
ROUTED = Counter("capibara_routed", "Turns by the route and the complexity that the router saw in them", ["route", "complexity"])
ROUTING_SECONDS = Histogram("capibara_routing_seconds", "From a turn's arrival at the router to its decision", buckets=_SECONDS)
RETRIEVED = Counter("capibara_retrieved", "Turns that were looked up, by what was found: found, nothing, problem", ["what"])
RETRIEVAL_SECONDS = Histogram("capibara_retrieval_seconds", "From a turn's arrival at the retriever to its sources", buckets=_SECONDS)
INGESTED = Counter("capibara_ingested", "Documents that were taken in, by what became of them", ["how"])
SETTLED = Counter("capibara_work_settled", "Work messages by how they were settled", ["stage", "how"])
EMBEDDING_HITS = Counter("capibara_embedding_cache_hits", "Texts whose vector was known, or on its way for somebody else")
EMBEDDING_MISSES = Counter("capibara_embedding_cache_misses", "Texts that had to be embedded")
ENGINE_UP = Gauge(
    "capibara_engine_up", "Whether an engine may be asked freely: 0 while its breaker is open or half-open", ["expert", "replica"]
)
ENGINE_STREAMS = Gauge("capibara_engine_streams", "Answers that an engine streams to this process now", ["expert", "replica"])
BREAKER_OPENED = Counter("capibara_engine_breaker_opened", "How often an engine's circuit breaker opened", ["expert", "replica"])
EXPERT_LOADED = Gauge("capibara_expert_loaded", "Whether a host holds this expert ready (1) or not (0)", ["expert"])
EXPERT_LOADS = Counter("capibara_expert_loads", "Loads by how they went, and engines that crashed once loaded", ["expert", "outcome"])
EXPERT_LOAD_SECONDS = Histogram("capibara_expert_load_seconds", "From start to the first real completion", ["expert"], buckets=_SECONDS)
EXPERT_EVICTIONS = Counter("capibara_expert_evictions", "Experts unloaded to make room for others", ["expert"])
ANSWER_HITS = Counter("capibara_answer_cache_hits", "Calls answered by what had been said before")
ANSWER_MISSES = Counter("capibara_answer_cache_misses", "Calls that could have been answered so, had it been said before")
HTTP = Counter("capibara_http_responses", "Responses of the door", ["route", "status"])

for _outcome in OUTCOMES:
    TURNS.labels(_outcome)  # shown as 0 until it happens, so that rates have a beginning

_SECRET_KEYS = re.compile(r"password|secret|token$|api_?key|authorization|cookie", re.IGNORECASE)
_SECRET_VALUES = re.compile(r"(sk-[A-Za-z0-9_-]{6})[A-Za-z0-9_-]+|(://[^:/@\s]+:)[^@\s]+@|((?i:bearer) )\S+")


def redact(_: Any, __: str, event: structlog.typing.EventDict) -> structlog.typing.EventDict:
    """Hide secrets by the name of their key, and inside values by their form."""
    event.update({key: _hidden(key, value) for key, value in event.items()})
    return event


def _hidden(key: str, value: Any) -> Any:
    if _SECRET_KEYS.search(key):
        return "***"
    if isinstance(value, str):
        return _SECRET_VALUES.sub(lambda found: f"{found[1] or found[2] or found[3]}***", value)
    if isinstance(value, Mapping):
        return {name: _hidden(str(name), each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_hidden("", each) for each in value]
    return value


class _Bridge(logging.Handler):
    """What libraries tell the standard library's log, told to ours: in the same form, with the same secrets hidden."""

    def emit(self, record: logging.LogRecord) -> None:
        """Pass *record* on."""
        fault = {"exc_info": record.exc_info} if record.exc_info and record.exc_info[0] else {}
        level = max(logging.WARNING, min(record.levelno // 10 * 10, logging.CRITICAL))
        log.log(level, record.getMessage(), logger=record.name, **fault)


def _bridge() -> None:
    """Let libraries warn through us, and nowhere else."""
    root = logging.getLogger()
    for each in [each for each in root.handlers if isinstance(each, _Bridge)]:
        root.removeHandler(each)
    root.addHandler(_Bridge(logging.WARNING))
    for name in ("aiohttp", "asyncio", "nats", "faststream"):
        library = logging.getLogger(name)
        library.handlers.clear()  # FastStream brings its own, and keeps them from us
        library.propagate = True


def configure(*, level: str, style: str) -> None:
    """Log to standard error, as JSON lines or for people (``console``); libraries' warnings and errors as well."""
    renderer: Any = structlog.processors.JSONRenderer() if style == "json" else structlog.dev.ConsoleRenderer()
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso"),
            structlog.processors.format_exc_info,
            redact,
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.getLevelNamesMapping()[level.upper()]),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
    )
    _bridge()
