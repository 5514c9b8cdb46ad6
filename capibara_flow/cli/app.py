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

    from capibara_flow.settings import SettingsError

    if isinstance(error, CapibaraError | SettingsError):
        return str(error)
    if isinstance(error, ConnectionError):
        return f"no connection ({error}): is it running? `capibara doctor` tells"
    if isinstance(error, BrokerError):
        return f"the broker refused ({error or type(error).__name__}): are the passwords right? `capibara doctor` tells"
    return None


def _reached(role: str) -> "Settings":
    """The settings, once a broker answers where they say and lets *role* in: a client that never gives up would wait for ever."""
    from capibara_flow import settings
    from capibara_flow.cli.doctor import broker, refused

    found = broker(loaded := settings.load())
    if found.verdict != "ok":
        raise CannotStart(f"no broker: {found.detail}: {found.remedy}")
    if why := refused(loaded, role):
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
app.add_typer(engine_app, name="engine")
app.add_typer(streams_app, name="streams")
app.add_typer(fleet_app, name="fleet")
app.add_typer(dead_app, name="dead")
app.add_typer(eval_app, name="eval")

TurnId = Annotated[str, typer.Argument(metavar="TURN", help="A turn's id, as `capibara dead list` or the stream of its answer tells it.")]
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

    become(Wish(host, port, tuple(engine or ()), fleet, model, local_model, state, ready_file, log_level))


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
    names: Annotated[list[str], typer.Argument(metavar="NAME...", help="router, caller, undertaker, host (launches experts), or all.")],
    state: State = DEFAULT_STATE,
) -> None:
    """Run workers in this process."""
    from topics.flow import NAMES

    if names != ["all"] and (unknown := [name for name in names if name not in NAMES]):
        raise typer.BadParameter(f"no worker {', '.join(map(repr, unknown))}: one or more of {', '.join(NAMES)}, or all")
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
