"""Before the stages: what they will launch, compiled by as many processes as there are cores.

The launches of Triton's kernels are recorded, not run, and compiled while more are recorded. What is missed
here is compiled when it is first launched and only costs time.
"""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator

import torch

import ghl_kernels as ghl
from bench.aot.compilation import specialize
from bench.gpu import kwta, native_probes, pair, parity, races, scaling, stage, steps
from bench.gpu.compiling import Compiler
from bench.gpu.stage import Stage
from ghl_kernels.backends.triton import arch as architectures
from ghl_kernels.backends.triton.launch import recording

CORES = os.cpu_count() or 1
RACERS = 3  # processes that compile the races' rivals
END = 3.0  # seconds in which everything that runs can be ended
Calls = Callable[[], Iterable[Callable[[], object]]]


def run(this: Stage) -> None:
    """The probes, Inductor's kernels and Triton's, all in processes of their own."""
    if this.dry:
        _rehearse(this)
        return
    apart = _start(this)
    compiler = Compiler(max(2, CORES - len(apart)))
    arch = architectures.of(this.device)
    with ghl.use_backend("triton"):
        for name, calls in _calls(this).items():
            this.attempt(
                f"recording {name}", lambda name=name, calls=calls: _record(this, name, calls, compiler, arch)
            )
    compiled, problems = compiler.finish(this.left - END)
    this.errors += problems
    if compiled < compiler.submitted:
        this.absent(
            "compiling", f"{compiler.submitted - compiled} of {compiler.submitted} kernels: out of time"
        )
    this.add("kernels", {"recorded": compiler.submitted, "compiled": compiled, "seconds_left": this.left})
    _finish(this, apart)


def _calls(this: Stage) -> dict[str, Calls]:
    """By stage; what few kernels decide much comes first."""
    modules = {"pair": pair, "kwta": kwta, "races": races, "steps": steps, "scaling": scaling}
    return {
        name: lambda module=module: module.calls(this.device, this.dry)
        for name, module in (modules | {"parity": parity}).items()
        if _is_wanted(this, name)
    }


def _is_wanted(this: Stage, name: str) -> bool:
    return not this.later or name in this.later


def _record(this: Stage, name: str, calls: Calls, compiler: Compiler, arch: architectures.Arch) -> None:
    for call in calls():
        if this.left < END + 5:
            this.absent(f"recording {name}", "out of time; the rest is compiled when it is launched")
            return
        with recording() as launches:
            call()
        for launch in launches:
            compiler.submit(specialize(launch, arch))


def _start(this: Stage) -> dict[str, subprocess.Popen[bytes]]:
    """What others compile: a process for every step with a bar, some for the races, one for each other."""
    out = str(this.out)
    commands = {
        f"steps {name} {i}": ["steps", "--warm", name, str(i), out]
        for name, i in itertools.product(steps.BARRED, range(len(steps.FIRST)))
    }
    commands |= {f"races {i}": ["races", "--warm", str(i), str(RACERS), out] for i in range(RACERS)}
    commands |= {"pair": ["rivals", out], "scaling": ["scaling", "--warm", out]}
    commands |= {
        f"environment {name}": ["native_probes", name, str(this.cache)] for name in native_probes.SOURCES
    }
    if torch.cuda.get_device_capability() == (9, 0):
        commands["forms"] = ["debug_waits", str(this.cache)]
    commands = {name: rest for name, rest in commands.items() if _is_wanted(this, name.split()[0])}
    threads = max(2, CORES // max(1, len(commands)))
    environment = os.environ | {"TORCHINDUCTOR_COMPILE_THREADS": str(threads)}
    return {
        name: subprocess.Popen([sys.executable, "-m", f"bench.gpu.{module}", *options], env=environment)
        for name, (module, *options) in commands.items()
    }


def _finish(this: Stage, running: dict[str, subprocess.Popen[bytes]]) -> None:
    for name, process in running.items():
        try:
            process.wait(timeout=max(0.1, this.left - END))
        except subprocess.TimeoutExpired:
            process.kill()
            this.absent(f"compiling {name}", "out of time; the stage compiles it itself")


def _rehearse(this: Stage) -> None:
    """In a dry run: every launch is made, and two kernels are compiled for sm_90, which needs no GPU."""
    names: set[str] = set()
    with ghl.use_backend("triton"):
        for name, calls in _calls(this).items():
            this.attempt(f"recording {name}", lambda calls=calls: _note(calls, names))
    this.add("kernels", {"recorded": len(names)})
    # kernels that are interpreted are not compiled: in a process where Triton is itself
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "bench.gpu.warm", "--rehearse", str(this.cache / "triton")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        this.errors.append(f"compiling for sm_90: {done.stdout.strip()} {done.stderr.strip()[-500:]}")
    this.add("kernels", {"compiled for sm_90": done.stdout.strip()})


def _note(calls: Calls, names: set[str]) -> None:
    for call in calls():
        with recording() as launches:
            call()
        names.update(f"{launch.kernel.fn.__name__} {launch.warps}" for launch in launches)


def _rehearsed() -> Iterator[Callable[[], object]]:
    """A selection and a small pair, as the Triton backend's operations would launch them."""
    from ghl_kernels.backends.triton.operations import OPERATIONS

    x, u, grad_u = (torch.empty(64, size, dtype=torch.bfloat16) for size in (64, 16, 16))
    competition = kwta.Competition("linear", 3, 1.0, False)
    yield lambda: OPERATIONS.competition_state(u, 1, competition)
    yield lambda: OPERATIONS.linear_pair(x, u, grad_u, kwta.Competition("softmax", 0, 1.0, False), "oja")


def rehearse() -> int:
    """Compile what ``_rehearsed`` launches for sm_90; the number of kernels on standard output."""
    arch, compiler = architectures.KNOWN["sm_90"], Compiler(1)
    with architectures.assume(arch), recording() as launches:
        for call in _rehearsed():
            call()
    for launch in launches:
        compiler.submit(specialize(launch, arch))
    compiled, problems = compiler.finish(120.0)
    print(compiled, *problems)
    return int(bool(problems) or compiled < compiler.submitted)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--rehearse"]:
        os.environ["TRITON_CACHE_DIR"] = sys.argv[2]
        sys.exit(rehearse())
    sys.exit(stage.main("warm", run))
