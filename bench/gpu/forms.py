"""Stage 2: the CUDA backend's pair kernel in each of its forms, on the cases of its tests on the host.

A form has a process of its own, for a trap or a hang takes everything with it. One that does not work is
listed under "broken"; tools/gpu_check lets no later stage use it. The form for sm_90 runs on the build whose
waits end (debug_waits.py), where that is there. Cases, inputs and expected sums are those
of tests/cuda_backend/test_sm90_kernel.py, the form for few columns has layers of its own; float32, which only
the form for sm_80 takes, is multiplied in one pass of tf32 and in three.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import os
import subprocess
import sys
from types import ModuleType
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from bench.gpu import debug_waits, stage
from bench.gpu.poison import poison
from bench.gpu.stage import ROOT, Stage, available_kernels, read_json
from ghl_kernels._geometry import Geometry
from ghl_kernels.backends.cuda.kernels import correlate
from ghl_kernels.backends.gpu.layout import Patches, patches, responses
from ghl_kernels.backends.gpu.state import State
from ghl_kernels.rule import Competition

FORMS = ("mma", "narrow", "wgmma")
ACTIVITIES = ("softmax", "linear", "relu", "binary")  # by the cases' numbers
FEW = ("image", "winners and anti", "3-d", "A alone", "G alone")  # under a memory checker
FEWEST = ("one of everything", "image")  # in a dry run
# Of the sum of absolute products. y may be rounded the other way, tf32 has 10 bits, and tensor cores cut off
# what an addition leaves below their accumulator; a term that is wrong or missing is hundreds of times that.
ROUNDED_Y, TF32, SUMMED = 2.0**-8, 2.0**-9, 2.0**-16
START = 10.0  # seconds in which a process has begun
WRONG = 4.0  # times what is allowed: no other way of rounding explains that


def run(this: Stage) -> None:
    """Every form that this device has."""
    if "cuda" not in available_kernels(this):
        return
    if importlib.util.find_spec("pytest") is None:
        this.absent("forms", "the cases are those of tests, which need pytest")
        return
    hopper = not this.dry and torch.cuda.get_device_capability() == (9, 0)
    for form in FORMS if hopper else FORMS[:-1]:
        with this.share(1.0 if form == FORMS[-1] else 0.5):
            _apart(this, form)


def _apart(this: Stage, form: str) -> None:
    """Run a form's cases in a process and take over what it has written."""
    name = f"forms-{form}"
    command = [sys.executable, "-m", "bench.gpu.forms", "--form", form, "--out", str(this.out)]
    command += ["--cache", str(this.cache), "--seconds", str(max(1, round(this.left - START)))]
    command += ["--dry-run"] if this.dry else ["--small"] if this.small else []
    environment = dict(os.environ)
    if form == "wgmma" and (built := debug_waits.folder(this.cache)):
        environment["GHL_NATIVE_DIR"] = str(built)
    limit = max(5.0, this.left)
    try:
        done = subprocess.run(command, env=environment, timeout=limit, check=False)
        status = f"status {done.returncode}"
    except subprocess.TimeoutExpired:
        status = "no end"
    document = read_json(this.out / f"{name}.json") or {"results": {}, "complete": False}
    rows, errors = document["results"].get("forms", []), document.get("errors", [])
    this.add("forms", *rows)
    this.errors += errors
    for what in document.get("not_done", []):
        this.absent(form, what)
    if not document["complete"]:
        this.errors.append(f"{form}: {status}, while it was busy with {document.get('doing')}")
    if _is_broken(document):
        this.add("broken", {"form": form})


def _is_broken(document: dict[str, Any]) -> bool:
    """Whether a form gave up in the middle of a case, fails more often than not, or sums what it should not.

    A process that has not even begun was slow, and a case that is refused says nothing of the others.
    """
    rows = document["results"].get("forms", [])
    stopped = not document["complete"] and "doing" in document
    raised = len(document.get("errors", [])) - sum(_is_wrong([row], 1.0) for row in rows)
    return stopped or raised > len(rows) or _is_wrong(rows, WRONG)


def _is_wrong(rows: list[dict[str, Any]], limit: float) -> bool:
    """Whether an error is that many times what is allowed; infinite ones are words in a document."""
    values = [row[name] for row in rows for name in ("A", "G") if name in row]
    return any(isinstance(value, str) or value > limit for value in values)


def sweep(this: Stage, form: str) -> None:
    """All cases of a form, in this process."""
    tests = _tests()
    for name, case in this.each(_cases(this, form, tests), lambda item: item[0], least=1):
        this.begin(name)
        this.attempt(f"{form}, {name}", lambda name=name, case=case: _check(this, tests, form, name, case))


def _tests() -> ModuleType:
    """The tests of the kernel's host build."""
    sys.path.insert(0, str(ROOT / "tests" / "cuda_backend"))
    import test_sm90_kernel

    return test_sm90_kernel


def _cases(this: Stage, form: str, tests: ModuleType) -> list[tuple[str, Any]]:
    if form == "narrow":
        few = _few_columns(tests)
        return list(few.items())[: 3 if this.dry else 6 if this.small else None]
    names = FEWEST if this.dry else FEW if this.small else tuple(tests.CASES)
    cases = {name: tests.CASES[name] for name in names if not tests.CASES[name].channels_last_result}
    if form == "mma":
        cases |= {
            f"{name}, float32{tf32}": dataclasses.replace(tests.CASES[name], dtype=torch.float32)
            for name in (FEWEST if this.dry else FEW)
            for tf32 in ("", " as tf32")
        }
    return list(cases.items())


def _few_columns(tests: ModuleType) -> dict[str, Any]:
    """First layers of networks, from the simplest on."""
    image = tests.Case(3, 3, 96, size=(1, 13, 11), kernel=(1, 5, 5), padding=(0, 2, 2))
    change = functools.partial(dataclasses.replace, image)
    return {
        "one channel and one unit": tests.Case(2, 1, 1, size=(1, 4, 5), kernel=(1, 3, 3)),
        "image": image,
        "lists of two": change(winners=2),
        "winners and anti": change(winners=4, anti=True),
        "A alone": change(wants="a"),
        "G alone": change(wants="g"),
        "half": change(dtype=torch.float16, batch=40),
        "lists of one, half": change(winners=1, dtype=torch.float16, batch=40),
        "lists of one, 64 units": change(winners=1, units=64, kernel=(1, 3, 3), padding=(0, 1, 1)),
        "lists of two, most units and columns": change(winners=2, units=128, channels=4, kernel=(1, 5, 8)),
        "ResNet": change(units=64, kernel=(1, 7, 7), padding=(0, 3, 3), stride=(1, 2, 2), size=(1, 61, 60)),
        "3 x 3": change(units=64, kernel=(1, 3, 3), padding=(0, 1, 1), batch=90),
        "16 units": change(units=16, kernel=(1, 3, 3), padding=(0, 1, 1)),
        "most units and columns": change(units=128, channels=4, kernel=(1, 5, 8), padding=(0, 2, 4)),
        "dilation": change(units=37, kernel=(1, 3, 2), dilation=(1, 2, 3), padding=(0, 2, 0)),
        "1-d": change(units=30, channels=2, size=(1, 1, 300), kernel=(1, 1, 20), padding=(0, 0, 10)),
        "3-d": change(units=65, channels=2, size=(4, 5, 6), kernel=(2, 3, 2), padding=(1, 1, 0)),
        "temperature": change(temperature=0.3),
        "relu": change(activity=tests.RELU),
        "binary": change(activity=tests.BINARY, winners=7),
    }


def _check(this: Stage, tests: ModuleType, form: str, name: str, case: Any) -> None:
    tf32 = name.endswith(" as tf32")
    made = tests.problem(case)
    poison(this.device)
    with mock.patch.object(correlate, "takes_tf32", return_value=tf32):
        if name.startswith("lists"):
            A, G = _run_lists(this.device, case, made, tests.activity(made))
        else:
            A, G = _run(this.device, case, made, form)
    x = tests.patches(case, made.x)[:, : case.result_channels]
    row: dict[str, Any] = {"form": form, "case": name}
    for wanted, result, left in (("A", A, tests.activity(made)), ("G", G, made.grad.double())):
        if wanted.lower() not in case.wants:
            continue
        assert result is not None
        row[wanted] = _excess(result.cpu().double(), left, x, _bound(case.dtype, wanted, tf32))
    worst = max(row[wanted] for wanted in ("A", "G") if wanted in row)
    if not worst <= 1.0:
        this.errors.append(f"{form}, {name}: {worst:.3g} times as far off as allowed")
    this.add("forms", row)


def _bound(dtype: torch.dtype, wanted: str, tf32: bool) -> float:
    if dtype == torch.float32:
        return TF32 if tf32 else SUMMED
    return ROUNDED_Y if wanted == "A" else SUMMED


def _excess(result: Tensor, left: Tensor, x: Tensor, bound: float) -> float:
    """The worst entry's error over what it may be; infinite where NaN are."""
    expected = torch.einsum("pn,pct->nct", left, x)
    allowed = bound * torch.einsum("pn,pct->nct", left.abs(), x.abs()) + 1e-6
    return ((result - expected).abs() / allowed).nan_to_num(float("inf")).max().item()


def _run(device: torch.device, case: Any, made: Any, form: str) -> tuple[Tensor | None, Tensor | None]:
    u, grad = (
        responses(_moved(tensor, device), 1) if name in case.wants else None
        for name, tensor in (("a", made.u), ("g", made.grad))
    )
    fields = (getattr(made, name) for name in State._fields)
    state: State | None = State(*(None if field is None else field.to(device) for field in fields))
    competition = Competition(ACTIVITIES[case.activity], case.winners, case.temperature, case.anti)
    x = _patches(device, case, made)
    channels = case.result_channels or case.channels
    # A alone has it given
    if u is not None and grad is not None and form == "narrow":
        state = None if correlate.makes_state(x, u, grad, competition, channels, form) else state
    given = state if u is not None else None
    return correlate.correlate(x, u, grad, given, competition, channels=channels, form=form)


def _run_lists(device: torch.device, case: Any, made: Any, y: Tensor) -> tuple[Tensor, Tensor]:
    """From the winners of y in place of u."""
    unit = y.topk(case.winners).indices.sort().values
    lists = (unit.int().to(device), y.gather(1, unit).float().to(device))
    x = _patches(device, case, made)
    return correlate.correlate_winners(x, *lists, responses(_moved(made.grad, device), 1))


def _patches(device: torch.device, case: Any, made: Any) -> Patches:
    geometry = Geometry(case.kernel, case.stride, case.padding, case.dilation, case.groups)
    return patches(_moved(made.x, device).movedim(-1, 1), geometry)


def _moved(tensor: Tensor, device: torch.device) -> Tensor:
    """With its padding, NaN that nobody may read."""
    base = tensor._base
    assert base is not None
    return base.to(device).as_strided(tensor.size(), tensor.stride(), tensor.storage_offset())


if __name__ == "__main__":
    if sys.argv[1:2] == ["--form"]:
        sys.exit(stage.main(f"forms-{sys.argv[2]}", functools.partial(sweep, form=sys.argv[2]), sys.argv[3:]))
    sys.exit(stage.main("forms", run))
