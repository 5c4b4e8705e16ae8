"""``python -m ghl_kernels``: what is installed, and a demonstration on real images."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence

from ghl_kernels import __version__, environment
from ghl_kernels.demo import command as demo
from ghl_kernels.demo.errors import UserError

_EPILOG = """\
examples:
  python -m ghl_kernels info
  python -m ghl_kernels demo
  python -m ghl_kernels demo --data fashion-mnist --epochs 5 --out fashion
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0, or 2 for something the user can mend."""
    arguments = _parser().parse_args(argv)
    try:
        arguments.run(arguments)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m ghl_kernels",
        description="Global-guided Hebbian Learning for PyTorch on fused kernels.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"ghl_kernels {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    info = commands.add_parser(
        "info",
        help="print the backends with their state, the native build, threads and versions",
        description="Print every backend with its state and the reason for it, the compiler and instruction "
        "set of the native kernels, the threads and the versions: what a bug report needs.",
    )
    info.add_argument("--json", action="store_true", help="print JSON instead of text")
    info.set_defaults(run=_info)
    demo.add_to(commands)
    return parser


def _info(arguments: argparse.Namespace) -> None:
    report = environment.collect()
    print(json.dumps(report, indent=2) if arguments.json else environment.as_text(report))


if __name__ == "__main__":
    sys.exit(main())
