"""Commands that take turns apart: list, show, replay, compare, fork, capsules, reruns, dead letters; and remove them."""

# ruff: noqa: PLC0415  what a command needs is imported inside it: ``--help`` is to be quick

import json
import signal
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from capibara_flow.cli.options import State, TurnId, door, errors_exit, reached
from capibara_flow.cli.state import DEFAULT_STATE, adopt, running

#: Of commands that compare, when something goes wrong: 1 says that something differs.
_UNDECIDED = 2

commands = typer.Typer()
dead_app = typer.Typer(
    help="Dead letters: what a stage gave up, kept for a day so that it can be looked at and asked again.", no_args_is_help=True
)
capsule_app = typer.Typer(
    help="Capsules: a turn as one readable file, and that file played again through the workers of today, without any engine.",
    no_args_is_help=True,
)
commands.add_typer(dead_app, name="dead")
commands.add_typer(capsule_app, name="capsule")


@commands.command()
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
    settings = reached("observer")
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


@commands.command()
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
    settings = reached("observer")
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


@commands.command()
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
    settings = reached("observer")
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


@commands.command()
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

    with errors_exit(_UNDECIDED):
        adopt(state)
        before, after = asyncio.run(kept.records(reached("observer"), turn, other))
    found = differences(before, after)
    if as_json:
        typer.echo(json.dumps(kept.compared(before, after, found), indent=1))
    else:
        for each in kept.differing(found):
            kept.console().print(each, highlight=False, soft_wrap=True)
        typer.echo("" if found else "no differences", nl=not found)
    if decisive(found):
        raise typer.Exit(1)


@commands.command()
def fork(
    turn: TurnId,
    stage: Annotated[
        str, typer.Option("--from", metavar="STAGE", help="router, retriever or caller: it and what follows are done again.")
    ] = "router",
    changes: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Change this; may be repeated. An empty value leaves it to the expert."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
    state: State = DEFAULT_STATE,
) -> None:
    """Ask a turn again from one of its stages on, with something changed: a new turn, linked to the old one.

    Keys: expert (or model), message (or prompt: the last one of the user), system, and all of sampling (temperature, max_tokens...);
    collection where sources are looked for (from router or retriever), source=-2 to leave the source with that number out (from caller).
    What was decided before that stage stays as it is, byte for byte. The new turn runs in the background until its deadline.

    Examples: `capibara fork TURN --set message="¿Y en Java?"`, `capibara fork TURN --from caller --set expert=phi --set temperature=0`.
    """
    from capibara_flow.cli.light import load_client

    load_client()
    here = running(state) if adopt(state) else None
    settings = reached("provisioner", quick=True)
    import asyncio

    from capibara_flow.cli import fork as forks
    from capibara_flow.domain.forking import STAGES

    chosen = next((each for each in STAGES if each == stage), None)
    if chosen is None:
        raise typer.BadParameter(f"--from {stage}: a turn can be forked from {', '.join(STAGES[:-1])} or {STAGES[-1]}")
    made = asyncio.run(forks.fork(settings, turn, chosen, changes or ()))
    base = here["url"] if here else door(settings)
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
    settings = reached("observer")
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


@commands.command()
def rerun(  # noqa: PLR0917  typer passes options by name
    since: Annotated[str, typer.Option(metavar="AGO", help="All turns of this time: 90s, 15m, 1h, 2d.")] = "1h",
    fleet: Annotated[Path | None, typer.Option(metavar="FILE", help="The fleet (TOML) to try; the one that is in use.")] = None,
    only: Annotated[
        str, typer.Option(metavar="STAGES", help="Only these stages, between commas: router, retriever, caller.")
    ] = "router,retriever,caller",
    limit: Annotated[int | None, typer.Option(min=1, help="At most so many turns, the newest.")] = None,
    search: Annotated[
        bool, typer.Option("--search", help="Look for sources anew, in the documents of the running installation, and tell which change.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
    state: State = DEFAULT_STATE,
) -> None:
    """Play recorded turns with another configuration, on a broker of its own, and list the decisions that change; exit code 1 if any does.

    Engines are answered from the recordings: no model is asked. The same configuration gives 100 % the same, and exit code 0. Where nothing
    could be played, or something went wrong, nothing is proved either: exit code 2.

    Sources are those of the recordings, unless --search has them looked for anew: by the running retriever, with its settings of now.

    Examples: `capibara rerun --since 1h`, `capibara rerun --since 1d --fleet new.toml --only router --json`,
    `capibara rerun --since 1d --only router,retriever --search`.
    """
    with errors_exit(_UNDECIDED):
        adopt(state)
        settings = reached("observer")
        from capibara_flow.cli import rerun as reruns

        stages = reruns.stages(only)
        done = reruns.rerun(settings, since, Console(stderr=True), fleet_file=fleet, only=stages, limit=limit, search=search)
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


@commands.command()
def erase(
    turn: TurnId,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    state: State = DEFAULT_STATE,
) -> None:
    """Stop a turn and remove every trace of it: question, answer, log and dead letters. There is no way back.

    Example: `capibara erase 01JD3Y4S0QK5M7C2V9N8X1B6TZHRWE4F --yes`.
    """
    adopt(state)
    settings = reached("provisioner")
    if not yes and sys.stdin.isatty():
        typer.confirm(f"Remove {turn} for good?", abort=True)
    import asyncio

    from capibara_flow.cli import dead

    gone = asyncio.run(dead.erased(settings, turn))
    typer.echo(f"{turn}: {gone} messages are gone" if gone else f"{turn}: nothing was kept of it")


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
    settings = reached("observer")
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
    settings = reached("observer")
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
    settings = reached("provisioner")
    import asyncio

    from capibara_flow.cli import dead

    asked, error = asyncio.run(dead.retry(settings, turn, stage, every=every, keep=keep))
    for each in asked:
        typer.echo(dead.told(each, here["url"] if here else door(settings)))
        if each.kept and not keep:
            typer.echo("  its letter could not be removed: another retry would ask it once more", err=True)
    if error:
        raise error
