"""The bench must notice what it is there to notice."""

import asyncio
import csv
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import ExitStack, asynccontextmanager
from dataclasses import replace
from pathlib import Path

import orjson
import pytest
from openai import AsyncOpenAI
from rich.console import Console

from capibara_flow import wiring
from capibara_flow.runtime.embedded import EmbeddedBroker
from tests.conftest import settings_for
from tests.waiting import until as waited

from . import __main__ as bench
from . import courses, floor, knowledge, load, mock, peers, pictures, scenarios, smallest, storm, system
from .load import Plan
from .page import PageCost
from .scenarios import Figure, Run
from .wire import Ask, Transcript, token

TOKENS = 5


@pytest.fixture
async def engine() -> AsyncIterator[str]:
    server, url = await mock.serve()
    yield url
    server.close()


async def get(url: str, path: str) -> dict[str, object]:
    address = url.removeprefix("http://")
    reader, writer = await asyncio.open_connection(*address.split(":"))
    writer.write(f"GET {path} HTTP/1.1\r\nHost: {address}\r\n\r\n".encode())
    head = await reader.readuntil(b"\r\n\r\n")
    length = int(head.lower().split(b"content-length:")[1].split()[0])
    body: dict[str, object] = orjson.loads(await reader.readexactly(length))
    writer.close()
    return body


async def until(condition: Callable[[dict[str, object]], bool], url: str) -> dict[str, object]:
    async with asyncio.timeout(20):
        while not condition(counts := await get(url, "/counts")):  # noqa: ASYNC110  the engine cannot tell, it must be asked
            await asyncio.sleep(0.01)
    return counts


@pytest.mark.parametrize(
    "plan",
    [
        Plan("", clients=3, requests=2, tokens=20),
        Plan("", clients=3, requests=2, tokens=4, gap_ms=2, spread_ms=5),
        Plan("", clients=3, requests=2, tokens=1),
        Plan("", clients=3, requests=2, tokens=7, stream=False),
        Plan("", clients=3, requests=2, tokens=3, gap_ms=1, stream=False),
    ],
    ids=["burst", "paced", "single", "whole", "whole-paced"],
)
async def test_an_honest_engine_has_no_errors(engine: str, plan: Plan) -> None:
    report = await load.run(Plan(**{**vars(plan), "url": engine}))
    assert report.errors == []
    assert (report.requests, report.failed, report.tokens) == (6, 0, 6 * plan.tokens)
    assert 0 < report.token_delay_ms["p50"] <= report.token_delay_ms["max"]
    assert await get(engine, "/counts") == {"requests": 9, "aborted": 0, "active": 0, "tokens": 9 * plan.tokens}


async def test_tokens_do_not_come_before_their_time(engine: str) -> None:
    report = await load.run(Plan(engine, tokens=6, gap_ms=20, warmup=0))
    assert report.request_ms["p50"] >= 5 * 20 - 2


async def test_the_engine_counts_readers_that_left(engine: str) -> None:
    host, port = engine.removeprefix("http://").split(":")
    _, connection = await asyncio.get_running_loop().create_connection(load.Connection, host, int(port))
    first = asyncio.Event()
    body = Ask("gone", 1000, gap_ms=50).body("mock")
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body)
    asking = asyncio.ensure_future(connection.ask(head + body, lambda _: first.set()))
    await asyncio.wait_for(first.wait(), 20)
    connection.close()
    with pytest.raises(ConnectionError):
        await asking
    counts = await until(lambda counts: counts["aborted"] == 1, engine)
    assert counts["active"] == 0


async def test_an_official_client_understands_the_engine(engine: str) -> None:
    async with AsyncOpenAI(base_url=f"{engine}/v1", api_key="none") as client:
        assert [model.id async for model in client.models.list()] == ["mock"]
        stream = await client.chat.completions.create(
            model="mock",
            max_tokens=TOKENS,
            messages=[{"role": "user", "content": "bench gap_ms=1 id=official"}],
            stream=True,
            stream_options={"include_usage": True},
        )
        chunks = [chunk async for chunk in stream]
    text = "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)
    assert [word.split(":")[0] for word in text.split()] == ["0", "1", "2", "3", "4"]
    assert chunks[-2].choices[0].finish_reason == "length"
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == TOKENS


async def test_what_is_no_request_is_refused(engine: str) -> None:
    report = await load.run(Plan(f"{engine}/elsewhere", warmup=0))
    assert report.failed == 1
    assert "HTTP 404" in report.errors[0]


# --- liars ---------------------------------------------------------------------------------------------------


@asynccontextmanager
async def liar(say: Callable[[str], Iterable[bytes]]) -> AsyncIterator[str]:
    """A server that answers every request with the SSE data lines of *say*, given the request's id, and closes."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        ask = Ask.read(await reader.readexactly(int(head.lower().split(b"content-length:")[1].split()[0])))
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n")
        writer.writelines(b"data: " + line + b"\n\n" for line in say(ask.ident))
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    async with server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"


def says(text: str, reason: str | None = None) -> bytes:
    return orjson.dumps({"choices": [{"index": 0, "delta": {"content": text}, "finish_reason": reason}]})


def usage(tokens: int = TOKENS) -> bytes:
    return orjson.dumps({"choices": [], "usage": {"prompt_tokens": 1, "completion_tokens": tokens}})


def honest(ident: str) -> list[bytes]:
    return [*(says(token(n, ident)) for n in range(TOKENS)), says("", "stop"), usage(), b"[DONE]"]


def joined(ident: str) -> list[bytes]:
    text = "".join(token(n, ident) for n in range(TOKENS))
    return [says(text[:30]), says(text[30:], "stop"), usage(), b"[DONE]"]


LIES: dict[str, tuple[Callable[[str], Iterable[bytes]], str]] = {
    "drops": (lambda ident: [line for n, line in enumerate(honest(ident)) if n != 2], "where 2 was due"),
    "drops-first": (lambda ident: honest(ident)[1:], "where 0 was due"),
    "drops-last": (lambda ident: [line for n, line in enumerate(honest(ident)) if n != TOKENS - 1], "4 tokens of 5"),
    "doubles": (lambda ident: [line for n, line in enumerate(honest(ident)) for _ in range(1 + (n == 2))], "where 3 was due"),
    "swaps": (lambda ident: [honest(ident)[n] for n in (0, 2, 1, 3, 4, 5, 6, 7)], "where 1 was due"),
    "confuses": (lambda ident: honest("somebody"), "somebody else's"),
    "halves": (lambda ident: [*honest(ident)[:5], says("5:12"), *honest(ident)[5:]], "half a token"),
    "never-finishes": (lambda ident: [*honest(ident)[:5], usage(), b"[DONE]"], "no finish_reason"),
    "never-ends": (lambda ident: honest(ident)[:-1], "no [DONE]"),
    "goes-on": (lambda ident: [*honest(ident), says("more")], "after [DONE]"),
    "miscounts": (lambda ident: [*honest(ident)[:-2], usage(3), b"[DONE]"], "usage says 3"),
    "hides-usage": (lambda ident: [*honest(ident)[:-2], b"[DONE]"], "usage says None"),
    "fails": (lambda ident: [*honest(ident)[:2], b'{"error": {"message": "out of memory"}}', b"[DONE]"], "out of memory"),
    "stammers": (lambda ident: [b"{", *honest(ident)], "not JSON"),
}


@pytest.mark.parametrize("say", [honest, joined])
async def test_pieces_may_be_joined_and_cut(say: Callable[[str], Iterable[bytes]]) -> None:
    async with liar(say) as url:
        report = await load.run(Plan(url, requests=2, tokens=TOKENS))
    assert report.errors == []


@pytest.mark.parametrize("lie", LIES)
async def test_a_lie_is_noticed(lie: str) -> None:
    say, complaint = LIES[lie]
    async with liar(say) as url:
        report = await load.run(Plan(url, tokens=TOKENS, warmup=0))
    assert report.failed == 1
    assert any(complaint in error for error in report.errors), report.errors


async def test_a_lie_in_the_warm_up_is_noticed() -> None:
    async with liar(LIES["drops"][0]) as url:
        report = await load.run(Plan(url, requests=0, tokens=TOKENS))
    assert report.failed == 1


async def test_a_lie_in_the_warm_up_is_told_once() -> None:
    async with liar(LIES["drops"][0]) as url:
        reports = [report async for report in load.parts(Plan(url, requests=0, tokens=TOKENS, parts=2))]
    assert [report.failed for report in reports] == [1, 0]


async def test_an_answer_that_never_comes_is_noticed() -> None:
    async def silent(_reader: asyncio.StreamReader, _writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(20)

    server = await asyncio.start_server(silent, "127.0.0.1", 0)
    report = await load.run(Plan(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", warmup=0, timeout=0.1))
    server.close()
    assert "TimeoutError" in report.errors[0]


# --- figures -------------------------------------------------------------------------------------------------


def test_percentiles_are_values_that_were_seen() -> None:
    assert load.percentiles([]) == {}
    assert load.percentiles([int(n * 1e6) for n in range(1, 101)]) == {"p50": 50, "p95": 95, "p99": 99, "max": 100}
    assert load.percentiles([7_000_000]) == {"p50": 7, "p95": 7, "p99": 7, "max": 7}


def test_a_delay_is_from_engine_to_client() -> None:
    transcript = Transcript(Ask("a", 2))
    transcript.feed("0:100:a 1:", at=150)
    transcript.feed("200 ", at=275)
    assert transcript.delays_ns == [50, 75]
    assert transcript.errors == []


BURN = "import time\nwhile time.process_time() < 0.3: pass\n"


def test_processes_that_have_ended_are_paid_by_their_parent() -> None:
    parent = f"import subprocess, sys\nsubprocess.run([sys.executable, '-c', {BURN!r}])\nprint('done', flush=True)\ninput()"
    with subprocess.Popen([sys.executable, "-c", parent], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        tree = system.Tree(process.pid)
        assert process.stdout is not None
        process.stdout.readline()
        assert 0.25 < sum(tree.cpu().values()) < 5
        assert 1 < sum(tree.rss().values()) < 200
        tree.stop()


def test_a_system_that_has_ended_has_no_processes() -> None:
    with subprocess.Popen([sys.executable, "-c", "pass"]) as process:
        tree = system.Tree(process.pid)
        process.wait()
        tree.stop()
    assert tree.processes() == []


def test_a_load_is_measured_from_outside() -> None:
    scenario = next(each for each in scenarios.SCENARIOS if each.name == "json").quick()
    with system.straight() as engine:
        (run,) = scenarios.runs(scenario.plan, engine)
        assert engine.tree is not None
        assert run.report.errors == []
        assert run.cpu is not None
        assert run.cpu.keys() == {"engine"}
        assert 0 < run.cpu["engine"] < 60
        left = engine.tree.processes()
    assert not [process for process in left if process.is_running()]


def test_what_is_added_is_told_from_the_engines_own() -> None:
    straight = Figure("low", "straight", "first_token_p50", "ms")
    ours, tail = Figure("low", "capibara", "first_token_p50", "ms"), Figure("low", "capibara", "first_token_p99", "ms")
    added = scenarios.compare({straight: 1.0, ours: 4.0, tail: 9.0, Figure("paced", "capibara", "first_token_p50", "ms"): 5.0})
    assert added == {ours._replace(metric="added_first_token_p50"): 3.0, tail._replace(metric="added_first_token_p99"): 8.0}


def test_a_bar_is_held_against_the_median() -> None:
    cpu, rss = Figure("paced", "capibara", "cpu_per_token", "us"), Figure("rss", "capibara", "rss_serving", "MB")
    rate = Figure("json", "capibara", "requests_per_second", "1/s")
    verdicts = list(bench.bars({cpu: [10.0, 59.0, 900.0], rate: [501.0], rss: [170.0, 181.0, 190.0]}))
    assert [("met" in verdict, "missed" in verdict) for verdict in verdicts] == [(True, False), (True, False), (False, True)]


def test_every_bar_is_a_figure_that_is_measured() -> None:
    report = load.Report(1, 0, 1, 1.0, {"p50": 1, "p99": 1}, {"p50": 1, "p95": 1}, {"p50": 1})
    run = Run(report, {"edge": 1.0}, {"edge": 1.0})
    values = {
        Figure(each.name, name, metric, unit): value
        for each in scenarios.SCENARIOS
        for name in ("straight", "capibara")
        for metric, unit, value in each.figures(run)
    }
    values |= {Figure("long", "capibara", metric, unit): value for metric, unit, value in courses.grown([run, run])}
    # The memory of an idle stream: held by `test_every_course_goes_its_way`.
    measured = (values | scenarios.compare(values)).keys() | {Figure("idle", "capibara", "rss_per_stream", "kB")}
    assert scenarios.BARS.keys() <= measured


def test_figures_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "figures.csv"
    figure = Figure("paced", "capibara", "cpu_per_token", "us")
    bench.record({figure: [3.0, 1.0, 2.0]}, 7.4, path)
    bench.record({figure: [4.0]}, 0, path)
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["median"], row["min"], row["max"], row["rounds"]) for row in rows] == [("2", "1", "3", "3"), ("4", "4", "4", "1")]
    assert [row["busy_percent"] for row in rows] == ["7", "0"]
    assert all(row["commit"] and row["python"] and row["cpu"] and row["aiohttp"] for row in rows)


# --- courses -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("most", [1, 7, 24, 25, 26, 99, 400, 1000, 5000])
def test_the_highest_number_is_found_to_a_tenth(most: int) -> None:
    asked: list[int] = []

    def holds(number: int) -> bool:
        asked.append(number)
        return number <= most

    found = courses.highest(holds, 25, 1000)
    assert min(most, 1000) * 0.9 - 1 <= found <= most
    assert len(asked) <= 12
    assert max(asked) <= 1000


def test_nothing_holds() -> None:
    assert courses.highest(lambda _: False, 25, 1000) == 0


def test_who_is_late_does_not_keep_up() -> None:
    most = courses.Most("most", "")
    fine = load.Report(1, 0, 128, 2.6, {}, {"p95": 3.0}, {})
    assert most.is_kept_up(fine, spread_ms=210)
    for change in ({"seconds": 3.6}, {"failed": 1}, {"token_delay_ms": {"p95": 60.0}}):
        assert not most.is_kept_up(replace(fine, **change), spread_ms=210)


def test_growth_is_from_the_first_parts_to_the_last() -> None:
    def part(cpu: float, rss: float) -> Run:
        return Run(load.Report(4, 0, 1000, 1.0, {}, {}, {}), {"edge": cpu}, {"edge": rss})

    grown = {metric: value for metric, _, value in courses.grown([part(0.1, 50), part(0.5, 51), part(0.11, 58)])}
    assert grown["cpu_growth"] == pytest.approx(10)
    assert grown["rss_growth"] == 8
    assert grown["tokens"] == 3000


async def test_parts_of_a_load_are_reported_one_by_one(engine: str) -> None:
    held: list[int] = []
    plan = Plan(engine, clients=2, tokens=5, parts=3, warm_tokens=2)
    reports = [report async for report in load.parts(plan, lambda: held.append(1))]
    assert [(report.requests, report.tokens, report.errors) for report in reports] == [(2, 10, [])] * 3
    assert len(held) == 3
    assert (await get(engine, "/counts"))["tokens"] == 2 * 2 + 3 * 10


async def test_the_page_gets_paragraphs_of_as_many_tokens_as_it_asks_in_words(engine: str) -> None:
    async with AsyncOpenAI(base_url=f"{engine}/v1", api_key="none") as client:
        question = Ask("page", 130, paragraphs=True).question
        answer = await client.chat.completions.create(model="mock", messages=[{"role": "user", "content": question}])
        stream = await client.chat.completions.create(model="mock", messages=[{"role": "user", "content": question}], stream=True)
        text = "".join([choice.delta.content or "" async for chunk in stream for choice in chunk.choices])
    assert len((answer.choices[0].message.content or "").split()) == 130
    assert [len(paragraph.split()) for paragraph in text.split("\n\n")] == [60, 60, 10]


def small() -> list[scenarios.Measurable]:
    """Every course in a size that takes about a second."""
    idle = courses.Idle("idle", "", replace(courses._IDLE, clients=5, gap_ms=600, spread_ms=20))
    most = courses.Most("most", "", replace(courses._PACED, tokens=3), start=2, cap=2, delay_ms=10_000, slack_ms=20_000)
    growth = courses.Growth("growth", "", streams=((1, 1), (2, 1)), lengths=((10, 1), (20, 1)), tokens=4)
    resume = courses.Resume("resume", "", readers=5, tokens=5, gap_ms=200)
    return [idle, most, growth, resume, courses.Long("long", "", replace(courses._LONG, tokens=50, parts=2))]


COURSE_FIGURES = {
    "idle": {"rss_per_stream"},
    "most": {"streams"},
    "growth": {"cpu_per_token@streams=2", "steepest@streams", "cpu_per_token@tokens=20", "steepest@tokens"},
    "resume": {"served_p50", "served_max", "cpu_per_reader"},
    "long": {"cpu_per_token", "cpu_growth", "rss_growth", "tokens"},
}


@pytest.mark.long
def test_every_course_goes_its_way() -> None:
    with system.straight() as engine, system.capibara(engine.url, system.TOGETHER) as ours:
        assert ours.tree is not None
        assert ours.tree.rss().keys() == {"together", "broker", "launcher"}
        for course in small():
            measured = course.measure(ours, engine, "")
            assert measured.errors == []
            assert {metric for metric, _, _ in measured.values} >= COURSE_FIGURES[course.name]


async def test_a_reader_that_comes_back_to_nothing_is_noticed() -> None:
    """A system that loses what was said while its readers were away."""

    async def forget(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n")
        if head.startswith(b"POST"):
            lines = [b'data: {"id":"chatcmpl-T",' + says(token(0, "storm-0"))[1:], b"id: 7", says_line(token(1, "storm-0"))]
            writer.write(b"\n\n".join(lines[:1]) + b"\n\n" + b"\n".join(lines[1:]) + b"\n\n")
            await asyncio.sleep(20)
        assert b"Last-Event-ID: 7\r\n" in head
        assert head.startswith(b"GET /v1/chat/completions/T/events?")
        writer.write(says_line(token(3, "storm-0"), "stop") + b"\n\ndata: " + usage(4) + b"\n\ndata: [DONE]\n\n")
        writer.close()

    server = await asyncio.start_server(forget, "127.0.0.1", 0)
    url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    report = await storm.run(storm.Plan(url, clients=1, tokens=4, gap_ms=1, spread_ms=0, away_ms=1), say=False)
    server.close()
    assert report.failed == 1
    assert any("where 2 was due" in error for error in report.errors), report.errors


def says_line(text: str, reason: str | None = None) -> bytes:
    return b"data: " + says(text, reason)


def test_words_behind_the_last_id_are_not_had_yet() -> None:
    told = load.Told(Transcript(Ask("storm-0", 3)), 0)
    reader = storm.Reader(told)
    reader.streamed(
        b"id: 5\n" + says_line(token(0, "storm-0")) + b"\n\n" + says_line(token(1, "storm-0")) + b"\n\nid: 6\nevent: message\ndata: {"
    )
    assert (reader.last, reader.had, told.transcript.count) == (b"5", 1, 2)
    reader.return_()
    reader.streamed(says_line(token(1, "storm-0")) + b"\n\nid: 6\n" + says_line(token(2, "storm-0")) + b"\n\n")
    assert (reader.last, told.transcript.errors) == (b"6", [])
    assert reader.served is not None


# --- floor, peers, pictures, command line --------------------------------------------------------------------


@pytest.mark.long
def test_each_hop_has_a_floor() -> None:
    with system.straight() as engine:
        measured = floor.Floor("floor", "", tokens=200).measure(engine, engine, "")
    values = {metric: value for metric, _, value in measured.values}
    for how in (floor.ALONE, floor.TOGETHER):
        assert values[f"sum/{how}"] == pytest.approx(sum(values[f"sum_{part}/{how}"] for part in ("workers", "broker", "edge")))
        assert all(values[f"{hop}/{how}"] > 0 for hop in ("read", "parse", "broker", "deliver"))


async def test_the_smallest_system_answers_right_and_stores_what_makes_it_durable(
    engine: str, broker: EmbeddedBroker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    fleet = tmp_path / "fleet.toml"
    fleet.write_text(f'[[experts]]\nname = "mock"\nurls = ["{engine}/v1"]\n')
    settings = settings_for(broker, fleet)
    await wiring.apply_streams(settings)
    for name, value in broker.environment().items():
        monkeypatch.setenv(name, value)
    ready = tmp_path / "ready.json"
    for process in (smallest.workers(broker.url, engine), smallest.edge(broker.url, ready)):
        task = asyncio.create_task(process)
        request.addfinalizer(task.cancel)
    await waited(ready.exists)
    url = orjson.loads(ready.read_bytes())["url"]
    for plan in (Plan(url, 4, 2, TOKENS, 1), Plan(url, 4, 2, 40), Plan(url, 4, 2, TOKENS, stream=False)):
        report = await load.run(plan)
        assert (report.errors, report.requests) == ([], 8)
    turns = 3 * (8 + 4)  # each client warms up once
    async with wiring.connected(settings, "provisioner") as client:
        jetstream = client.jetstream()

        async def kept(stream: str, subject: str) -> int:
            found = (await jetstream.stream_info(stream, subjects_filter=subject)).state.subjects or {}
            return sum(found.values())

        async def over() -> bool:  # a fact of the last turn may still be on its way
            return await kept("CF_WORK_ROUTER", ">") + await kept("CF_WORK_CALL", ">") == 0 and await kept("CF_LOG", ">") == 4 * turns

        await waited(over)
        assert await kept("CF_LOG", "cf.log.*.asked.>") == 2 * turns
        assert [await kept("CF_LOG", f"cf.log.*.{fact}") for fact in ("router", "caller")] == [turns, turns]
        assert await kept("CF_OUT", "cf.out.*.lease.main") == turns
        assert await kept("CF_OUT", "cf.out.*.data.main") >= 2 * turns


def test_each_process_pays_for_its_hops() -> None:
    hops = {
        f"{hop}/{how}": 1.0 for hop in ("read", "parse", "publish", "ack", "broker", "deliver", "write") for how in ("alone", "together")
    }
    sums = {metric: value for metric, _, value in floor.summed(hops) if metric.startswith("sum") and metric.endswith("alone")}
    assert sums == {"sum_workers/alone": 4, "sum_broker/alone": 1, "sum_edge/alone": 2, "sum/alone": 7}


def test_how_near_we_are_is_told_when_both_are_known() -> None:
    ours, least = Figure("paced", "capibara", "cpu_per_token/edge", "us"), Figure("floor", "floor", "sum_edge/alone", "us")
    assert floor.nearness({ours: 80.0}) == {}
    assert floor.nearness({ours: 80.0, least: 20.0}) == {Figure("floor", "capibara", "times_floor/edge", "ratio"): 4.0}


def test_a_peer_that_cannot_be_installed_is_skipped(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CAPIBARA_BENCH_CACHE", str(tmp_path))
    file = tmp_path / "no-such-package-1"
    file.write_text("where its folder should be")
    nobody = peers.Peer("nobody", "no-such-package==1", "nobody", lambda *_: [], "/", {})
    console = Console(record=True, width=200)
    run = bench.Bench(bench.arguments(["paced", "--peers"]), console)
    run._peers = [nobody]
    with ExitStack() as stack, system.straight() as engine:
        assert list(run._peer(stack, nobody, engine)) == []
    assert "no-such-package==1 is skipped: " in console.export_text()
    assert run._peers == []


def test_peers_are_pinned_and_outside_the_tree() -> None:
    for peer in peers.PEERS:
        assert "==" in peer.requirement
        assert not peer.folder.is_relative_to(system.ROOT)


def test_pictures_are_drawn_of_what_there_is(tmp_path: Path) -> None:
    comparison, growth = tmp_path / "a.svg", tmp_path / "b.svg"
    paced = {Figure("paced", name, "cpu_per_token", "us"): [1.0, 2.0, 4.0] for name in ("straight", "capibara", "litellm")}
    assert pictures.draw({Figure("paced", "capibara", "cpu_per_token", "us"): [1.0]}, comparison, growth) == []
    assert pictures.draw(paced, comparison, growth) == [comparison]
    text = comparison.read_text()
    assert "litellm" in text
    assert "straight" not in text
    grows = {
        Figure("growth", "capibara", f"cpu_per_token@{axis}={size}", "us"): [5.0] for axis in ("streams", "tokens") for size in (1, 10)
    }
    assert pictures.draw(grows, comparison, growth) == [growth]
    drawn = growth.read_bytes()
    pictures.draw(grows, comparison, growth)
    assert growth.read_bytes() == drawn


def test_what_is_to_be_measured_is_said_by_name() -> None:
    usual = bench.arguments([])
    assert (usual.scenario, usual.systems) == ([], [])
    assert bench.arguments(["floor", "--scenario", "paced,low"]).scenario == ["low", "paced", "floor"]
    assert bench.arguments(["--scenario", "all"]).scenario == [each.name for each in bench.EVERY]
    assert bench.arguments(["--systems", "all"]).systems == ["straight", *system.OURS, "smallest"]
    for wrong in (["--scenario", "nothing"], ["--systems", "nobody"], ["--rounds", "0"]):
        with pytest.raises(SystemExit):
            bench.arguments(wrong)


async def test_search_and_ingestion_are_measured_in_small() -> None:
    found = await knowledge.measure(knowledge.Job("random", 30, rounds=1, asked=2, taken=5))
    parts = {f"search_cpu/{part}@passages=30" for part in ("embed", "nearest", "matching", "graph", "fetch", "rank")}
    assert (
        parts | {"search_wall_p50@passages=30", "search_one_core_p50@passages=30", "search_cpu_p95@passages=30", "rss@passages=30"}
        <= found.keys()
    )
    ingested = {name for name, _, words in (metric.partition("@words=") for metric in found) if words.isdigit()}
    assert {"ingest_wall", *(f"ingest_cpu/{part}" for part in ("parse", "chunk", "embed", "passages", "graph", "documents"))} <= ingested
    assert all(len(values) == 1 and values[0] >= 0 for _, values in found.values())


def test_the_library_is_made_up_the_same_everywhere() -> None:
    library = list(knowledge.texts(23))
    assert library == list(knowledge.texts(23))
    assert sum(len(text.pieces) for text in library) == 23
    assert {text.language for text in library} == {"en", "es"}
    assert len(set(knowledge.questions(20, 23, 1))) > 15


def test_real_texts_are_taken_in_once_each(tmp_path: Path) -> None:
    file = tmp_path / "texts.jsonl"
    file.write_bytes(b"\n".join(orjson.dumps({"id": str(n), "text": f"text {n}", "title": f"title {n}"}) for n in range(13)))
    given = knowledge.shelf(str(file))
    library = [*given.some(7, "a"), *given.some(5, "b")]
    assert [len(text.pieces) for text in library] == [5, 2, 5]
    assert len({piece for text in library for piece in text.pieces}) == 12
    assert all(text.title.startswith("title ") for text in library)
    with pytest.raises(ValueError, match="1 are left where 2"):
        given.some(2, "c")


def test_one_core_is_all_that_is_used_and_only_meanwhile() -> None:
    allowed, go = os.sched_getaffinity(0), threading.Event()
    worker = threading.Thread(target=go.wait, daemon=True)
    worker.start()
    with knowledge.one_core():
        mine, its = os.sched_getaffinity(0), os.sched_getaffinity(worker.native_id or 0)
    after = os.sched_getaffinity(worker.native_id or 0)
    go.set()
    worker.join()
    assert mine == its
    assert len(mine) == 1
    assert os.sched_getaffinity(0) == after == allowed


def test_bars_of_search_and_ingestion_are_judged() -> None:
    series = {
        Figure("knowledge", "e5", "search_one_core_p50@passages=6000", "ms"): [61.0],
        Figure("knowledge", "e5", "search_one_core_p50@passages=1000", "ms"): [99.0],
        Figure("knowledge", "minilm", "ingest_wall@words=90", "passages/s"): [41.0],
    }
    assert [line.split(":")[0] for line in knowledge.bars(series)] == ["missed", "met"]
    options = knowledge.arguments(["--passages", "10,20", "--embedder", "random"])
    assert [(job.passages, job.taken) for job in knowledge.jobs(options)] == [(10, 50), (20, 0)]
    for wrong in (["--embedder", "nobody"], ["--passages", "0"]):
        with pytest.raises(SystemExit):
            knowledge.arguments(wrong)


@pytest.mark.long
@pytest.mark.browser
def test_the_page_is_measured_in_halves() -> None:
    if not (shutil.which("chromium") or shutil.which("google-chrome")):
        pytest.skip("no chromium: apt-get update && apt-get install -y chromium")
    with system.straight() as engine, system.capibara(engine.url) as ours:
        measured = PageCost("page", "", tokens=100, gap_ms=1).measure(ours, engine, "")
    assert measured.errors == []
    assert {metric for metric, _, _ in measured.values} >= {"page_growth/paragraphs", "main_thread/one_paragraph_second_half"}
