"""`python -m eval {top1|knn|throughput|flops|compare|controls|report} TARGET...`"""

import sys
from collections.abc import Sequence

from eval import compare, controls, flops, knn, report, throughput, top1
from vitreuse.cli.console import Parser, add_device, run_command

MODULES = (top1, knn, throughput, flops, compare, controls, report)
COMMANDS = {module.__name__.removeprefix("eval."): module for module in MODULES}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; the exit code."""
    shared = Parser(add_help=False)
    add_device(shared)
    description = "The instruments: accuracy, speed, operations, comparison, controls."
    return run_command("python -m eval", description, COMMANDS, shared, argv)


if __name__ == "__main__":
    sys.exit(main())
