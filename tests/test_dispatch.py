"""Which backend runs, what the table says, and the choice between the sparse and the dense sum."""

from __future__ import annotations

import logging
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import ghl_kernels as ghl
from ghl_kernels import HebbianRule, _dispatch, _native, _processor
from ghl_kernels._autograd import make_plan
from ghl_kernels._geometry import make_geometry
from ghl_kernels.backends import cpu, eager

RULE = ghl.HebbianRule.kwta(2)


@pytest.fixture(autouse=True)
def auto(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every test starts from "auto" with nothing logged yet, and leaves no choice behind."""
    monkeypatch.setattr(_dispatch, "_logged", set())
    with ghl.use_backend("auto"):
        yield


@pytest.fixture
def native() -> None:
    """Skips where the native CPU kernels were not built; broken ones are an error."""
    try:
        _native.load_cpu()
    except _native.NativeNotBuilt as reason:
        pytest.skip(str(reason))


@pytest.fixture(
    params=[_native.NativeNotBuilt("no compiler was found"), _native.NativeBroken("undefined symbol")]
)
def no_native(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """An installation whose native module is missing or does not load; the reason."""
    monkeypatch.setattr(_native, "_load", lambda name: request.param)
    return str(request.param)


def selected(dtype: torch.dtype = torch.float32) -> str:
    return _dispatch.select(torch.device("cpu"), dtype).__name__.rsplit(".", 1)[-1]


# --- the table ----------------------------------------------------------------------------------


def test_table_lists_every_backend_with_a_reason() -> None:
    table = ghl.backends()
    assert [row.name for row in table] == ["eager", "cpu", "triton", "cuda"]
    assert table[0].available
    assert all(isinstance(row.available, bool) and row.reason for row in table)


@pytest.mark.usefixtures("native")
def test_table_says_what_the_native_kernels_are() -> None:
    row = ghl.backends()[1]
    assert row.available
    assert _native.load_cpu().selected_isa() in row.reason


def test_table_says_why_native_is_missing(no_native: str) -> None:
    row = ghl.backends()[1]
    assert (row.available, row.reason) == (False, no_native)


def test_loading_missing_and_broken_modules_are_different_errors(no_native: str) -> None:
    expected = _native.NativeNotBuilt if "compiler" in no_native else _native.NativeBroken
    with pytest.raises(expected, match=no_native):
        _native.load_cpu()
    assert not issubclass(_native.NativeBroken, _native.NativeNotBuilt)


# --- use_backend --------------------------------------------------------------------------------


def test_setter() -> None:
    ghl.use_backend("eager")
    assert selected() == "eager"
    ghl.use_backend("auto")
    assert selected(torch.float64) == "eager"


def test_context_managers_nest_and_undo() -> None:
    first = selected()
    with ghl.use_backend("eager"):
        assert selected() == "eager"
        with ghl.use_backend("auto"):
            assert selected() == first
            with ghl.use_backend("eager"):
                assert selected() == "eager"
            assert selected() == first
        assert selected() == "eager"
    assert selected() == first


def test_context_manager_undoes_after_an_exception() -> None:
    first = selected()
    with pytest.raises(ArithmeticError), ghl.use_backend("eager"):
        raise ArithmeticError
    assert selected() == first


def test_unknown_name_changes_nothing() -> None:
    first = selected()
    with pytest.raises(ValueError, match="unknown backend 'cuda13'; there are 'auto', 'eager', 'cpu'"):
        ghl.use_backend("cuda13")
    assert selected() == first


@pytest.mark.parametrize("name", [["cpu"], None, 3])
def test_name_that_is_no_str(name: Any) -> None:
    first = selected()
    with pytest.raises(TypeError, match=f"name must be one of .*'cpu'.* got {re.escape(repr(name))}"):
        ghl.use_backend(name)
    assert selected() == first


def test_unavailable_backend_raises_with_the_reason(no_native: str) -> None:
    with pytest.raises(RuntimeError, match=f"backend 'cpu' cannot run here: {no_native}"):
        ghl.use_backend("cpu")
    assert selected() == "eager"


def test_backward_passes_in_other_threads_see_the_choice() -> None:
    """Autograd runs devices' passes in threads of its own: the choice must not be a thread's."""
    import threading

    seen: list[str] = []
    with ghl.use_backend("eager"):
        thread = threading.Thread(target=lambda: seen.append(selected()))
        thread.start()
        thread.join()
    assert seen == ["eager"]


# --- select -------------------------------------------------------------------------------------


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_auto_takes_the_native_kernels(dtype: torch.dtype) -> None:
    assert selected(dtype) == "cpu"


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_auto_falls_back_where_they_cannot_and_says_so_once(
    dtype: torch.dtype, caplog: pytest.LogCaptureFixture
) -> None:
    u = torch.randn(3, 5).to(dtype)
    with caplog.at_level(logging.INFO, "ghl_kernels"):
        for _ in range(3):
            y = ghl.functional.compete(u, RULE)
    assert (y != 0).sum(1).tolist() == [2, 2, 2]
    (record,) = caplog.records
    assert record.levelno == logging.INFO
    assert "'cpu'" in record.getMessage()
    assert str(dtype) in record.getMessage()


def test_auto_falls_back_where_native_is_missing(no_native: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "ghl_kernels"):
        for _ in range(3):
            assert selected() == "eager"
    (record,) = caplog.records
    assert no_native in record.getMessage()


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_explicit_choice_refuses_what_it_cannot_run(dtype: torch.dtype) -> None:
    u = torch.randn(3, 5).to(dtype)
    with ghl.use_backend("cpu"), pytest.raises(RuntimeError, match=f"'cpu' cannot run this: .*not {dtype}"):
        ghl.functional.compete(u, RULE)
    layer = ghl.GHLLinear(5, 4, dtype=dtype)
    with ghl.use_backend("cpu"), pytest.raises(RuntimeError, match=str(dtype)):
        layer(u)


def test_explicit_choice_that_is_lost_later_raises_with_the_reason(
    monkeypatch: pytest.MonkeyPatch, native: None
) -> None:
    with ghl.use_backend("cpu"):
        monkeypatch.setattr(_native, "_load", lambda name: _native.NativeBroken("gone"))
        with pytest.raises(RuntimeError, match=r"backend 'cpu' cannot run .*: gone"):
            ghl.functional.compete(torch.randn(3, 5), RULE)


def test_refusals_name_the_device_and_the_dtype() -> None:
    assert "cuda" in cpu.refusal(torch.device("cuda"), torch.float32)
    assert "float64" in cpu.refusal(torch.device("cpu"), torch.float64)
    assert cpu.refusal(torch.device("cpu"), torch.bfloat16) == ""
    assert eager.refusal(torch.device("cuda"), torch.float64) == ""


def test_devices_without_kernels_of_their_own_run_eager() -> None:
    assert _dispatch.select(torch.device("cuda"), torch.float32) is eager


# --- GHL_BACKEND --------------------------------------------------------------------------------


def _run(program: str, backend: str | None) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if key != "GHL_BACKEND"}
    if backend is not None:
        environment["GHL_BACKEND"] = backend
    return subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False
    )


def test_environment_gives_the_initial_choice() -> None:
    program = (
        "import torch, ghl_kernels as ghl; from ghl_kernels import _dispatch\n"
        "name = lambda: _dispatch.select(torch.device('cpu'), torch.float32).__name__.rsplit('.', 1)[-1]\n"
        "print(name())\n"
        "with ghl.use_backend('auto'): pass\n"
        "print(name())"
    )
    run = _run(program, "eager")
    assert run.stdout.split() == ["eager", "eager"], run.stderr
    # set to nothing, as by `GHL_BACKEND= python ...`
    assert _run("import ghl_kernels._dispatch as d; print(d.is_automatic())", "").stdout.split() == ["True"]


def test_environment_with_an_unknown_name_is_an_error_at_first_use() -> None:
    run = _run(
        "import torch, ghl_kernels as ghl; ghl.functional.compete(torch.randn(2, 3), ghl.HebbianRule())",
        "gpu",
    )
    assert run.returncode != 0
    assert "ValueError: unknown backend 'gpu'; there are 'auto', 'eager', 'cpu'" in run.stderr


def test_an_import_loads_neither_a_compiler_nor_triton() -> None:
    """Which take seconds, and Triton would no longer see that it is to interpret."""
    run = _run("import sys, ghl_kernels; print({'torch._dynamo', 'triton', 'rich'} & set(sys.modules))", None)
    assert run.stdout.strip() == "set()", run.stderr


# --- whose product makes G ----------------------------------------------------------------------


def is_grad_ours(layer: torch.nn.Module) -> bool:
    return make_plan(None, layer.weight, layer.rule).is_grad_ours


@pytest.mark.parametrize("slow", [True, False])
def test_the_kernel_of_rows_is_for_slow_products(monkeypatch: pytest.MonkeyPatch, slow: bool) -> None:
    monkeypatch.setattr(_dispatch, "HAS_SLOW_PRODUCTS", slow)
    assert is_grad_ours(ghl.GHLLinear(512, 512)) == slow
    assert not is_grad_ours(ghl.GHLLinear(64, 64))
    assert not is_grad_ours(ghl.GHLLinear(512, 512, rule=HebbianRule.softhebb()))  # has no gate
    with ghl.use_backend("eager"):
        assert not is_grad_ours(ghl.GHLLinear(512, 512))


@pytest.mark.parametrize(
    ("vendor", "capability", "mkl", "slow"),
    [
        ("AuthenticAMD", "AVX512", True, True),
        ("AuthenticAMD", "AVX512_VNNI", True, True),
        ("AuthenticAMD", "AVX2", True, False),
        ("AuthenticAMD", "AVX512", False, False),
        ("GenuineIntel", "AVX512", True, False),
        (None, "AVX512", True, False),
    ],
)
def test_where_products_are_slow(
    monkeypatch: pytest.MonkeyPatch, vendor: str | None, capability: str, mkl: bool, slow: bool
) -> None:
    monkeypatch.setattr(_processor, "fields", lambda: {"vendor_id": vendor} if vendor else {})
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: mkl)
    assert _processor.has_slow_products() == slow


# --- sparse or dense ----------------------------------------------------------------------------

KINDS = ["linear", "pointwise", "thin", "conv", "winograd", "depthwise"]


@pytest.mark.parametrize(
    ("channels", "kernel_size", "kind"),
    [
        (64, None, "linear"),
        (1, None, "linear"),
        (64, (1, 1), "pointwise"),
        (64, (1,), "pointwise"),
        (64, (5, 5), "conv"),
        (64, (1, 3), "conv"),
        (64, (3, 3, 3), "conv"),
        (64, (3, 3), "winograd"),
        (8, (3, 3), "winograd"),
        (7, (3, 3), "thin"),
        (3, (5, 5), "thin"),
        (1, (3, 3), "depthwise"),
        (1, (1, 1), "depthwise"),
    ],
)
def test_kinds_of_layers(channels: int, kernel_size: tuple[int, ...] | None, kind: str) -> None:
    geometry = None if kernel_size is None else make_geometry(kernel_size, 1, 1, 1, 1)[1]
    assert _dispatch.kind_of_layer(channels, geometry) == kind
    assert kind in KINDS


@pytest.mark.parametrize("change", [{"stride": (1, 2)}, {"dilation": (2, 2)}], ids=str)
def test_only_dense_patches_overlap_enough_for_winograd(change: dict[str, tuple[int, ...]]) -> None:
    _, geometry = make_geometry((3, 3), 1, 1, 1, 1)
    assert _dispatch.kind_of_layer(64, geometry._replace(padding=(0, 2), groups=2)) == "winograd"
    assert _dispatch.kind_of_layer(64, geometry._replace(**change)) == "conv"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("units", [1, 7, 96, 1536])
def test_sparse_is_for_few_winners(units: int, kind: str) -> None:
    limit = _dispatch._CROSSOVER["cpu", kind]
    choices = [_dispatch.prefers_sparse("cpu", kind, units, k) for k in range(1, units + 1)]
    assert choices.count(True) == int(limit * units)
    assert sorted(choices, reverse=True) == choices


@pytest.mark.parametrize("kind", KINDS)
def test_winners_are_kept_only_where_they_are_summed_from(kind: str) -> None:
    for k in range(1, 97):
        if _dispatch.keeps_winners("cpu", kind, 96, k):
            assert _dispatch.prefers_sparse("cpu", kind, 96, k)
            assert 8 * k <= 0.06 * 4 * 96  # bytes of the lists and of u


PAIRED_LISTS = {
    "DeepHebb's first layer": ({}, True),
    "two of 67 units": ({"units": 67, "winners": 2}, True),
    "two of 66 units": ({"units": 66, "winners": 2}, False),
    "one of 33 units": ({"units": 33}, False),
    "no winners": ({"winners": 0}, False),
    "one channel": ({"channels": 1}, False),
    "more channels": ({"channels": 5}, False),
    "a single tap, which says nothing of layouts": ({"kernel": (1, 1)}, False),
    "groups": ({"groups": 2}, False),
    "NCHW": ({"layout": torch.contiguous_format}, False),
}


@pytest.mark.parametrize("case", PAIRED_LISTS.values(), ids=PAIRED_LISTS)
def test_lists_of_first_layers_are_paired(
    monkeypatch: pytest.MonkeyPatch, case: tuple[dict[str, Any], bool]
) -> None:
    asked: list[tuple[Any, ...]] = []
    monkeypatch.setattr(_dispatch, "_pairs_lists", lambda *layer: not asked.append(layer))
    changes, expected = case
    layer = {"units": 96, "channels": 3, "kernel": (5, 5), "groups": 1, "winners": 1, "dtype": torch.float16}
    layer |= {"layout": torch.channels_last, **changes}
    kernel = layer["kernel"]
    weight = torch.zeros(layer["units"], layer["channels"], *kernel)
    if len(kernel) == 2:
        weight = weight.contiguous(memory_format=layer["layout"])
    geometry = make_geometry(kernel, 1, 0, 1, layer["groups"])[1]
    assert _dispatch.pairs_winners(weight, geometry, layer["winners"], layer["dtype"]) is expected
    assert not _dispatch.pairs_winners(weight, None, layer["winners"], layer["dtype"])
    described = (*weight.shape[:2], kernel, layer["winners"])
    assert asked == [(weight.device, layer["dtype"], *described)] * expected
    monkeypatch.setattr(_dispatch, "_pairs_lists", lambda *layer: False)
    assert not _dispatch.pairs_winners(weight, geometry, layer["winners"], layer["dtype"])


def test_competition_among_all_units_is_dense() -> None:
    for kind in KINDS:
        assert not _dispatch.prefers_sparse("cpu", kind, 100, 0)
        assert not _dispatch.prefers_sparse("cpu", kind, 0, 0)


def test_devices_that_were_not_measured_are_dense() -> None:
    assert not _dispatch.prefers_sparse("meta", "conv", 1000, 1)
    assert not _dispatch.keeps_winners("meta", "conv", 1000, 1)


def test_crossovers_are_fractions() -> None:
    assert set(_dispatch._CROSSOVER) == {(device, kind) for device in ("cpu", "cuda") for kind in KINDS}
    assert all(0.0 <= limit <= 1.0 for limit in _dispatch._CROSSOVER.values())


def test_an_operation_that_few_backends_have_is_theirs_in_auto(monkeypatch: pytest.MonkeyPatch) -> None:
    has_it = SimpleNamespace(refusal=lambda device, dtype: "", fused_sgd_=lambda: None)
    refuses = SimpleNamespace(refusal=lambda device, dtype: "no", fused_sgd_=lambda: None)
    lacks_it = SimpleNamespace(refusal=lambda device, dtype: "")
    modules = {"lacks it": lacks_it, "refuses": refuses, "has it": has_it}
    monkeypatch.setattr(_dispatch, "_load", modules.__getitem__)
    monkeypatch.setattr(_dispatch, "_PREFERENCE", {"cpu": tuple(modules)})
    device = torch.device("cpu")
    assert _dispatch.select(device, torch.float32) is lacks_it
    assert _dispatch.select_with("fused_sgd_", device, torch.float32) is has_it
    monkeypatch.setattr(_dispatch, "_PREFERENCE", {"cpu": ("lacks it",)})
    assert _dispatch.select_with("fused_sgd_", device, torch.float32) is lacks_it
