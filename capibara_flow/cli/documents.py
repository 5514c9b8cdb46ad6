"""Commands for documents: bring them, search them, look after them."""

# ruff: noqa: PLC0415  what a command needs is imported inside it: ``--help`` is to be quick

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from capibara_flow.cli.options import ApiKey, AsJson, Collection, State, Url
from capibara_flow.cli.state import DEFAULT_STATE, adopt

commands = typer.Typer()
rag_app = typer.Typer(help="The documents that answers are grounded in.", no_args_is_help=True)
commands.add_typer(rag_app, name="rag")


@commands.command()
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


@commands.command()
def search(  # noqa: PLR0917  typer passes options by name
    query: Annotated[str, typer.Argument(help="What to look for, in any language.")],
    collection: Collection = "default",
    limit: Annotated[int, typer.Option(min=1, max=100, help="At most so many sources.")] = 10,
    url: Url = "http://127.0.0.1:5001",
    key: ApiKey = None,
    as_json: AsJson = False,
) -> None:
    """Show the sources that have most to do with this, the best first, and say so when a chat would not use them.

    Examples: `capibara search "How do I enter a turn's lane?"`, `capibara search plazo --collection laws --limit 3 --json`.
    """
    from capibara_flow.cli import rag
    from capibara_flow.client import RAGClient

    with RAGClient(url, key=key) as client:
        found = client.search(query, limit, collection=collection)
    typer.echo(rag.as_json([each.model_dump() for each in found.sources]) if as_json else rag.sources_told(found))


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

    A running ingester is asked; where there is none, the stores are opened here.

    Examples: `capibara rag check`, `capibara rag check --repair`.
    """
    import asyncio

    from capibara_flow import settings
    from capibara_flow.cli import rag

    adopt(state)
    checked = asyncio.run(rag.check(settings.load(), state, repair=repair))
    rows = [each.model_dump() for each in checked.findings]
    typer.echo(rag.as_json(rows) if as_json else rag.findings_told(checked, repaired=repair))
    if rows and not repair:
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
