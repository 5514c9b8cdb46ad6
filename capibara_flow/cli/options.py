"""What the modules of commands share: options, the settings of whoever is running, and errors as one clear line."""

# ruff: noqa: PLC0415  what a command needs is imported inside it: ``--help`` is to be quick

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from typer.core import TyperGroup

from capibara_flow.errors import CannotStart, CapibaraError

if TYPE_CHECKING:
    from capibara_flow.settings import Settings

TurnId = Annotated[str, typer.Argument(metavar="TURN", help="A turn's id, as `capibara turns` or the stream of its answer tells it.")]
Collection = Annotated[str, typer.Option(help="Which part of your documents.")]
Url = Annotated[str, typer.Option(help="Where the edge answers.", envvar="CAPIBARA_URL")]
ApiKey = Annotated[str | None, typer.Option(help="An API key.", envvar="CAPIBARA_KEY")]
AsJson = Annotated[bool, typer.Option("--json", help="For programs.")]
State = Annotated[Path, typer.Option(help="The state folder of `capibara up`.", envvar="CAPIBARA_STATE")]


def expected(error: Exception) -> str | None:
    """What to tell of an error that needs no traceback, or ``None`` for a bug."""
    from nats.errors import Error as BrokerError

    from capibara_flow.client import RAGError
    from capibara_flow.settings import SettingsError

    if isinstance(error, CapibaraError | SettingsError | RAGError):
        return str(error)
    if isinstance(error, BrokenPipeError):
        return None  # nobody reads on (``| head``): the command line ends quietly then
    if isinstance(error, ConnectionError):
        return f"no connection ({error}): is it running? `capibara doctor` tells"
    if isinstance(error, BrokerError):
        return f"the broker refused ({error or type(error).__name__}): are the passwords right? `capibara doctor` tells"
    return None


def reached(role: str, *, quick: bool = False) -> "Settings":
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


def door(settings: "Settings") -> str:
    """Where the edge of *settings* answers."""
    host = f"[{settings.edge.host}]" if ":" in settings.edge.host else settings.edge.host
    return f"http://{host}:{settings.edge.port}"


@contextmanager
def errors_exit(code: int) -> Iterator[None]:
    """An expected error in this block ends the command with a line on standard error and exit *code*."""
    try:
        yield
    except Exception as error:
        if (message := expected(error)) is None:
            raise
        Console(stderr=True).print(f"[red]error:[/] {escape(message)}", highlight=False, soft_wrap=True)
        raise typer.Exit(code) from error


class Group(TyperGroup):
    """Commands whose expected errors end with a line on standard error and exit code 1."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command."""
        with errors_exit(1):
            return super().invoke(ctx)
