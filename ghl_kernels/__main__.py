"""``python -m ghl_kernels``: what is installed, a demonstration on real images, and the benchmarks."""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from ghl_kernels import __version__, environment
from ghl_kernels.demo import command as demo
from ghl_kernels.demo.ending import exit_code
from ghl_kernels.demo.errors import UserError

_EPILOG = """\
examples:
  python -m ghl_kernels info
  python -m ghl_kernels demo
  python -m ghl_kernels demo --data fashion-mnist --epochs 5 --out fashion
  python -m ghl_kernels bench --quick
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code: that of `ending.exit_code`, or bench's own 1."""
    given = sys.argv[1:] if argv is None else list(argv)
    return exit_code(lambda: _run(given))


def _run(given: list[str]) -> int:
    if given[:1] == ["bench"]:  # its options are the checkout's to know
        return _bench(given[1:])
    arguments = _parser().parse_args(given)
    arguments.run(arguments)
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
    commands.add_parser("bench", help="race every operation and training step; runs from a checkout")
    return parser


def _bench(argv: Sequence[str]) -> int:
    """Hand over to the benchmarks, which are part of the source tree and not of the installed package."""
    for root in (Path.cwd(), Path(__file__).resolve().parent.parent):  # the second beside an editable install
        if (root / "bench" / "command.py").is_file() and (root / "ghl_kernels").is_dir():
            if str(root) not in sys.path:
                sys.path.insert(0, str(root))
            code: int = importlib.import_module("bench.command").main(argv)
            return code
    raise UserError(
        "The benchmarks run from a checkout, not from an installed package: clone the repository, "
        "run make test in it once, then .venv/bin/python -m ghl_kernels bench."
    )


def _info(arguments: argparse.Namespace) -> None:
    report = environment.collect()
    print(json.dumps(report, indent=2) if arguments.json else environment.as_text(report))


if __name__ == "__main__":
    sys.exit(main())
