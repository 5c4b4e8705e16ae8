"""Benchmarks: every operation and training step against its rivals and against the machine's limits.

``python -m ghl_kernels bench`` measures, prints, draws and compares; ``pytest bench`` times single
operations; ``python -m bench.performance`` writes docs/performance.md. Run from the repository root.
"""

import os

# The profiler behind the memory rows logs every start and stop, which tears the progress bar apart.
# It reads this when it is first used.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")
