"""Tensors and rules as the keyword arguments of ``ghl_kernels._cuda``."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ghl_kernels import _tape
from ghl_kernels.backends.gpu.layout import Patches, Responses
from ghl_kernels.backends.gpu.state import State
from ghl_kernels.rule import Competition

DTYPE = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
ACTIVITY = {"softmax": 0, "linear": 1, "relu": 2, "binary": 3}


def queue(function: Callable[..., None], **arguments: Any) -> None:
    """Queue a kernel on the current stream of its tensors, which are its arguments in place of addresses."""
    tensors = {name: value for name, value in arguments.items() if isinstance(value, Tensor)}
    others = addresses({name: value for name, value in arguments.items() if name not in tensors})
    # a tape repeats it with tensors alone
    start = functools.partial(_queue, functools.partial(function, **others), tuple(tensors))
    start(*tensors.values())
    _tape.note(start, tuple(tensors.values()))


def _queue(function: Callable[..., None], names: tuple[str, ...], *tensors: Tensor) -> None:
    places = {name: tensor.data_ptr() for name, tensor in zip(names, tensors, strict=True)}
    function(**places, **place_of(tensors[0]))


def addresses(arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments with addresses in place of tensors, 0 for None."""
    return {
        name: address(value) if value is None or isinstance(value, Tensor) else value
        for name, value in arguments.items()
    }


def stream_of(tensor: Tensor) -> dict[str, int]:
    """As place_of, for kernels that are not started by :func:`queue`: no tape could repeat them."""
    _tape.refuse()
    return place_of(tensor)


def place_of(tensor: Tensor) -> dict[str, int]:
    """The device of a tensor and its current stream; zeros where kernels run on the CPU."""
    if tensor.device.type != "cuda":
        return {"device": 0, "stream": 0}
    index = tensor.device.index
    # what torch.cuda.current_stream wraps, in a tenth of its time
    return {"device": index, "stream": torch._C._cuda_getCurrentRawStream(index)}


def address(tensor: Tensor | None) -> int:
    """Where the data begins; 0 for a tensor that is not there."""
    return 0 if tensor is None else tensor.data_ptr()


def state_arguments(state: State | None) -> dict[str, Tensor | None]:
    """The fields of a state by name."""
    return {name: getattr(state, name, None) for name in State._fields}


def patch_arguments(x: Patches) -> dict[str, Any]:
    """x and the convolution whose patches it is seen as, without the dtype."""
    return {
        "batch": x.batch,
        "channels": x.channels * x.groups,
        "groups": x.groups,
        "in_size": x.in_size,
        "out_size": x.out_size,
        "kernel": x.kernel,
        "stride": x.stride,
        "padding": x.padding,
        "dilation": x.dilation,
        "x": x.tensor,
        "x_stride_batch": x.batch_stride,
        "x_stride_channel": x.channel_stride,
        "x_stride": x.strides,
    }


def response_arguments(name: str, view: Responses | None) -> dict[str, Any]:
    """The tensor and the layout of responses; nothing for those that are not there."""
    if view is None:
        return {}
    layout = (view.inner, view.batch_stride, view.position_stride, view.unit_stride)
    return {name: view.tensor, f"{name}_layout": layout}


def competition_arguments(competition: Competition) -> dict[str, Any]:
    """What turns a response into an activity, given the state of its position."""
    activity, winners, temperature, anti = competition
    return {
        "activity": ACTIVITY[activity],
        "selects": winners > 0,
        "anti": anti,
        "temperature": temperature,
    }
