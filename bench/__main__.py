"""``python -m bench``: the same as ``python -m ghl_kernels bench``, from the repository root."""

from __future__ import annotations

import sys

from ghl_kernels.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["bench", *sys.argv[1:]]))
