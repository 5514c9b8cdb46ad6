"""A program for a Python that has vLLM: reads command lines, one JSON list a line, with vLLM's own parser; prints what it understood."""

import json
import sys
from typing import Any


def parser() -> Any:
    from vllm import platforms

    if not platforms.current_platform.device_type:
        # Its defaults depend on the hardware: without any, as on a machine for tests, take the one that always is there.
        from vllm.platforms.cpu import CpuPlatform

        platforms._current_platform = CpuPlatform()
    from vllm.entrypoints.cli.serve import ServeSubcommand
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    made = FlexibleArgumentParser()
    ServeSubcommand().subparser_init(made.add_subparsers())
    return made


def main() -> None:
    made = parser()
    for line in sys.stdin:
        print("PARSED", json.dumps(vars(made.parse_args(json.loads(line)[1:])), default=repr))


main()
