"""The native CPU kernels: csrc's launchers, one function each.

Arguments are the fields of the C++ parameter structs under their own names (csrc/include/ghl/*.h).
Pointers are ints (``tensor.data_ptr()``), 0 for null; strides count elements; dtypes and other
choices are the numbers of the C++ enums. Nothing here looks at a tensor: the callers in
``ghl_kernels.backends.cpu`` validate and keep every tensor alive over the call. The GIL is released
while a kernel runs. A wrong enum value raises ValueError; parameters that a launcher refuses raise
RuntimeError with its message, and then nothing was written.
"""

from typing import TypedDict

class BuildInfo(TypedDict):
    compiler: str  # name and version
    flags: str
    isas: list[str]  # built instruction sets, lowest first
    openmp: bool
    sanitize: bool

def compete(
    *,
    u: int,
    u_dtype: int,  # 0: float32, 1: bfloat16
    u_layout: tuple[int, int, int],  # stride_batch, stride_unit, stride_position
    batch: int,
    units: int,
    positions: int,
    activity: int,  # 0: softmax, 1: linear, 2: relu, 3: binary
    winners: int = 0,
    temperature: float = 1.0,
    anti: bool = False,
    y: int = 0,
    y_dtype: int = 0,
    y_layout: tuple[int, int, int] = (0, 0, 0),
    logsumexp: int = 0,
    threshold: int = 0,
    cut: int = 0,
    winner_unit: int = 0,
    winner_activity: int = 0,
    threads: int,
) -> None: ...
def correlate(
    *,
    batch: int,
    channels: int,
    groups: int = 1,
    in_size: tuple[int, int, int] = (1, 1, 1),
    out_size: tuple[int, int, int] = (1, 1, 1),
    kernel: tuple[int, int, int] = (1, 1, 1),
    stride: tuple[int, int, int] = (1, 1, 1),
    padding: tuple[int, int, int] = (0, 0, 0),
    dilation: tuple[int, int, int] = (1, 1, 1),
    winner_unit: int = 0,
    winner_activity: int = 0,
    winners: int,
    x: int = 0,
    x_dtype: int,
    x_stride_batch: int,
    x_stride_channel: int,
    x_stride: tuple[int, int, int] = (0, 0, 0),
    units: int,
    a: int = 0,
    a_stride_unit: int,
    a_stride_channel: int,
    a_stride_tap: int,
    activity_sum: int = 0,
    workspace: int = 0,
    threads: int,
) -> None: ...
def correlate_workspace(
    *,
    batch: int,
    channels: int,
    groups: int = 1,
    in_size: tuple[int, int, int] = (1, 1, 1),
    out_size: tuple[int, int, int] = (1, 1, 1),
    kernel: tuple[int, int, int] = (1, 1, 1),
    stride: tuple[int, int, int] = (1, 1, 1),
    padding: tuple[int, int, int] = (0, 0, 0),
    dilation: tuple[int, int, int] = (1, 1, 1),
    winner_unit: int = 0,
    winner_activity: int = 0,
    winners: int,
    x: int = 0,
    x_dtype: int,
    x_stride_batch: int,
    x_stride_channel: int,
    x_stride: tuple[int, int, int] = (0, 0, 0),
    units: int,
    a: int = 0,
    a_stride_unit: int,
    a_stride_channel: int,
    a_stride_tap: int,
    activity_sum: int = 0,
    workspace: int = 0,
    threads: int,
) -> int: ...
def epilogue(
    *,
    units: int,
    channels: int,
    taps: int,
    a: int = 0,
    a_layout: tuple[int, int, int],  # stride_unit, stride_channel, stride_tap
    weight: int = 0,
    weight_dtype: int = 0,
    weight_layout: tuple[int, int, int] = (0, 0, 0),
    decay: int,  # 0: none, 1: oja, 2: rows
    row_decay: int = 0,
    normalize: int,  # 0: layer, 1: filter, 2: constant
    scale: float = 1.0,
    target: int,  # 0: gate, 1: delta, 2: learn
    out: int = 0,
    out_dtype: int = 0,
    out_layout: tuple[int, int, int],
    rate: float = 0.0,
    workspace: int = 0,
    threads: int,
) -> None: ...
def epilogue_workspace(
    *,
    units: int,
    channels: int,
    taps: int,
    a: int = 0,
    a_layout: tuple[int, int, int],
    weight: int = 0,
    weight_dtype: int = 0,
    weight_layout: tuple[int, int, int] = (0, 0, 0),
    decay: int,
    row_decay: int = 0,
    normalize: int,
    scale: float = 1.0,
    target: int,
    out: int = 0,
    out_dtype: int = 0,
    out_layout: tuple[int, int, int],
    rate: float = 0.0,
    workspace: int = 0,
    threads: int,
) -> int: ...
def outer(
    *,
    rows: int,
    units: int,
    channels: int,
    x: int = 0,
    x_dtype: int = 0,
    x_stride: int,  # from row to row
    y: int = 0,
    y_dtype: int = 0,
    y_stride: int,
    a: int = 0,
    a_stride: int,
    adds: bool = False,
    workspace: int = 0,
    threads: int,
) -> None: ...
def outer_workspace(
    *,
    rows: int,
    units: int,
    channels: int,
    x: int = 0,
    x_dtype: int = 0,
    x_stride: int,
    y: int = 0,
    y_dtype: int = 0,
    y_stride: int,
    a: int = 0,
    a_stride: int,
    adds: bool = False,
    workspace: int = 0,
    threads: int,
) -> int: ...
def winograd(
    *,
    batch: int,
    channels: int,
    units: int,
    groups: int = 1,
    in_size: tuple[int, int],
    padding: tuple[int, int],
    x: int = 0,
    x_dtype: int = 0,
    x_layout: tuple[int, int, int],  # stride_batch, stride_channel, stride_position
    y: int = 0,
    y_dtype: int = 0,
    y_layout: tuple[int, int, int],
    a: int = 0,
    a_layout: tuple[int, int, int],  # stride_unit, stride_channel, stride_tap
    workspace: int = 0,
    threads: int,
) -> None: ...
def winograd_workspace(
    *,
    batch: int,
    channels: int,
    units: int,
    groups: int = 1,
    in_size: tuple[int, int],
    padding: tuple[int, int],
    x: int = 0,
    x_dtype: int = 0,
    x_layout: tuple[int, int, int],
    y: int = 0,
    y_dtype: int = 0,
    y_layout: tuple[int, int, int],
    a: int = 0,
    a_layout: tuple[int, int, int],
    workspace: int = 0,
    threads: int,
) -> int: ...
def detected_isa() -> str: ...
def selected_isa() -> str: ...
def select_isa(name: str) -> None: ...
def build_info() -> BuildInfo: ...
