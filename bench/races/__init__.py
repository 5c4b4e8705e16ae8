"""The races by suite: each a function from the target to its races, which are cheap until they are run."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from bench.race import Race, Target
from bench.races import compete, correlate, delta, depthwise, epilogue, linear, pair, sparse, winners

SUITES: dict[str, Callable[[Target], Iterator[Race]]] = {
    "softmax": compete.softmax,
    "kwta": compete.kwta,
    "winners": winners.races,
    "correlate": correlate.races,
    "pair": pair.races,
    "sparse": sparse.races,
    "linear": linear.races,
    "depthwise": depthwise.races,
    "epilogue": epilogue.races,
    "delta": delta.races,
}
