"""The command line: ``capibara ...``."""


def main() -> None:
    """Run the command that the arguments name; the process ends with its exit code."""
    from capibara_flow.cli.app import app  # noqa: PLC0415  the console of a process must not be paid by who imports a module of this package

    app(prog_name="capibara")
