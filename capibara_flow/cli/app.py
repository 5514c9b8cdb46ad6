"""The commands: they read arguments and call what does the work. Those of one noun stand together: see the modules that are added below.

What a command needs is imported inside it: ``--help`` is to be quick.
"""

# ruff: noqa: PLC0415  see above

import os
import signal
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from capibara_flow import __version__
from capibara_flow.cli import documents, inspecting, operating
from capibara_flow.cli.options import Group, State
from capibara_flow.cli.state import DEFAULT_STATE, adopt, running

LEVELS = ("debug", "info", "warning", "error")

app = typer.Typer(
    cls=Group,
    help="Capibara Flow: one door in front of many open-weight models.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


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
            help="One or more of router, caller, retriever, ingester, undertaker, accountant, host (launches experts), or all; "
            "and edge beside them.",
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


# Behind our own, as help lists them.
for each in (inspecting, documents, operating):
    app.add_typer(each.commands)
