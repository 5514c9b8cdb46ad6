"""What processes tell of themselves: a key each in a bucket that forgets soon, so that whoever is there can be seen, and nobody else."""

import asyncio
import json
import os
import socket
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

from nats.errors import Error as NatsError

from capibara_flow.errors import BrokerUnavailable
from capibara_flow.runtime.bucket import REMOVED
from capibara_flow.runtime.client import TokenClient
from capibara_flow.runtime.output import batch
from capibara_flow.tasks import ended
from capibara_flow.telemetry import log
from topics.streams import REPORT_SECONDS, REPORTS, report_key, subject_token

EVERY_SECONDS = REPORT_SECONDS / 4
_APART = 0.1  # seconds between two reports, however much changes


def this_process() -> str:
    """A name for this process, unlike those of others that live now, which may stand in a subject."""
    return subject_token(f"{socket.gethostname()[:48]}-{os.getpid()}")


class Reporter:
    """Tells what *facts* returns, which must be fit for JSON, every few seconds and soon after ``changed`` was called.

    Nothing is waited for and nothing raised: what could not be told is told anew the next time.
    """

    def __init__(
        self,
        client: TokenClient,
        worker: str,
        process: str,
        facts: Callable[[], Mapping[str, Any]],
        *,
        every: float = EVERY_SECONDS,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._client, self._facts, self._every, self._clock = client, facts, every, clock
        self._key = report_key(worker, process)
        self._who = {"worker": worker, "process": process, "since": clock()}
        self._due = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to tell."""
        self._task = self._task or asyncio.create_task(self._tell())

    def changed(self) -> None:
        """There is something new to be told."""
        self._due.set()

    async def stop(self) -> None:
        """Tell no more, and let the last report vanish."""
        if self._task:
            await ended(self._task)
            self._task = None
            await self._put(b"", REMOVED)

    async def _tell(self) -> None:
        while True:
            self._due.clear()
            report = {**self._who, "at": self._clock(), "facts": dict(self._facts())}
            await self._put(json.dumps(report).encode())
            await asyncio.sleep(_APART)
            with suppress(TimeoutError):
                async with asyncio.timeout(self._every):
                    await self._due.wait()

    async def _put(self, body: bytes, headers: dict[str, str] | None = None) -> None:
        if not self._client.is_connected:
            return  # it would be kept for later, and be old by then
        try:
            await self._client.publish(self._key, body, headers=headers)
        except NatsError as error:
            log.warning("report_untold", key=self._key, error=repr(error))


async def read_reports(client: TokenClient) -> list[dict[str, Any]]:
    """The last report of each process that lives, by worker and process; raises ``BrokerUnavailable``.

    A report is ``{worker, process, since, at, facts}``; times are seconds since the epoch, by that process's clock.
    """
    try:
        found = await batch(client, REPORTS, {"multi_last": [report_key("*", "*")]})  # NATS ADR-31
    except NatsError as error:
        raise BrokerUnavailable(f"{REPORTS} cannot be asked: {error!r}") from error
    # What has no body tells that a key was removed, or ran out.
    reports = [report for each in found if each.data and (report := _report(each.data))]
    return sorted(reports, key=lambda each: (each["worker"], each["process"]))


def _report(body: bytes) -> dict[str, Any] | None:
    """The report in *body*; none when it has another form, of another version, say."""
    try:
        report = json.loads(body)
    except ValueError:
        return None
    told = isinstance(report, dict) and all(isinstance(report.get(name), str) for name in ("worker", "process"))
    return report if told else None


async def reports_or_none(client: TokenClient) -> list[dict[str, Any]]:
    """The same, and none while the broker does not answer."""
    try:
        return await read_reports(client)
    except BrokerUnavailable as error:
        log.warning("reports_unread", error=repr(error))
        return []
