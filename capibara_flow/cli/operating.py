"""Commands for who runs an installation: streams, fleets, queues, engines, and figures of quality."""

# ruff: noqa: PLC0415  what a command needs is imported inside it: ``--help`` is to be quick

import json
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from capibara_flow.cli.options import State, reached
from capibara_flow.cli.state import DEFAULT_STATE, adopt

commands = typer.Typer()
engine_app = typer.Typer(help="Engines that come with Capibara.", no_args_is_help=True)
streams_app = typer.Typer(help="The streams on the broker.", no_args_is_help=True)
fleet_app = typer.Typer(help="The experts: whether their engines answer, and how those do who use them.", no_args_is_help=True)
eval_app = typer.Typer(help="Measure how good decisions are, on questions that somebody labelled.", no_args_is_help=True)
commands.add_typer(engine_app, name="engine")
commands.add_typer(streams_app, name="streams")
commands.add_typer(fleet_app, name="fleet")
commands.add_typer(eval_app, name="eval")


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
        Path, typer.Option(metavar="FILE", exists=True, dir_okay=False, help='{"question", "gold": id or ids (or [])} or "gold_titles".')
    ],
    collection: Annotated[str, typer.Option(help="Keep what is made of the corpus under this name, for the next time.")] = "",
    embedder: Annotated[
        str | None, typer.Option(help="universal, e5, minilm, or sentence-transformers:NAME; what CAPIBARA_KNOWLEDGE__EMBEDDER says.")
    ] = None,
    ablation: Annotated[bool, typer.Option("--ablation", help="Also by meaning alone, by words alone, both, and with the graph.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """Search for what answers labelled questions: recall, nDCG with intervals, and latency.

    Questions that nothing in the corpus answers have "gold": []; it is told how many of them, and wrongly of the others, would be
    left without sources (CAPIBARA_KNOWLEDGE__RELEVANCE). Vectors of passages are kept in the user's cache folder.

    Example: `capibara eval retrieval --corpus passages.jsonl --queries questions.jsonl --ablation`.
    """
    from capibara_flow import settings
    from capibara_flow.cli import evaluate_retrieval as evaluation

    knowledge = settings.load().knowledge
    name, floor = embedder or knowledge.embedder, knowledge.relevance
    report = evaluation.evaluate(corpus, queries, name, collection=collection, ablation=ablation, floor=floor)
    if as_json:
        return typer.echo(json.dumps(report, ensure_ascii=False, indent=1))
    Console(width=None if sys.stdout.isatty() else 140).print(evaluation.table(report))
    latency = report["latency_ms"]
    typer.echo(evaluation.nothing_told(report["nothing_found"]))
    return typer.echo(f"{report['passages']} passages, {report['embedder']}; a search: {latency['p50']} ms (p95 {latency['p95']} ms)")


@streams_app.command("apply")
def streams_apply(state: State = DEFAULT_STATE) -> None:
    """Declare the streams and consumers on the broker; existing ones are updated."""
    adopt(state)
    settings = reached("provisioner")
    import asyncio

    from capibara_flow import wiring

    for line in asyncio.run(wiring.apply_streams(settings)):
        typer.echo(line)


@streams_app.command("show")
def streams_show(state: State = DEFAULT_STATE) -> None:
    """Show the streams, how full they are, and who reads them."""
    adopt(state)
    settings = reached("observer")
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
    settings = reached("observer")
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


@commands.command("usage")
def usage_(
    since: Annotated[str, typer.Option(metavar="WHEN", help="From then on: a day (2026-11-01, UTC), or so long ago (12h, 7d).")] = "7d",
    until: Annotated[str | None, typer.Option(metavar="WHEN", help="Before then; now.")] = None,
    tenant: Annotated[str | None, typer.Option(metavar="NAME", help="Only of this tenant.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
    state: State = DEFAULT_STATE,
) -> None:
    """Show what experts did for tenants, day by day: answers, and the tokens that the clients were told of them.

    Examples: `capibara usage`, `capibara usage --since 2026-11-01 --until 2026-12-01 --tenant acme`, `capibara usage --since 1d --json`.
    """
    adopt(state)
    settings = reached("provisioner")
    import asyncio

    from capibara_flow.cli import usage
    from capibara_flow.cli.dead import PIPE_WIDTH
    from capibara_flow.edge.usage import told

    asked, listing = asyncio.run(usage.read(settings, since, until, tenant))
    if as_json:
        return typer.echo(json.dumps(told(asked, listing), indent=1))
    if listing.days:
        Console(width=None if sys.stdout.isatty() else PIPE_WIDTH).print(usage.table(listing))
    else:
        typer.echo("no answer came to its end in that time")
    for note in usage.notes(listing):
        typer.echo(note, err=True)
    return None


@commands.command("queue")
def queue_(
    expert: Annotated[str | None, typer.Option(metavar="NAME", help="Only this expert's queue.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
    state: State = DEFAULT_STATE,
) -> None:
    """Show who waits for which expert: tenant by tenant, since when, and how long one more question would wait.

    Examples: `capibara queue`, `capibara queue --expert phi4_fast --json`.
    """
    adopt(state)
    settings = reached("observer")
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
