"""Benchmarks: what a training step costs against backpropagation, and each operation against its rivals.

``python -m bench.ratios`` prints every ratio beside its bar; ``pytest bench`` times single operations;
``python -m bench.crossover`` finds where the sparse correlation stops paying. Run from the repository root.
"""

import os

# The profiler behind the memory rows logs every start and stop, which tears the progress bar apart.
# It reads this once, when torch is imported.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")
