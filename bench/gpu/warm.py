"""Before the stages: every kernel that they will launch, compiled by as many processes as there are cores.

The launches are recorded, not run. What is compiled lands in Triton's cache under the key that a launch
looks up; what is missed here is compiled when it is first launched and only costs time.
"""

from __future__ import annotations

import concurrent.futures
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Callable, Iterable

import ghl_kernels as ghl
from bench.aot.compilation import Compilation, compile_, specialize
from bench.gpu import kwta, pair, parity, races, scaling, stage, steps
from bench.gpu.stage import Stage
from ghl_kernels.backends.triton import arch as architectures
from ghl_kernels.backends.triton.launch import recording

RACERS = 6  # processes that compile the races' rivals


def run(this: Stage) -> None:
    """Inductor's kernels and Triton's, all in processes of their own."""
    inductor = {} if this.dry else _start_inductor(this)
    found: dict[str, Compilation] = {}
    with ghl.use_backend("triton"):
        for name, calls in _calls(this).items():
            this.attempt(
                f"recording {name}", lambda name=name, calls=calls: _record(this, name, calls, found)
            )
    this.add("kernels", {"distinct": len(found)})
    if this.dry:
        this.absent("compiling", "kernels that are interpreted are not compiled")
        return
    workers = os.cpu_count() or 1
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(workers, mp_context=context) as pool:
        for problem in pool.map(_compile, found.values()):
            if problem:
                this.errors.append(problem)
    this.add("kernels", {"compiled": len(found), "processes": workers, "seconds_left": this.left})
    _finish_inductor(this, inductor)


def _calls(this: Stage) -> dict[str, Callable[[], Iterable[Callable[[], object]]]]:
    # what is timed comes first
    return {
        "pair": lambda: pair.calls(this.device, this.dry),
        "kwta": lambda: kwta.calls(this.device, this.dry),
        "races": lambda: races.calls(this.device, this.dry),
        "steps": lambda: steps.calls(this.device, this.dry),
        "scaling": lambda: scaling.calls(this.device, this.dry),
        "parity": lambda: parity.calls(this.device, this.dry),
    }


def _record(
    this: Stage,
    name: str,
    calls: Callable[[], Iterable[Callable[[], object]]],
    found: dict[str, Compilation],
) -> None:
    arch = architectures.of(this.device)
    for call in calls():
        if this.left < 20:
            this.absent(f"recording {name}", "out of time; the rest is compiled when it is launched")
            return
        with recording() as launches:
            call()
        if this.dry:
            found.update((f"{launch.kernel.fn.__name__} {launch.warps}", None) for launch in launches)
            continue
        for launch in launches:
            compilation = specialize(launch, arch)
            found[compilation.key] = compilation


def _compile(compilation: Compilation) -> str:
    try:
        compile_(compilation)
    except Exception as error:  # the stage that launches it will show the same error in full
        return f"{compilation.kernel} {compilation.constexprs}: {type(error).__name__}: {str(error)[:200]}"
    return ""


def _start_inductor(this: Stage) -> dict[str, subprocess.Popen[bytes]]:
    """A process for every network, some for the races, one each for the pair and the overhead."""
    out = str(this.out)
    commands = {
        **{name: ["steps", "--warm", name, out] for name in steps.NETWORKS},
        **{f"races {i}": ["races", "--warm", str(i), str(RACERS), out] for i in range(RACERS)},
        "pair": ["pair", "--warm", out],
        "overhead": ["scaling", "--warm", out],
    }
    environment = os.environ | {"TORCHINDUCTOR_COMPILE_THREADS": "1"}  # there are processes enough
    return {
        name: subprocess.Popen([sys.executable, "-m", f"bench.gpu.{module}", *options], env=environment)
        for name, (module, *options) in commands.items()
    }


def _finish_inductor(this: Stage, running: dict[str, subprocess.Popen[bytes]]) -> None:
    for name, process in running.items():
        try:
            process.wait(timeout=max(1.0, this.left - 5))
        except subprocess.TimeoutExpired:
            process.kill()
            this.absent(f"compiling {name}", "out of time; the stage compiles it itself")


if __name__ == "__main__":
    sys.exit(stage.main("warm", run))
