"""Several addresses of one expert, with engines in memory and with real ones that are killed and come back."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing

import prometheus_client
import pytest
from aiohttp import web

from capibara_flow.domain.fleet import Expert, Fleet
from capibara_flow.domain.health import Thresholds
from capibara_flow.engines import scripted
from capibara_flow.engines.build import build_engine
from capibara_flow.engines.pool import REST_SECONDS, Pool, Probing
from capibara_flow.engines.pools import Changes, Pools
from capibara_flow.engines.script import Answer, Script
from capibara_flow.errors import BadRequest, CapibaraError, EngineBroke, EngineBusy, EngineUnreachable
from capibara_flow.ports import Abilities, Finish, Piece, Text
from capibara_flow.settings import SettingsError
from tests.waiting import until
from topics.chat import ChatMessage, ChatRequest

ASK = ChatRequest(messages=(ChatMessage(role="user", content="hi"),))
LIMITS = Thresholds(faults=3, rest_seconds=2, most_rest_seconds=30)
BRISK = Probing(up_seconds=0.05, down_seconds=0.05)


class Fake:
    """An engine in memory: it says its name, perhaps after an error of ours, and remembers."""

    def __init__(self, name: str, before: CapibaraError | None = None, after: CapibaraError | None = None) -> None:
        self.name, self.before, self.after = name, before, after
        self.calls = self.closed = self.probes = 0
        self.abilities = Abilities(tools=True)
        self.release: asyncio.Event | None = None

    async def stream(self, request: ChatRequest) -> AsyncGenerator[Piece, None]:
        del request
        self.calls += 1
        if self.release:
            await self.release.wait()
        if self.before:
            raise self.before
        try:
            yield Text(self.name)
            if self.after:
                raise self.after
            yield Finish("stop")
        finally:
            self.closed += 1

    async def health(self) -> None:
        self.probes += 1
        if self.before:
            raise self.before

    async def aclose(self) -> None:
        self.closed += 1


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def pool_of(*engines: Fake, **options: object) -> Pool:
    by_url = {f"http://{each.name}": each for each in engines}
    return Pool("phi", list(by_url), by_url.__getitem__, **{"limits": LIMITS, **options})  # type: ignore[arg-type]


async def said(engine: Pool) -> str:
    async with aclosing(engine.stream(ASK)) as pieces:
        return "".join([piece.text async for piece in pieces if isinstance(piece, Text)])


def refused() -> EngineUnreachable:
    error = EngineUnreachable("gone")
    error.__cause__ = ConnectionRefusedError(111, "refused")
    return error


def states(pool: Pool) -> list[str]:
    return [each["state"] for each in pool.facts()["replicas"]]


# --- who answers ---------------------------------------------------------------------------------------------


async def test_the_work_is_shared() -> None:
    pool = pool_of(Fake("a"), Fake("b"))
    assert [await said(pool) for _ in range(4)] == ["a", "b", "a", "b"]


async def test_the_least_busy_one_answers() -> None:
    pool = pool_of(Fake("a"), Fake("b"))
    streams = [pool.stream(ASK) for _ in range(3)]
    assert [await anext(stream) for stream in streams] == [Text("a"), Text("b"), Text("a")]
    assert [each["streams"] for each in pool.facts()["replicas"]] == [2, 1]
    await asyncio.gather(streams[0].aclose(), streams[2].aclose())
    assert await said(pool) == "a"
    await streams[1].aclose()


@pytest.mark.parametrize("error", [EngineUnreachable("gone"), EngineBusy("full"), EngineBroke("silent")])
async def test_the_next_one_answers_when_the_first_cannot_begin(error: CapibaraError) -> None:
    assert await said(pool_of(Fake("a", before=error), Fake("b"))) == "b"


async def test_who_could_not_begin_comes_last_for_a_while() -> None:
    clock, weak = Clock(), Fake("a", before=EngineBusy("full"))
    pool = pool_of(weak, Fake("b"), clock=clock)
    for _ in range(4):
        await said(pool)
    assert weak.calls == 1
    clock.now = REST_SECONDS
    await said(pool)
    assert weak.calls == 2


async def test_when_nobody_can_the_last_error_is_told() -> None:
    pool = pool_of(Fake("a", before=EngineUnreachable("gone")), Fake("b", before=EngineBusy("full")))
    with pytest.raises(EngineBusy, match="full"):
        await said(pool)
    with pytest.raises(EngineBusy):
        await pool.health()


@pytest.mark.parametrize("error", [EngineUnreachable("gone"), EngineBroke("broke")])
async def test_nobody_else_goes_on_in_mid_answer(error: CapibaraError) -> None:
    other = Fake("b")
    with pytest.raises(type(error)):
        await said(pool_of(Fake("a", after=error), other))
    assert other.calls == 0


async def test_a_bad_request_is_bad_everywhere_and_says_nothing_about_the_engine() -> None:
    other = Fake("b")
    pool = pool_of(Fake("a", before=BadRequest("no")), other)
    for _ in range(LIMITS.faults + 1):
        with pytest.raises(BadRequest):
            async with aclosing(pool.stream(ASK)) as pieces:
                await anext(pieces)
        other.before = BadRequest("no")
    assert states(pool) == ["closed", "closed"]


async def test_closing_reaches_the_engine_at_once() -> None:
    engine = Fake("a")
    pool = pool_of(engine)
    stream = pool.stream(ASK)
    await anext(stream)
    await stream.aclose()
    assert (engine.closed, pool.facts()["streams"]) == (1, 0)


async def test_one_healthy_replica_is_health_and_all_are_closed() -> None:
    engines = [Fake("a", before=EngineUnreachable("gone")), Fake("b")]
    pool = pool_of(*engines)
    await pool.health()
    await pool.aclose()
    assert [each.closed for each in engines] == [1, 1]
    assert pool.abilities.tools


# --- the breaker ---------------------------------------------------------------------------------------------


async def test_an_engine_that_refuses_connections_is_not_asked_again_before_its_time() -> None:
    clock, engine = Clock(), Fake("a", before=refused())
    pool = pool_of(engine, clock=clock)
    for _ in range(3):
        with pytest.raises(EngineUnreachable, match="gone"):
            await said(pool)
    assert (engine.calls, pool.available, states(pool)) == (1, False, ["open"])
    clock.now, engine.before = LIMITS.rest_seconds, None
    assert pool.available
    assert await said(pool) == "a"
    assert states(pool) == ["closed"]


@pytest.mark.parametrize("fault", ["before", "after"])
async def test_answers_that_keep_breaking_open_it(fault: str) -> None:
    engine = Fake("a", **{fault: EngineBroke("broke")})
    pool = pool_of(engine, clock=Clock())
    for _ in range(LIMITS.faults):
        with pytest.raises(EngineBroke):
            await said(pool)
    with pytest.raises(EngineUnreachable, match="no server of phi can be reached now: broke"):
        await said(pool)
    assert engine.calls == LIMITS.faults


async def test_one_trial_at_a_time_and_the_first_piece_lets_others_follow() -> None:
    clock, engine = Clock(), Fake("a", before=refused())
    pool = pool_of(engine, clock=clock)
    with pytest.raises(EngineUnreachable):
        await said(pool)
    clock.now, engine.before, engine.release = LIMITS.rest_seconds, None, asyncio.Event()
    trial = asyncio.create_task(said(pool))
    await until(lambda: engine.calls == 2)
    with pytest.raises(EngineUnreachable):
        await said(pool)
    assert engine.calls == 2
    engine.release.set()
    assert await trial == "a"
    assert await said(pool) == "a"


async def test_a_trial_that_is_given_up_leaves_the_place_to_another() -> None:
    clock, engine = Clock(), Fake("a", before=refused())
    pool = pool_of(engine, clock=clock)
    with pytest.raises(EngineUnreachable):
        await said(pool)
    clock.now, engine.before, engine.release = LIMITS.rest_seconds, None, asyncio.Event()
    trial = asyncio.create_task(said(pool))
    await until(lambda: engine.calls == 2)
    trial.cancel()
    await asyncio.gather(trial, return_exceptions=True)
    engine.release.set()
    assert await said(pool) == "a"


async def test_an_engine_that_is_only_busy_is_not_taken_for_dead() -> None:
    pool = pool_of(Fake("a", before=EngineBusy("full")))
    for _ in range(5):
        with pytest.raises(EngineBusy):
            await said(pool)
    assert pool.available


async def test_somebody_can_wait_until_it_is_available() -> None:
    engine = Fake("a", before=refused())
    pool = pool_of(engine, limits=Thresholds(rest_seconds=600, most_rest_seconds=600), probing=BRISK)
    await pool.wait_available()
    pool.start()
    await until(lambda: not pool.available)
    waiting = asyncio.create_task(pool.wait_available())
    await until(lambda: engine.probes > 2)
    assert not waiting.done()
    engine.before = None
    await asyncio.wait_for(waiting, 20)
    await pool.aclose()


async def test_without_probes_the_end_of_its_rest_makes_it_available() -> None:
    pool = pool_of(Fake("a", before=refused()), limits=Thresholds(rest_seconds=0.05))
    with pytest.raises(EngineUnreachable):
        await said(pool)
    await asyncio.wait_for(pool.wait_available(), 20)


# --- metrics and facts ---------------------------------------------------------------------------------------


def sample(name: str, expert: str, replica: int) -> float | None:
    return prometheus_client.REGISTRY.get_sample_value(f"capibara_engine_{name}", {"expert": expert, "replica": str(replica)})


async def test_what_is_known_is_told_without_addresses() -> None:
    changes: list[bool] = []
    engines = {"http://secret-host:1": Fake("a", before=refused()), "http://secret-host:2": Fake("b")}
    pool = Pool("told", list(engines), engines.__getitem__, on_change=lambda: changes.append(True), clock=Clock())
    await said(pool)
    assert [sample("up", "told", index) for index in (0, 1)] == [0, 1]
    assert [sample("breaker_opened_total", "told", index) for index in (0, 1)] == [1, 0]
    stream = pool.stream(ASK)
    await anext(stream)
    assert sample("streams", "told", 1) == 1
    facts = pool.facts()
    assert facts["available"]
    assert facts["replicas"][0] == {"replica": 0, "state": "open", "streams": 0, "faults": 1, "opened": 1, "last_fault": "gone"}
    assert "secret" not in str(facts)
    assert changes
    await stream.aclose()
    await pool.aclose()
    assert sample("up", "told", 0) is None


# --- with real engines ---------------------------------------------------------------------------------------


class Server:
    """A scripted engine that can be killed, and started again at the same address."""

    def __init__(self) -> None:
        self.script = Script(default=Answer(text="one two three"))
        self.port = 0
        self.url = ""
        self._runner: web.AppRunner | None = None

    async def start(self) -> "Server":
        self._runner, self.url = await scripted.serve(self.script, port=self.port)
        self.port = self._runner.addresses[0][1]
        return self

    async def kill(self) -> None:
        if self._runner:
            await self._runner.cleanup()
        self._runner = None


@pytest.fixture
async def servers() -> AsyncIterator[list[Server]]:
    running = [await Server().start(), await Server().start()]
    yield running
    for each in running:
        await each.kill()


def expert(*servers: Server, name: str = "real", **more: object) -> Expert:
    return Expert.model_validate({"name": name, "dialect": "llama_server", "urls": [each.url for each in servers], **more})


def real(*servers: Server, **options: object) -> Pool:
    described = expert(*servers)
    return Pool("real", described.urls, lambda url: build_engine(described, url), **options)  # type: ignore[arg-type]


async def test_a_killed_engine_is_left_alone_and_used_again_after_one_probe(servers: list[Server]) -> None:
    pool = real(*servers, probing=BRISK)
    pool.start()
    assert await said(pool) == await said(pool) == "one two three"
    await servers[0].kill()
    await until(lambda: states(pool) == ["open", "closed"])
    assert [await said(pool) for _ in range(4)] == ["one two three"] * 4
    await servers[1].kill()
    await until(lambda: not pool.available)
    with pytest.raises(EngineUnreachable, match="no server of real can be reached now"):
        await said(pool)
    await servers[1].start()
    await asyncio.wait_for(pool.wait_available(), 20)
    assert await said(pool) == "one two three"
    await pool.aclose()


async def test_without_probes_calls_find_out_themselves(servers: list[Server]) -> None:
    pool = real(*servers, limits=Thresholds(rest_seconds=0.05))
    await servers[0].kill()
    assert [await said(pool) for _ in range(3)] == ["one two three"] * 3
    assert "open" in states(pool)
    await servers[0].start()

    async def back() -> bool:
        await said(pool)
        return states(pool) == ["closed", "closed"]

    await until(back)
    await pool.aclose()


# --- a fleet that changes ------------------------------------------------------------------------------------


def fleet(*experts: Expert) -> Fleet:
    return Fleet(experts=experts)


@pytest.fixture
async def pools(servers: list[Server]) -> AsyncIterator[Pools]:
    made = Pools(fleet(expert(*servers, name="stays"), expert(servers[0], name="go.es")), probing=BRISK)
    yield made
    await made.aclose()


async def test_engines_are_found_by_the_token_of_their_expert(pools: Pools) -> None:
    assert list(pools) == ["stays", "go_es"]
    assert set(pools.facts()) == {"stays", "go.es"}
    assert "go.es" not in pools


async def test_a_reload_keeps_what_is_as_it_was(pools: Pools, servers: list[Server]) -> None:
    before = pools["stays"]
    changes = pools.reload(fleet(expert(*servers, name="stays", priority=7), expert(servers[1], name="new")))
    assert changes == Changes(added=("new",), removed=("go.es",))
    assert pools["stays"] is before
    assert await said(pools["new"]) == "one two three"
    assert "go_es" not in pools


async def test_an_expert_that_changed_gets_new_engines(pools: Pools, servers: list[Server]) -> None:
    before = pools["stays"]
    changes = pools.reload(fleet(expert(*servers, name="stays", model="other"), expert(servers[0], name="go.es")))
    assert changes == Changes(changed=("stays",))
    assert pools["stays"] is not before
    assert await said(pools["stays"]) == "one two three"
    assert sample("up", "stays", 0) == 1


async def test_what_is_removed_ends_its_streams_in_peace(pools: Pools, servers: list[Server]) -> None:
    slow = Server()
    slow.script = Script(default=Answer(text="one two three", delay_ms=100))
    pools.reload(fleet(expert(*servers, name="stays"), expert(await slow.start(), name="go.es")))
    leaving = pools["go_es"]
    stream = leaving.stream(ASK)
    first = await anext(stream)
    pools.reload(fleet(expert(*servers, name="stays")))
    with pytest.raises(EngineUnreachable):
        await said(leaving)
    rest = [piece async for piece in stream]
    assert "".join(each.text for each in (first, *rest) if isinstance(each, Text)) == "one two three"
    await until(lambda: not pools._draining)
    assert sample("up", "go.es", 0) is None
    await slow.kill()


async def test_what_is_still_being_drained_at_the_end_is_closed_too(servers: list[Server]) -> None:
    slow = Server()
    slow.script = Script(default=Answer(text="one two three", delay_ms=1000))
    pools = Pools(fleet(expert(*servers, name="stays"), expert(await slow.start(), name="go.es")))
    leaving = pools["go_es"]
    stream = leaving.stream(ASK)
    await anext(stream)
    pools.reload(fleet(expert(*servers, name="stays")))
    await pools.aclose()
    with pytest.raises((EngineBroke, RuntimeError)):  # its session is closed
        async for _ in stream:
            pass
    await slow.kill()


async def test_an_address_that_is_removed_ends_its_streams_and_the_others_keep_their_state(servers: list[Server]) -> None:
    pools = Pools(fleet(expert(*servers, name="moves")), probing=BRISK)
    pools.start()
    await servers[1].kill()
    pool = pools["moves"]
    await until(lambda: states(pool) == ["closed", "open"])
    stream = pool.stream(ASK)
    await anext(stream)
    assert pools.reload(fleet(expert(servers[1], name="moves"))) == Changes()
    assert pools["moves"] is pool
    assert states(pool) == ["open"]
    assert [type(piece) async for piece in stream][-1] is Finish
    await until(lambda: not pools._draining)
    await pools.aclose()


async def test_a_fleet_whose_engine_cannot_be_built_changes_nothing(pools: Pools, servers: list[Server]) -> None:
    bare = expert(servers[0], name="bare").model_copy(update={"dialect": "llama_completion", "template": "nonsense"})
    with pytest.raises(SettingsError, match="nonsense"):
        pools.reload(fleet(bare))
    assert list(pools) == ["stays", "go_es"]


async def test_experts_of_a_host_are_none_of_ours(servers: list[Server]) -> None:
    launched = Expert.model_validate({"name": "lazy", "weights": "w.gguf", "launch": {"engine": "llama_server"}})
    pools = Pools(fleet(launched, expert(servers[0])))
    assert list(pools) == ["real"]
    await pools.aclose()
