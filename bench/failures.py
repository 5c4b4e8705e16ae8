"""What fails costs its own rows and no others: an exception becomes a row that says why."""

from __future__ import annotations

from collections.abc import Callable

from bench.report import Row

ALL = "everything"  # name of the row of a case or suite in which nothing was measured


def reason(error: Exception) -> str:
    """The error in one line."""
    first = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {first[:200]}"


def guarded(suite: str, case: str, measure: Callable[[], list[Row]]) -> list[Row]:
    """What ``measure`` returns; one row with the reason if it raises."""
    try:
        return measure()
    except Exception as error:  # whatever is wrong with one case, the others go on
        return [Row(suite=suite, case=case, name=ALL, error=reason(error))]


def fails_a_run(row: Row) -> bool:
    """Whether this package is wrong, or nothing was measured; what a rival cannot do is only shown."""
    return row.error is not None and (row.is_ours or row.name == ALL)
