"""``python -m bench``: the same as ``python -m ghl_kernels bench``, from the repository root."""

from __future__ import annotations

import sys

from bench.command import main
from ghl_kernels.demo.errors import UserError

if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
