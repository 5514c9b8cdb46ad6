"""One engine as a child process of the host: started, checked, put to sleep, watched, ended."""

import asyncio
import contextlib
import secrets
from collections import deque
from collections.abc import Callable

import aiohttp

from capibara_flow.domain.fleet import Expert
from capibara_flow.engines.build import build_engine
from capibara_flow.engines.host import launch, machine, warden
from capibara_flow.errors import EngineUnreachable
from capibara_flow.ports import ChatEngine
from capibara_flow.tasks import ended
from capibara_flow.telemetry import log

POLL_SECONDS = 0.1
#: A first completion may have to warm everything up.
COMPLETION_SECONDS = 300.0
WAKE_SECONDS = 120.0
LAST_WORDS_SECONDS = 1.0
#: What a warden may need beyond its grace time.
KILL_SECONDS = 5.0
#: How often an engine may leave a question for its health unanswered before it is held to hang.
TRIES, PAUSE_SECONDS = 3, 0.5
_TAIL_LINES, _READ_BYTES = 40, 65536
_REFUSED_KEY = (401, 403)

Launcher = Callable[[Expert, launch.Place], launch.Command]


class LoadFailed(Exception):
    """The engine could not be loaded; the words are for clients, what the engine said stands in the log."""


class Child:
    """The engine of *expert*, on a free port, for whoever has a key that only we know; *engine* speaks with it.

    A warden keeps it: it ends when we do, however that happens.
    """

    def __init__(self, expert: Expert, launcher: Launcher, *, rest_after_s: float | None, grace_seconds: float, ask_seconds: float) -> None:
        self.name = expert.name
        self.key = secrets.token_urlsafe(24)
        self.url = f"http://127.0.0.1:{(port := machine.free_port())}"
        self.command = launcher(expert, launch.Place(port, self.key, rest_after_s))
        self.model = expert.model or expert.name
        served = {"dialect": self.command.dialect, "urls": (self.url,), "api_key": self.key, "model": self.model}
        self.engine: ChatEngine = build_engine(expert.model_copy(update=served), self.url)
        self.stopping = False
        self.resting = False
        self._rest = asyncio.Lock()
        self._grace, self._ask = grace_seconds, ask_seconds
        self._session: aiohttp.ClientSession | None = None
        self._process: asyncio.subprocess.Process | None = None
        self._reading: asyncio.Task[None] | None = None
        self._tail: deque[str] = deque(maxlen=_TAIL_LINES)

    async def start(self) -> None:
        """Start the process; raises ``LoadFailed`` when there is not even a warden."""
        try:
            self._process = await asyncio.create_subprocess_exec(
                *warden.watched(self.command.argv, self._grace),
                env=launch.environment(self.command),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.STDOUT,
                # Ctrl-C at the terminal is for the host, which ends its engines in order.
                start_new_session=True,
            )
        except OSError as error:
            raise LoadFailed(f"{self.name} could not be started: {error.strerror}") from error
        self._session = aiohttp.ClientSession(self.url, cookie_jar=aiohttp.DummyCookieJar())
        self._reading = asyncio.create_task(self._read())

    async def ready(self, seconds: float) -> None:
        """Wait until it has answered a real question, within *seconds*; raises ``LoadFailed``."""
        ending = asyncio.create_task(self.ended())
        answering = asyncio.create_task(self._answers())
        try:
            await asyncio.wait({ending, answering}, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
            if answering.done():
                return answering.result()
            if ending.done():
                raise LoadFailed(f"{self.name} could not be loaded: its engine ended with {_ending(ending.result())}")
            raise LoadFailed(f"{self.name} could not be loaded within {seconds:g} s")
        finally:
            await ended(ending, answering)

    async def ended(self) -> int:
        """Wait for its end and its last words; its exit code, 128 and more for a signal."""
        assert self._process is not None  # noqa: S101  started
        assert self._reading is not None  # noqa: S101  started
        code = await self._process.wait()
        await asyncio.wait({self._reading}, timeout=LAST_WORDS_SECONDS)
        return code

    @property
    def last_words(self) -> str:
        """The end of what it wrote."""
        return "\n".join(self._tail)

    @property
    def pid(self) -> int | None:
        """The engine's own process id."""
        family = machine.family(self._process.pid) if self._process else []
        return family[1] if len(family) > 1 else None

    async def memory_mib(self) -> int | None:
        """What it takes now, all its processes together. In a thread: a large engine's pages take a while to count."""
        if self._process is None:
            return None
        pids = machine.family(self._process.pid)
        return await asyncio.to_thread(machine.resident_mib, pids)

    async def rest(self, idle: Callable[[], bool]) -> None:
        """Put it to sleep where it can be told to, if it is *idle* then; it wakes with ``wake``. Should it refuse, it stays awake."""
        async with self._rest:
            if self.command.sleeps and idle():
                self.resting = await self._told("/sleep?level=1")

    async def wake(self) -> None:
        """Wake it; raises ``EngineUnreachable``."""
        async with self._rest:
            if self.resting and not await self._told("/wake_up"):
                raise EngineUnreachable(f"{self.name} sleeps and does not wake up")
            self.resting = False

    async def healthy(self) -> bool:
        """Whether it still answers at all."""
        with contextlib.suppress(aiohttp.ClientError, OSError, TimeoutError):
            return await self._status("GET", "/health", seconds=self._ask) == 200
        return False

    async def hangs(self) -> bool:
        """Whether it lives but does not answer any more, asked several times: who computes hard may be late."""
        for _ in range(TRIES):
            if await self.healthy():
                return False
            await asyncio.sleep(PAUSE_SECONDS)
            if self.stopping or not self.alive:
                return False
        return True

    @property
    def alive(self) -> bool:
        """Whether there is a process."""
        return self._process is not None and self._process.returncode is None

    async def put_down(self) -> None:
        """End it without saying that it was meant to: whoever watches it sees a crash."""
        if self._process is not None:
            await self._end(self._process)

    async def stop(self) -> None:
        """End it: its warden has its grace time to end it well, then it is killed."""
        self.stopping = True
        if self._process is not None:
            await self._end(self._process)
        await ended(self._reading)
        # Not before: whoever still listens shall hear that the engine broke off.
        await self.engine.aclose()
        if self._session is not None:
            await self._session.close()

    async def _end(self, process: asyncio.subprocess.Process) -> None:
        with contextlib.suppress(ProcessLookupError):
            process.terminate()
        try:
            async with asyncio.timeout(self._grace + KILL_SECONDS):
                await process.wait()
        except TimeoutError:
            process.kill()
            await process.wait()

    # --- asking it ------------------------------------------------------------------------------------------------

    async def _answers(self) -> None:
        while not await self.healthy():  # noqa: ASYNC110  another process raises no event of ours
            await asyncio.sleep(POLL_SECONDS)
        # Whoever got our port first answers anybody, or nobody: our engine, those who know its key.
        if (status := await self._complete(with_key=False)) not in _REFUSED_KEY:
            raise LoadFailed(f"{self.name} could not be loaded: what answers in its place ({status}) is not its engine")
        if (status := await self._complete(with_key=True)) != 200:
            raise LoadFailed(f"{self.name} was loaded but does not answer ({status})")

    async def _complete(self, *, with_key: bool) -> int:
        body = {"model": self.model, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1}
        try:
            return await self._status("POST", "/v1/chat/completions", body, seconds=COMPLETION_SECONDS, with_key=with_key)
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            log.warning("expert_unanswering", expert=self.name, error=repr(error))
            raise LoadFailed(f"{self.name} was loaded but does not answer") from error

    async def _told(self, path: str) -> bool:
        try:
            return await self._status("POST", path, seconds=WAKE_SECONDS) == 200
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            log.warning("expert_not_told", expert=self.name, path=path, error=repr(error))
            return False

    async def _status(self, method: str, path: str, body: object = None, *, seconds: float, with_key: bool = True) -> int:
        assert self._session is not None  # noqa: S101  started
        headers = {"Authorization": f"Bearer {self.key}"} if with_key else {}
        timeout = aiohttp.ClientTimeout(total=seconds)
        async with self._session.request(method, path, json=body, headers=headers, timeout=timeout) as response:
            await response.read()
            return response.status

    async def _read(self) -> None:
        """Keep the end of what it writes: a pipe that nobody empties would stop it."""
        assert self._process is not None  # noqa: S101  started
        assert self._process.stdout is not None  # noqa: S101  asked for
        rest = ""
        while chunk := await self._process.stdout.read(_READ_BYTES):
            *lines, rest = (rest + chunk.decode("utf-8", "replace")).split("\n")
            self._tail.extend(line[:500] for line in lines if line.strip())
            rest = rest[-_READ_BYTES:]
        if rest.strip():
            self._tail.append(rest[:500])


def _ending(code: int) -> str:
    return f"signal {code - 128}" if code > 128 else f"exit code {code}"
