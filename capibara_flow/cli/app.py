"""The commands: they read arguments, call what does the work, and turn expected errors into one clear line.

What a command needs is imported inside it: ``--help`` is to be quick.
"""

# ruff: noqa: PLC0415  see above

import json
import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from typer.core import TyperGroup

from capibara_flow import __version__
from capibara_flow.cli.state import DEFAULT_STATE, adopt, running
from capibara_flow.errors import CannotStart, CapibaraError

if TYPE_CHECKING:
    from capibara_flow.settings import Settings

LEVELS = ("debug", "info", "warning", "error")


def expected(error: Exception) -> str | None:
    """What to tell of an error that needs no traceback, or ``None`` for a bug."""
    from nats.errors import Error as BrokerError

    from capibara_flow.client import RAGError
    from capibara_flow.settings import SettingsError

    if isinstance(error, CapibaraError | SettingsError | RAGError):
        return str(error)
    if isinstance(error, ConnectionError):
        return f"no connection ({error}): is it running? `capibara doctor` tells"
    if isinstance(error, BrokerError):
        return f"the broker refused ({error or type(error).__name__}): are the passwords right? `capibara doctor` tells"
    return None


def _reached(role: str, *, quick: bool = False) -> "Settings":
    """The settings, once a broker answers where they say and lets *role* in: a client that never gives up would wait for ever.

    Who must be *quick* finds out himself whether he is let in.
    """
    from capibara_flow import settings
    from capibara_flow.cli.doctor import broker, refused

    found = broker(loaded := settings.load())
    if found.verdict != "ok":
        raise CannotStart(f"no broker: {found.detail}: {found.remedy}")
    if why := "" if quick else refused(loaded, role):
        raise CannotStart(f"{why}: check CAPIBARA_NATS__PASSWORDS__{role.upper()}")
    return loaded


class Group(TyperGroup):
    """Commands whose expected errors end with a line on standard error and exit code 1."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command."""
        try:
            return super().invoke(ctx)
        except Exception as error:
            message = expected(error)
            if message is None:
                raise
            Console(stderr=True).print(f"[red]error:[/] {escape(message)}", highlight=False, soft_wrap=True)
            raise typer.Exit(1) from error


app = typer.Typer(
    cls=Group,
    help="Capibara Flow: one door in front of many open-weight models.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
engine_app = typer.Typer(help="Engines that come with Capibara.", no_args_is_help=True)
streams_app = typer.Typer(help="The streams on the broker.", no_args_is_help=True)
fleet_app = typer.Typer(help="The experts: whether their engines answer, and how those do who use them.", no_args_is_help=True)
dead_app = typer.Typer(
    help="Dead letters: what a stage gave up, kept for a day so that it can be looked at and asked again.", no_args_is_help=True
)
eval_app = typer.Typer(help="Measure how good decisions are, on questions that somebody labelled.", no_args_is_help=True)
capsule_app = typer.Typer(
    help="Capsules: a turn as one readable file, and that file played again through the workers of today, without any engine.",
    no_args_is_help=True,
)
app.add_typer(engine_app, name="engine")
app.add_typer(streams_app, name="streams")
app.add_typer(fleet_app, name="fleet")
app.add_typer(dead_app, name="dead")
app.add_typer(eval_app, name="eval")
rag_app = typer.Typer(help="The documents that answers are grounded in.", no_args_is_help=True)
app.add_typer(rag_app, name="rag")
app.add_typer(capsule_app, name="capsule")

TurnId = Annotated[str, typer.Argument(metavar="TURN", help="A turn's id, as `capibara turns` or the stream of its answer tells it.")]
Collection = Annotated[str, typer.Option(help="Which part of your documents.")]
Url = Annotated[str, typer.Option(help="Where the edge answers.", envvar="CAPIBARA_URL")]
ApiKey = Annotated[str | None, typer.Option(help="An API key.", envvar="CAPIBARA_KEY")]
AsJson = Annotated[bool, typer.Option("--json", help="For programs.")]
State = Annotated[Path, typer.Option(help="The state folder of `capibara up`.", envvar="CAPIBARA_STATE")]


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"capibara {__version__}")
        raise typer.Exit


@app.callback()
def _root(version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Tell the version.")] = False) -> None:
    pass


@app.command()
def up(  # noqa: PLR0917  typer passes options by name
    engine: Annotated[
        list[str] | None, typer.Option(metavar="URL", help="Base address of an OpenAI-compatible server; may be repeated.")
    ] = None,
    fleet: Annotated[
        Path | None, typer.Option(metavar="FILE", help="A fleet file (TOML); CAPIBARA_FLEET__FILE when no engine is named either.")
    ] = None,
    model: Annotated[Path | None, typer.Option(metavar="GGUF", help="Serve these weights here.")] = None,
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port of the page and the API; 0 finds a free one.")] = 5001,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    local_model: Annotated[bool, typer.Option("--local-model/--no-local-model", help="Serve the small model that comes along.")] = True,
    state: State = DEFAULT_STATE,
    ready_file: Annotated[Path | None, typer.Option(metavar="FILE", help="Written (JSON: url, pids, models) when all is ready.")] = None,
    log_level: Annotated[str, typer.Option(help=f"One of {', '.join(LEVELS)}.")] = "info",
    together: Annotated[
        bool,
        typer.Option("--together/--no-together", help="Workers and edge in one process: less memory, but they end and come back together."),
    ] = False,
) -> None:
    """Start everything on this machine: broker, workers, edge, and a small local model unless you bring an engine.

    Ctrl-C stops all of it in order. Logs are in the state folder.
    """
    if fleet and (engine or model):
        raise typer.BadParameter("a fleet lists its engines itself: give either --fleet, or --engine and --model")
    if log_level not in LEVELS:
        raise typer.BadParameter(f"--log-level is one of {', '.join(LEVELS)}")
    for url in engine or ():
        if not url.startswith(("http://", "https://")):
            raise typer.BadParameter(f"--engine {url}: not an http:// or https:// address, such as http://127.0.0.1:8080/v1")
        if "@" in url.split("/")[2]:
            raise typer.BadParameter("--engine with a user or password in it: list the engine in a --fleet file, with its api_key")
    if not (engine or model or fleet) and (usual := os.environ.get("CAPIBARA_FLEET__FILE")):
        fleet = Path(usual)
    from capibara_flow.cli.up import Wish, become

    become(Wish(host, port, tuple(engine or ()), fleet, model, local_model, state, ready_file, log_level, together))


@app.command()
def chat(
    message: Annotated[str | None, typer.Argument(help="One question; without it you can talk (or it is read from a pipe).")] = None,
    url: Annotated[str, typer.Option(help="Where the edge answers.", envvar="CAPIBARA_URL")] = "http://127.0.0.1:5001",
    model: Annotated[str | None, typer.Option(help="Who is to answer; the router decides when it is left out.")] = None,
    key: Annotated[str | None, typer.Option(help="An API key.", envvar="CAPIBARA_KEY")] = None,
) -> None:
    """Talk to the models, or ask one question: `capibara chat "Why is the sky blue?"`."""
    from capibara_flow.cli.chat import Conversation

    conversation = Conversation(url, model, key)
    try:
        if message is None and sys.stdin.isatty():
            return conversation.talk()
        question = message if message is not None else sys.stdin.read().strip()
        if not question:
            raise typer.BadParameter("nothing was asked")
        conversation.ask(question)
    except KeyboardInterrupt:
        raise typer.Exit(130) from None
    except BrokenPipeError:
        # What is left in the buffer has nowhere to go, and Python would complain about that at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(128 + signal.SIGPIPE) from None


@app.command()
def doctor(state: State = DEFAULT_STATE) -> None:
    """Look at what is here and say what is missing; exit code 1 if anything fails."""
    from capibara_flow.cli.doctor import examine

    if adopt(state) and (facts := running(state)):
        host, _, port = facts["url"].removeprefix("http://").rpartition(":")
        os.environ.update({"CAPIBARA_EDGE__HOST": host.strip("[]"), "CAPIBARA_EDGE__PORT": port})
    findings = examine()
    table = Table("check", "", "found", "what to do", box=None, pad_edge=False)
    colours = {"ok": "green", "warn": "yellow", "fail": "red"}
    for each in findings:
        table.add_row(each.name, f"[{colours[each.verdict]}]{each.verdict}[/]", escape(each.detail), escape(each.remedy))
    Console().print(table)
    if any(each.verdict == "fail" for each in findings):
        raise typer.Exit(1)


@app.command()
def edge(state: State = DEFAULT_STATE) -> None:
    """Run the door: the page and the HTTP API."""
    adopt(state)
    from capibara_flow import settings, wiring

    wiring.run_edge(settings.load())


@app.command()
def worker(
    names: Annotated[
        list[str],
        typer.Argument(
            metavar="NAME...",
            help="One or more of router, caller, retriever, ingester, undertaker, host (launches experts), or all; and edge beside them.",
        ),
    ],
    state: State = DEFAULT_STATE,
) -> None:
    """Run workers in this process."""
    from topics.flow import NAMES

    if unknown := [name for name in names if name not in {*NAMES, "all", "edge"}]:
        raise typer.BadParameter(f"no worker {', '.join(map(repr, unknown))}: one or more of {', '.join(NAMES)}, or all; and edge")
    adopt(state)
    os.execv(sys.executable, [sys.executable, "-m", "workers", *names])  # noqa: S606  no shell is wanted


@engine_app.command()
def scripted(
    file: Annotated[Path, typer.Argument(exists=True, dir_okay=False, help="What it answers.")],
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 finds a free one.")] = 9100,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
) -> None:
    """Run an engine that answers from a script: for demonstrations and tests, it says so in its model's name."""
    from capibara_flow.engines import scripted as engine

    engine.run(file, host, port)


@eval_app.command("routing")
def eval_routing(
    data: Annotated[
        Path, typer.Option(metavar="FILE", exists=True, dir_okay=False, help='JSON lines: {"text", "route"}, and "lang", "complexity".')
    ],
    routes: Annotated[
        Path | None, typer.Option(metavar="FILE", exists=True, dir_okay=False, help="A routes file (TOML); the seven that come along.")
    ] = None,
    embedder: Annotated[
        str | None, typer.Option(help="universal, e5, minilm, or sentence-transformers:NAME; what CAPIBARA_ROUTER__EMBEDDER says.")
    ] = None,
) -> None:
    """Route labelled questions and print figures as JSON: accuracy, calibration, complexity, latency, and baselines beside them."""
    from capibara_flow import settings
    from capibara_flow.cli import evaluate

    figures = evaluate.routing(data, routes, embedder or settings.load().router.embedder)
    typer.echo(json.dumps(figures, ensure_ascii=False, indent=1))


@eval_app.command("retrieval")
def eval_retrieval(  # noqa: PLR0917  typer passes options by name
    corpus: Annotated[
        Path, typer.Option(metavar="FILE", exists=True, dir_okay=False, help='JSON lines (or .gz): {"id", "text"}, and "title".')
    ],
    queries: Annotated[
        Path, typer.Option(metavar="FILE", exists=True, dir_okay=False, help='{"question", "gold": id or ids}, or "gold_titles".')
    ],
    collection: Annotated[str, typer.Option(help="Keep what is made of the corpus under this name, for the next time.")] = "",
    embedder: Annotated[
        str | None, typer.Option(help="universal, e5, minilm, or sentence-transformers:NAME; what CAPIBARA_KNOWLEDGE__EMBEDDER says.")
    ] = None,
    ablation: Annotated[bool, typer.Option("--ablation", help="Also by meaning alone, by words alone, both, and with the graph.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """Search for what answers labelled questions: recall, nDCG with intervals, and latency.

    Vectors of passages are kept in the user's cache folder.

    Example: `capibara eval retrieval --corpus passages.jsonl --queries questions.jsonl --ablation`.
    """
    from capibara_flow import settings
    from capibara_flow.cli import evaluate_retrieval as evaluation

    name = embedder or settings.load().knowledge.embedder
    report = evaluation.evaluate(corpus, queries, name, collection=collection, ablation=ablation)
    if as_json:
        return typer.echo(json.dumps(report, ensure_ascii=False, indent=1))
    Console(width=None if sys.stdout.isatty() else 140).print(evaluation.table(report))
    latency = report["latency_ms"]
    return typer.echo(f"{report['passages']} passages, {report['embedder']}; a search: {latency['p50']} ms (p95 {latency['p95']} ms)")


@streams_app.command("apply")
def streams_apply(state: State = DEFAULT_STATE) -> None:
    """Declare the streams and consumers on the broker; existing ones are updated."""
    adopt(state)
    settings = _reached("provisioner")
    import asyncio

    from capibara_flow import wiring

    for line in asyncio.run(wiring.apply_streams(settings)):
        typer.echo(line)


@streams_app.command("show")
def streams_show(state: State = DEFAULT_STATE) -> None:
    """Show the streams, how full they are, and who reads them."""
    adopt(state)
    settings = _reached("observer")
    import asyncio

    from capibara_flow import wiring

    rows = asyncio.run(wiring.show_streams(settings))
    table = Table("stream", "subjects", "messages", "bytes", "age (s)", "consumers: waiting, in work, free pulls", box=None, pad_edge=False)
    for row in rows:
        readers = "\n".join(f"{each['name']}: {each['pending']}, {each['ack_pending']}, {each['waiting']}" for each in row["consumers"])
        cells = (row["name"], "\n".join(row["subjects"]), str(row["messages"]), str(row["bytes"]), str(row["age"]), readers)
        table.add_row(*map(escape, cells))
    Console().print(table)


@fleet_app.command("check")
def fleet_check(
    file: Annotated[Path | None, typer.Argument(metavar="FILE", help="A fleet file (TOML); that of the settings, or of `up`.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
    state: State = DEFAULT_STATE,
) -> None:
    """Read a fleet file and look at every engine in it; exit code 1 if the file is wrong, or an active expert has no engine that answers.

    Examples: `capibara fleet check deploy/fleets/bb.toml`, `capibara fleet check --json`.
    """
    if file is None:
        adopt(state)
    import json

    from capibara_flow.cli import fleet
    from capibara_flow.engines.pinging import unreached

    found = fleet.pinged(fleet.read(fleet.chosen(file)), Console(stderr=True))
    missing = unreached(found)
    if as_json:
        typer.echo(json.dumps({"engines": [fleet.row(each) for each in found], "unreached": missing}, indent=1))
    else:
        Console(width=None if sys.stdout.isatty() else fleet.PIPE_WIDTH).print(fleet.table(found))
    if missing:
        Console(stderr=True).print(f"[red]no engine answers for:[/] {escape(', '.join(missing))}", highlight=False, soft_wrap=True)
        raise typer.Exit(1)


@fleet_app.command("status")
def fleet_status(
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
    state: State = DEFAULT_STATE,
) -> None:
    """Show what the processes that are at work tell of themselves and of the engines that they use.

    Examples: `capibara fleet status`, `capibara fleet status --json`.
    """
    adopt(state)
    settings = _reached("observer")
    import asyncio
    import json

    from capibara_flow.cli import fleet

    told = asyncio.run(fleet.reports(settings))
    if as_json:
        typer.echo(json.dumps(told, indent=1))
    elif told:
        Console(width=None if sys.stdout.isatty() else fleet.PIPE_WIDTH).print(fleet.status(told))
    else:
        typer.echo("nobody reports: is a worker running?")


@app.command("queue")
def queue_(
    expert: Annotated[str | None, typer.Option(metavar="NAME", help="Only this expert's queue.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
    state: State = DEFAULT_STATE,
) -> None:
    """Show who waits for which expert: tenant by tenant, since when, and how long one more question would wait.

    Examples: `capibara queue`, `capibara queue --expert phi4_fast --json`.
    """
    adopt(state)
    settings = _reached("observer")
    import asyncio

    from capibara_flow.cli import queue
    from capibara_flow.cli.dead import PIPE_WIDTH

    found = asyncio.run(queue.queue(settings, expert))
    if as_json:
        typer.echo(json.dumps(queue.rows(found), indent=1))
    elif found:
        Console(width=None if sys.stdout.isatty() else PIPE_WIDTH).print(queue.table(found))
    else:
        typer.echo("nobody waits, and nobody was served in the last minute")


@dead_app.command("list")
def dead_list(
    limit: Annotated[int, typer.Option(min=1, help="At most so many.")] = 20,
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
    state: State = DEFAULT_STATE,
) -> None:
    """List the dead letters, the newest first.

    Examples: `capibara dead list`, `capibara dead list --limit 500 --json`.
    """
    adopt(state)
    settings = _reached("observer")
    import asyncio
    import json

    from capibara_flow.cli import dead

    letters, total = asyncio.run(dead.newest(settings, limit))
    if as_json:
        typer.echo(json.dumps([dead.row(each) for each in letters], indent=1))
    elif letters:
        Console(width=None if sys.stdout.isatty() else dead.PIPE_WIDTH).print(dead.table(letters))
        typer.echo(f"{len(letters)} of {total}: --limit shows more" if total > len(letters) else f"{total} in all")
    else:
        typer.echo("no dead letters")


@dead_app.command("show")
def dead_show(turn: TurnId, state: State = DEFAULT_STATE) -> None:
    """Show the dead letters of a turn: whose it was, why it was given up, and the command that was not done.

    Example: `capibara dead show 01JD3Y4S0QK5M7C2V9N8X1B6TZHRWE4F`.
    """
    adopt(state)
    settings = _reached("observer")
    import asyncio

    from capibara_flow.cli import dead

    typer.echo("\n\n".join(map(dead.page, asyncio.run(dead.of(settings, turn)))))


@dead_app.command("retry")
def dead_retry(
    turn: TurnId,
    stage: Annotated[str | None, typer.Option(help="Only the letter of this stage.")] = None,
    every: Annotated[bool, typer.Option("--all", help="All letters of the turn, each as a turn of its own.")] = False,
    keep: Annotated[bool, typer.Option("--keep", help="Keep the letter although it was asked again.")] = False,
    state: State = DEFAULT_STATE,
) -> None:
    """Ask what a dead letter keeps again, as a new turn of the same tenant with a new deadline.

    The old turn has told its client that it failed; the new one is answered in the background. The letter is removed once it is accepted.

    Examples: `capibara dead retry TURN`, `capibara dead retry TURN --stage caller --keep`.
    """
    here = running(state) if adopt(state) else None
    settings = _reached("provisioner")
    import asyncio

    from capibara_flow.cli import dead

    asked, error = asyncio.run(dead.retry(settings, turn, stage, every=every, keep=keep))
    for each in asked:
        typer.echo(dead.told(each, here["url"] if here else dead.door(settings)))
        if each.kept and not keep:
            typer.echo("  its letter could not be removed: another retry would ask it once more", err=True)
    if error:
        raise error


@app.command()
def turns(  # noqa: PLR0917  typer passes options by name
    tenant: Annotated[str, typer.Option(help="Only those of this tenant.")] = "",
    expert: Annotated[str, typer.Option(help="Only those that this expert answered, or was to.")] = "",
    outcome: Annotated[str, typer.Option(help="Only those that ended so: stop, length, tool_calls, cancelled, failed, running.")] = "",
    since: Annotated[str | None, typer.Option(metavar="AGO", help="No older ones: 90s, 15m, 1h, 2d.")] = None,
    limit: Annotated[int, typer.Option(min=1, help="At most so many.")] = 20,
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
    state: State = DEFAULT_STATE,
) -> None:
    """List the turns that are kept, the newest first.

    Examples: `capibara turns`, `capibara turns --since 1h --outcome failed`, `capibara turns --tenant acme --limit 500 --json`.
    """
    adopt(state)
    settings = _reached("observer")
    import asyncio

    from capibara_flow.cli import turns as kept
    from capibara_flow.edge.turns import Wanted

    found, more = asyncio.run(kept.newest(settings, Wanted(limit, tenant, expert, outcome), since))
    if as_json:
        typer.echo(json.dumps([each.as_json() for each in found], indent=1))
    elif found:
        screen = kept.console()
        screen.print(kept.table(found, screen.width))
        if more:
            typer.echo(f"the newest {len(found)}: --limit shows more")
    else:
        typer.echo(kept.nothing(settings))


@app.command()
def show(
    turn: TurnId,
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
    svg: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the timeline as a picture.")] = None,
    html: Annotated[Path | None, typer.Option(metavar="FILE", help="Write it as a page that needs nothing else.")] = None,
    state: State = DEFAULT_STATE,
) -> None:
    """Show what happened in a turn, and when: its stages with their lengths and decisions, the attempts, the tokens, the answer.

    Examples: `capibara show TURN`, `capibara show TURN --json`, `capibara show TURN --html turn.html`.
    """
    adopt(state)
    settings = _reached("observer")
    import asyncio

    from capibara_flow.cli import turns as kept
    from capibara_flow.domain.timeline import timeline

    [record] = asyncio.run(kept.records(settings, turn))
    told = timeline(record)
    if as_json:
        typer.echo(json.dumps(told.as_json(), indent=1))
    for file in kept.save(told, picture=svg, document=html):
        typer.echo(f"written: {file}", err=as_json)
    if not (as_json or svg or html):
        screen = kept.console()
        screen.print(kept.page(told, screen.width), highlight=False)


@app.command()
def replay(
    turn: TurnId,
    speed: Annotated[str, typer.Option(metavar="TIMES", help="1: with the pauses that there were; 2: twice as fast; max: none.")] = "1",
    text: Annotated[bool, typer.Option("--text", help="Only the words.")] = False,
    state: State = DEFAULT_STATE,
) -> None:
    """Give out what a turn said once more: byte for byte the event stream that its client got, or only the words.

    Examples: `capibara replay TURN`, `capibara replay TURN --speed max > turn.sse`, `capibara replay TURN --text --speed 3`.
    """
    adopt(state)
    settings = _reached("observer")
    import asyncio

    from capibara_flow.cli import turns as kept

    times = kept.speed(speed)
    [record] = asyncio.run(kept.records(settings, turn))
    try:
        asyncio.run(kept.play(record, times=times, text=text))
    except KeyboardInterrupt:
        raise typer.Exit(130) from None
    except BrokenPipeError:
        kept.no_reader()
        raise typer.Exit(128 + signal.SIGPIPE) from None


@app.command()
def diff(
    turn: TurnId,
    other: Annotated[str, typer.Argument(metavar="TURN", help="The turn to compare it with.")],
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
    state: State = DEFAULT_STATE,
) -> None:
    """Tell what two turns differ in, stage by stage: what was asked, decided, planned and called, how it ended, and the words.

    Exit code 0 when no decision (route, plan, sources, expert) differs, 1 when one does, 2 for trouble.

    Examples: `capibara diff TURN TURN`, `capibara diff TURN TURN --json`.
    """
    import asyncio

    from capibara_flow.cli import turns as kept
    from capibara_flow.domain.differences import decisive, differences

    try:
        adopt(state)
        before, after = asyncio.run(kept.records(_reached("observer"), turn, other))
    except CapibaraError as error:
        Console(stderr=True).print(f"[red]error:[/] {escape(str(error))}", highlight=False, soft_wrap=True)
        raise typer.Exit(2) from error
    found = differences(before, after)
    if as_json:
        typer.echo(json.dumps(kept.compared(before, after, found), indent=1))
    else:
        for each in kept.differing(found):
            kept.console().print(each, highlight=False, soft_wrap=True)
        typer.echo("" if found else "no differences", nl=not found)
    if decisive(found):
        raise typer.Exit(1)


@app.command()
def fork(
    turn: TurnId,
    stage: Annotated[str, typer.Option("--from", metavar="STAGE", help="router or caller: it and what follows are done again.")] = "router",
    changes: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Change this; may be repeated. An empty value leaves it to the expert."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
    state: State = DEFAULT_STATE,
) -> None:
    """Ask a turn again from one of its stages on, with something changed: a new turn, linked to the old one.

    Keys: expert (or model), message (or prompt: the last one of the user), system, and all of sampling (temperature, max_tokens...).
    What was decided before that stage stays as it is, byte for byte. The new turn runs in the background until its deadline.

    Examples: `capibara fork TURN --set message="¿Y en Java?"`, `capibara fork TURN --from caller --set expert=phi --set temperature=0`.
    """
    from capibara_flow.cli.light import load_client

    load_client()
    here = running(state) if adopt(state) else None
    settings = _reached("provisioner", quick=True)
    import asyncio

    from capibara_flow.cli import fork as forks
    from capibara_flow.domain.forking import STAGES

    chosen = next((each for each in STAGES if each == stage), None)
    if chosen is None:
        raise typer.BadParameter(f"--from {stage}: a turn can be forked from {' or '.join(STAGES)}")
    made = asyncio.run(forks.fork(settings, turn, chosen, changes or ()))
    base = here["url"] if here else forks.door(settings)
    typer.echo(json.dumps(made.as_json(), ensure_ascii=False) if as_json else forks.told(made, base))


@capsule_app.command("export")
def capsule_export(
    turn: TurnId,
    file: Annotated[Path, typer.Argument(metavar="FILE", dir_okay=False, help="The file to make.")],
    force: Annotated[bool, typer.Option("--force", help="Replace a file that is there.")] = False,
    state: State = DEFAULT_STATE,
) -> None:
    """Write everything that is kept of a turn into one file: messages, decisions, what engines said and when, versions, configuration.

    Keys are left out of fleet, headers and addresses. What people wrote and engines said stays, whatever it looks like: read it before
    you give it away. The file is readable JSON, for your eyes only at first (mode 600).

    Example: `capibara capsule export 01JD3Y4S0QK5M7C2V9N8X1B6TZHRWE4F turn.json`.
    """
    adopt(state)
    settings = _reached("observer")
    from capibara_flow.cli import capsules

    made = capsules.export(settings, turn, file, force=force)
    typer.echo(capsules.summary(made, file))
    for note in made.notes[1:]:
        typer.echo(f"note: {note}", err=True)


@capsule_app.command("run")
def capsule_run(
    file: Annotated[Path, typer.Argument(metavar="FILE", dir_okay=False, help="What `capibara capsule export` made.")],
    fleet: Annotated[Path | None, typer.Option(metavar="FILE", help="Another fleet (TOML) than the one in the capsule.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """Play a capsule through the workers of today and say where a decision, or a byte of the answer, differs now; exit code 1 then.

    Nothing else is needed: it starts a broker of its own in a temporary folder, and engines are answered from the recording.

    Examples: `capibara capsule run turn.json`, `capibara capsule run turn.json --fleet new.toml --json`.
    """
    from capibara_flow.cli import capsules

    console = Console(stderr=True)
    with console.status("playing"):
        done = capsules.run(capsules.opened(file), fleet)
    if as_json:
        typer.echo(json.dumps(done.as_json(), ensure_ascii=False, indent=1))
    else:
        Console(width=None if sys.stdout.isatty() else capsules.PIPE_WIDTH).print(capsules.told(done))
        capsules.notes(done, console)
    if done.differences:
        raise typer.Exit(1)


@app.command()
def rerun(  # noqa: PLR0917  typer passes options by name
    since: Annotated[str, typer.Option(metavar="AGO", help="All turns of this time: 90s, 15m, 1h, 2d.")] = "1h",
    fleet: Annotated[Path | None, typer.Option(metavar="FILE", help="The fleet (TOML) to try; the one that is in use.")] = None,
    only: Annotated[
        str, typer.Option(metavar="STAGES", help="Only these stages, between commas: router, retriever, caller.")
    ] = "router,retriever,caller",
    limit: Annotated[int | None, typer.Option(min=1, help="At most so many turns, the newest.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
    state: State = DEFAULT_STATE,
) -> None:
    """Play recorded turns with another configuration, on a broker of its own, and list the decisions that change; exit code 1 if any does.

    Engines are answered from the recordings: no model is asked. The same configuration gives 100 % the same, and exit code 0. Where nothing
    could be played nothing is proved either: exit code 2.

    Examples: `capibara rerun --since 1h`, `capibara rerun --since 1d --fleet new.toml --only router --json`.
    """
    adopt(state)
    settings = _reached("observer")
    from capibara_flow.cli import rerun as reruns

    done = reruns.rerun(settings, since, Console(stderr=True), fleet_file=fleet, only=reruns.stages(only), limit=limit)
    if as_json:
        typer.echo(json.dumps(done.as_json(), ensure_ascii=False, indent=1))
    else:
        if done.changed:
            Console(width=None if sys.stdout.isatty() else reruns.PIPE_WIDTH).print(reruns.table(done))
        typer.echo(reruns.told(done))
        for note in done.notes:
            typer.echo(f"note: {note}", err=True)
    if done.changed or not done.played:
        raise typer.Exit(1 if done.changed else 2)


@app.command()
def erase(
    turn: TurnId,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    state: State = DEFAULT_STATE,
) -> None:
    """Stop a turn and remove every trace of it: question, answer, log and dead letters. There is no way back.

    Example: `capibara erase 01JD3Y4S0QK5M7C2V9N8X1B6TZHRWE4F --yes`.
    """
    adopt(state)
    settings = _reached("provisioner")
    if not yes and sys.stdin.isatty():
        typer.confirm(f"Remove {turn} for good?", abort=True)
    import asyncio

    from capibara_flow.cli import dead

    gone = asyncio.run(dead.erased(settings, turn))
    typer.echo(f"{turn}: {gone} messages are gone" if gone else f"{turn}: nothing was kept of it")


@app.command()
def ingest(  # noqa: PLR0917  typer passes options by name
    paths: Annotated[list[Path], typer.Argument(metavar="PATH...", help="Files, and folders to be walked.")],
    collection: Collection = "default",
    url: Url = "http://127.0.0.1:5001",
    key: ApiKey = None,
    recursive: Annotated[bool, typer.Option("--recursive/--no-recursive", help="Also what lies deeper in a folder.")] = True,
    include: Annotated[
        list[str] | None, typer.Option(metavar="PATTERN", help="Only files of folders whose names match, such as '*.md'; may be repeated.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Bring documents, so that answers can rest on them; exit code 1 if any was refused.

    Text, Markdown, HTML, PDF and DOCX. Doing it again does nothing twice: what has changed is replaced, and an end in between is no harm.

    Examples: `capibara ingest README.md docs`, `capibara ingest ~/laws --include '*.pdf' --collection laws`.
    """
    from capibara_flow.cli import rag
    from capibara_flow.client import RAGClient

    console = Console(stderr=True)
    with RAGClient(url, key=key) as client:
        summary = rag.ingest(client, rag.find(paths, recursive=recursive, include=include or ()), collection, console)
    rag.report(summary, console)
    typer.echo(rag.as_json(summary.told()) if as_json else rag.in_words(summary))
    if summary.failed:
        raise typer.Exit(1)


@app.command()
def search(  # noqa: PLR0917  typer passes options by name
    query: Annotated[str, typer.Argument(help="What to look for, in any language.")],
    collection: Collection = "default",
    limit: Annotated[int, typer.Option(min=1, max=100, help="At most so many sources.")] = 10,
    url: Url = "http://127.0.0.1:5001",
    key: ApiKey = None,
    as_json: AsJson = False,
) -> None:
    """Show the sources that an answer to this would rest on, the best first.

    Examples: `capibara search "How do I enter a turn's lane?"`, `capibara search plazo --collection laws --limit 3 --json`.
    """
    from capibara_flow.cli import rag
    from capibara_flow.client import RAGClient

    with RAGClient(url, key=key) as client:
        found = client.search_semantic(query, limit, collection=collection)
    typer.echo(rag.as_json([each.model_dump() for each in found]) if as_json else rag.sources_told(found))


@rag_app.command("list")
def rag_list(collection: Collection = "default", url: Url = "http://127.0.0.1:5001", key: ApiKey = None, as_json: AsJson = False) -> None:
    """List the documents of a collection.

    Examples: `capibara rag list`, `capibara rag list --collection laws --json`.
    """
    from capibara_flow.cli import rag
    from capibara_flow.client import RAGClient

    with RAGClient(url, key=key) as client:
        found = client.documents(collection=collection)
    if as_json:
        typer.echo(rag.as_json([each.model_dump() for each in found]))
    elif found:
        Console(width=rag.width(terminal=sys.stdout.isatty())).print(rag.table(found))
        typer.echo(f"{len(found)} in all")
    else:
        typer.echo("no documents: `capibara ingest PATH` brings some")


@rag_app.command("remove")
def rag_remove(
    ids: Annotated[list[str], typer.Argument(metavar="ID...", help="Documents' ids, as `capibara rag list` tells them.")],
    collection: Collection = "default",
    url: Url = "http://127.0.0.1:5001",
    key: ApiKey = None,
) -> None:
    """Remove documents from every store.

    Example: `capibara rag remove 3f2a...`.
    """
    from capibara_flow.cli.dead import readable
    from capibara_flow.client import RAGClient

    with RAGClient(url, key=key) as client:
        for each in ids:
            client.delete(each, collection=collection)
            typer.echo(f"{readable(each)}: removed")


@rag_app.command("check")
def rag_check(
    repair: Annotated[bool, typer.Option("--repair", help="Mend what is found.")] = False,
    as_json: AsJson = False,
    state: State = DEFAULT_STATE,
) -> None:
    """Look whether all stores hold the same documents; exit code 1 if they do not, and nothing was mended.

    Examples: `capibara rag check`, `capibara rag check --repair`.
    """
    import asyncio

    from capibara_flow import settings
    from capibara_flow.cli import rag

    findings = asyncio.run(rag.check(rag.stores(settings.load(), state), repair=repair))
    typer.echo(rag.as_json([rag.finding_row(each) for each in findings]) if as_json else rag.findings_told(findings, repaired=repair))
    if findings and not repair:
        raise typer.Exit(1)


@rag_app.command("reembed")
def rag_reembed(state: State = DEFAULT_STATE) -> None:
    """Make the vectors of all passages anew, after another embedder was chosen (CAPIBARA_KNOWLEDGE__EMBEDDER).

    Example: `CAPIBARA_KNOWLEDGE__EMBEDDER=universal capibara rag reembed`.
    """
    import asyncio

    from capibara_flow import settings
    from capibara_flow.cli import rag

    made = asyncio.run(rag.reembed(rag.stores(settings.load(), state), Console(stderr=True)))
    typer.echo(f"{made} passages embedded again")
