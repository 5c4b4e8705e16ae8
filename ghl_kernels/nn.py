"""Drop-in layers: torch's Linear and Conv1d/2d/3d whose weights learn by a Hebbian rule.

Forward, input gradient and bias gradient are the torch layer's, bit for bit; in eval mode, without
grad mode or with a frozen or empty weight a layer is its torch layer. ``state_dict`` is the torch layer's.
"""

from __future__ import annotations

import abc
import sys
import warnings
from typing import TYPE_CHECKING, Any, Literal, cast, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Proxy
from torch.nn.utils import parametrize

from ghl_kernels import _check
from ghl_kernels._autograd import GateFunction, LayerFunction, Plan, apply, make_plan, saveable, sums
from ghl_kernels._geometry import Geometry, make_geometry
from ghl_kernels._processes import is_sharded
from ghl_kernels.backends.eager import moments_size
from ghl_kernels.rule import HebbianRule

if TYPE_CHECKING:
    from ghl_kernels._attachment import Attachment
    from ghl_kernels._probe import Probe

GateAt = Literal["backward", "step"]
SumsAt = Literal["forward", "backward"]


class GHLLayer(nn.Module, abc.ABC):
    """What the four layers share: the rule, and the way of the Hebbian sums to the gradient.

    Abstract; ``isinstance(module, ghl.GHLLayer)`` finds a model's GHL layers.

    Attributes:
        rule: the :class:`HebbianRule`. :meth:`set_rule` changes it and the two options, and checks what an
            assignment does not.
        gate_at: ``"backward"``: weight.grad is the gated gradient as soon as backward returns.
            ``"step"``: backward leaves the plain gradient and the sums; a :class:`StepGate` applies the
            rule just before the optimizer's step, exact under accumulation, GradScaler, clipping and DDP.
        sums_at: when A is summed. ``"forward"``: right after u, so that what follows may change u in
            place. ``"backward"``: from u, which is kept. Rules with few winners keep those instead.
    """

    weight: Tensor
    bias: Any
    rule: HebbianRule
    gate_at: GateAt
    sums_at: SumsAt
    _attachment: Attachment | None = None
    _probe: Probe | None = None

    def __init__(
        self,
        *args: Any,
        dtype: Any,
        rule: HebbianRule | None,
        gate_at: GateAt,
        sums_at: SumsAt,
    ) -> None:
        rule = HebbianRule.ghl() if rule is None else rule
        check_options(rule, gate_at, sums_at)  # set_rule would take None for an option that stays as it is
        if isinstance(dtype, torch.dtype) and not dtype.is_floating_point:
            raise TypeError(f"dtype must be a real floating-point dtype, got {dtype}")
        super().__init__(*args, dtype=dtype)
        self.set_rule(rule, gate_at, sums_at)

    def set_rule(
        self, rule: HebbianRule, gate_at: GateAt | None = None, sums_at: SumsAt | None = None
    ) -> None:
        """Check and store the rule and its options; an option that is not given stays as it is.

        Raises:
            TypeError: ``rule`` is no HebbianRule.
            ValueError: an unknown option, more winners than this layer has units, or another gate_at or
                decay while a StepGate or GHLSGD holds the layer.
        """
        gate_at = self.gate_at if gate_at is None else gate_at
        sums_at = self.sums_at if sums_at is None else sums_at
        check_options(rule, gate_at, sums_at)
        rule.winners_of(self.units)
        if self._attachment is not None and (gate_at, rule.decay) != (self.gate_at, self.rule.decay):
            raise ValueError(
                f"gate_at and decay must stay {self.gate_at!r} and {self.rule.decay!r} while a StepGate or "
                f"GHLSGD holds the layer, got {gate_at!r} and {rule.decay!r}; call its remove() first, and "
                "make a new one afterwards"
            )
        self.rule, self.gate_at, self.sums_at = rule, gate_at, sums_at

    @property
    @abc.abstractmethod
    def units(self) -> int:
        """Number of competing units, the first size of the weight."""

    @property
    def filter_groups(self) -> int:
        """Groups of the convolution, 1 for linear; sums and decay are per group."""
        return 1

    @torch.no_grad()
    def learn_(self, x: Tensor, lr: float) -> Tensor:
        """Forward pass and local update in place, W += lr * H, with no backward pass and no gate.

        The call is the update: it changes a frozen weight, and that of a layer in eval mode, as well.
        Backward through an output from before it raises RuntimeError, because the weight has changed; where
        one compiled function made the output and the update, that is not noticed.

        Args:
            x: the layer's input, as for ``forward``.
            lr: learning rate; H points uphill, so a positive one learns.

        Returns:
            u, the layer's output from before the update; it requires no gradient.

        Raises:
            TypeError: an input that is no real floating-point tensor, or outside autocast not of the
                weight's dtype; an lr that is no number.
            ValueError: an input that does not fit the layer, or an lr that is not finite.
            RuntimeError: a weight that is computed (weight_norm, spectral_norm, pruning) or sharded.

        Warns:
            Once, where there are several processes, whose weights part unless all of them get the same x.
        """
        _check.finite("lr", lr)
        _warn_if_distributed(
            "learn_ updates this process's weights by its own share of the batch, and so the replicas part; "
            "with several processes give all of them the whole batch, or broadcast the weights after it"
        )
        self._check_input(x)
        self._autocast_dtype(x)
        u = self._torch_forward(x)
        if self.weight.numel() == 0:
            return u
        batched, geometry = self._prepare(x.to(u.dtype))
        responses = u.unsqueeze(0) if batched.dim() > x.dim() else u
        A, moments = sums(batched, responses, self._plan(geometry))
        rule = self.rule
        if self._probe is not None:
            self._probe.observe_responses(responses, -1 if geometry is None else 1)
            self._probe.observe_rule(None, A, moments, self.weight)
        torch.ops.ghl.learn_(self.weight, A, moments, lr, self.filter_groups, rule.decay, rule.normalize)
        return u

    def forward(self, input: Tensor) -> Tensor:
        """The torch layer's output; in training its backward leaves the rule's gradient in weight.grad."""
        if not self._is_learning():
            if self._probe is not None and self.training:
                self._probe.miss()
            return self._torch_forward(input)
        self._check_input(input)
        _refuse_compilers()
        if _is_batched(input):
            raise _refused_vmap()
        x, geometry = self._prepare(input)
        u = self._apply_rule(x, geometry)
        if self._probe is not None:
            self._probe.observe_responses(u, -1 if geometry is None else 1)
        return u.squeeze(0) if x.dim() > input.dim() else u

    def _is_learning(self) -> bool:
        if not (self.training and torch.is_grad_enabled()):
            return False
        weight = self.weight
        if isinstance(weight, Proxy):
            if self._parameters["weight"].requires_grad:
                raise _refused_tracing()
            return False
        if _is_batched(weight):  # it requires no gradient there, and would get the plain one all the same
            raise _refused_vmap()
        self._refuse_compiled_transforms()
        return weight.requires_grad and weight.numel() > 0

    def _refuse_compiled_transforms(self) -> None:
        """Where a compiler traces grad or vjp it says of no weight that it requires a gradient."""
        if torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
            weight = self._parameters.get("weight")
            if not isinstance(weight, nn.Parameter) or weight.requires_grad:
                raise RuntimeError(
                    "torch.compile around torch.func.grad, vjp and their like loses the rule of a layer in "
                    "training; leave such a function uncompiled"
                )

    def _torch_forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, super().forward(x))

    @abc.abstractmethod
    def _prepare(self, x: Tensor) -> tuple[Tensor, Geometry | None]:
        """x batched and padded as the geometry expects it, differentiably; no geometry for linear."""

    def _check_input(self, x: Tensor) -> None:
        weight = self.weight
        _check.floats(x=x, weight=weight)
        if self._parameters.get("weight") is None:  # functional calls, compilers and fully_shard replace it
            what, remedy = computed_weight(self)
            raise RuntimeError(f"a GHL layer cannot learn where {what}; {remedy}")
        if is_sharded(weight):  # fully_shard gathers it before the pass
            raise RuntimeError(
                "the weight is spread over processes in the pass itself, as tensor parallelism does; GHL "
                "layers learn with whole weights: leave them out of parallelize_module, and use fully_shard "
                "or DistributedDataParallel"
            )

    def _plan(self, geometry: Geometry | None, dtype: torch.dtype | None = None) -> Plan:
        return make_plan(
            geometry,
            self.weight,
            self.rule,
            at_step=self.gate_at == "step",
            sums_at=self.sums_at,
            dtype=dtype,
        )

    def _autocast_dtype(self, x: Tensor) -> torch.dtype | None:
        """What autocast turns x into, or None; TypeError where that leaves x with another dtype than W's."""
        device = x.device.type
        if torch.is_autocast_enabled(device) and x.dtype != torch.float64:
            return torch.get_autocast_dtype(device)
        if x.dtype != self.weight.dtype:
            where = "where autocast does not turn both into another"
            raise TypeError(f"x must have the weight's dtype {self.weight.dtype} {where}, got {x.dtype}")
        return None

    def _apply_rule(self, x: Tensor, geometry: Geometry | None) -> Tensor:
        bias, dtype = self.bias, self._autocast_dtype(x)
        if dtype is not None:
            # outside the function, so that the casts are differentiated as autocast's own are
            x = x.to(dtype)
            bias = None if bias is None else bias.to(dtype)
        plan = self._plan(geometry, dtype)
        # G of the fused kernel is as wide as A
        weight, A, moments = self._gated_weight(None if plan.is_pair or dtype == self.weight.dtype else dtype)
        u, *_ = apply(LayerFunction, x, weight, bias, A, moments, plan)
        return cast(Tensor, u)

    def _gated_weight(self, dtype: torch.dtype | None) -> tuple[Tensor, Tensor, Tensor]:
        """The weight, and the two inputs of LayerFunction through which the sums travel.

        ``dtype``: what G will have, None where that is the weight's.
        """
        if self.gate_at == "step":
            if self._attachment is None:
                raise RuntimeError(
                    "a layer with gate_at='step' is training without a StepGate: create "
                    "StepGate(optimizer, model) before the first forward pass (copies and unpickled layers "
                    "need one of their own), or use gate_at='backward'"
                )
            return saveable(self.weight), *self._attachment.leaves()
        _warn_if_distributed(
            "gate_at='backward' gates each rank's gradient on its own, which is not the rule on the whole "
            "batch; with several processes use gate_at='step' and a StepGate"
        )
        rule, groups = self.rule, self.filter_groups
        size = moments_size(self.units, groups, rule.decay)
        observed = (None, None) if self._probe is None else self._probe.gate_arguments(self.weight)
        return cast(
            tuple[Tensor, Tensor, Tensor],
            apply(
                GateFunction,
                saveable(self.weight),
                dtype,
                size,
                groups,
                rule.decay,
                rule.normalize,
                rule.gate,
                *observed,
            ),
        )

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        if self._attachment is None:
            return super()._apply(fn, recurse)
        with self._attachment.converting():
            return super()._apply(fn, recurse)

    def _replicate_for_data_parallel(self) -> Any:
        if self._is_learning():
            raise RuntimeError(
                "DataParallel cannot train GHL layers: every replica would apply the rule to its own share "
                "of the batch. Use DistributedDataParallel with gate_at='step' and a StepGate"
            )
        return super()._replicate_for_data_parallel()

    def __getstate__(self) -> dict[str, Any]:
        # a StepGate or Monitor holds this very layer; a copy must not send its sums there
        return {key: value for key, value in self.__dict__.items() if key not in ("_attachment", "_probe")}

    def extra_repr(self) -> str:
        """The torch layer's, then the rule and the options that are not the default."""
        parts = [super().extra_repr(), f"rule={self.rule}"]
        if self.gate_at != "backward":
            parts.append(f"gate_at={self.gate_at!r}")
        if self.sums_at != "forward":
            parts.append(f"sums_at={self.sums_at!r}")
        return ", ".join(parts)


class GHLLinear(GHLLayer, nn.Linear):
    """:class:`torch.nn.Linear` trained by a Hebbian rule: x (..., in_features) -> u (..., out_features).

    Competition runs over the out_features units at each position; positions are all leading dimensions.

    Args:
        in_features, out_features, bias, device, dtype: as for torch.nn.Linear.
        rule: see :class:`HebbianRule`; None is ``HebbianRule.ghl()``.
        gate_at, sums_at: see :class:`GHLLayer`.

    Raises:
        TypeError, ValueError: a rule, option or dtype that is not allowed; in training, an input that does
            not fit.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        rule: HebbianRule | None = None,
        gate_at: GateAt = "backward",
        sums_at: SumsAt = "forward",
    ) -> None:
        super().__init__(
            in_features,
            out_features,
            bias,
            device,
            dtype=dtype,
            rule=rule,
            gate_at=gate_at,
            sums_at=sums_at,
        )

    @property
    def units(self) -> int:
        """out_features."""
        return self.out_features

    def _prepare(self, x: Tensor) -> tuple[Tensor, None]:
        return x, None

    def _check_input(self, x: Tensor) -> None:
        super()._check_input(x)
        if x.dim() < 1 or x.shape[-1] != self.in_features:
            raise ValueError(f"x must be (..., {self.in_features}), got shape {tuple(x.shape)}")


class GHLConv(GHLLayer, nn.modules.conv._ConvNd):
    """What the three convolutions share."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, ...],
        stride: int | tuple[int, ...] = 1,
        padding: str | int | tuple[int, ...] = 0,
        dilation: int | tuple[int, ...] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: Literal["zeros", "reflect", "replicate", "circular"] = "zeros",
        device: Any = None,
        dtype: Any = None,
        *,
        rule: HebbianRule | None = None,
        gate_at: GateAt = "backward",
        sums_at: SumsAt = "forward",
    ) -> None:
        super().__init__(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            dilation,
            groups,
            bias,
            padding_mode,
            device,
            dtype=dtype,
            rule=rule,
            gate_at=gate_at,
            sums_at=sums_at,
        )

    @property
    def units(self) -> int:
        """out_channels; competition runs over all groups."""
        return self.out_channels

    @property
    def filter_groups(self) -> int:
        """groups."""
        return self.groups

    def _prepare(self, x: Tensor) -> tuple[Tensor, Geometry]:
        dims = len(self.kernel_size)
        if x.dim() == dims + 1:
            x = x.unsqueeze(0)
        if self.padding_mode != "zeros":
            x = F.pad(x, self._reversed_padding_repeated_twice, mode=self.padding_mode)
            return x, Geometry(self.kernel_size, self.stride, (0,) * dims, self.dilation, self.groups)
        surplus, geometry = make_geometry(
            self.kernel_size, self.stride, self.padding, self.dilation, self.groups
        )
        return (x if surplus is None else F.pad(x, surplus)), geometry

    def _check_input(self, x: Tensor) -> None:
        super()._check_input(x)
        dims = len(self.kernel_size)
        if x.dim() not in (dims + 1, dims + 2) or x.shape[-dims - 1] != self.in_channels:
            sizes = ", ".join("*" * dims)
            raise ValueError(
                f"x must be (batch, {self.in_channels}, {sizes}) or ({self.in_channels}, {sizes}), "
                f"got shape {tuple(x.shape)}"
            )


# Python's own messages about arguments begin with it, and GHLConv is not a class that users know.
GHLConv.__init__.__qualname__ = "GHLConv1d/2d/3d.__init__"


class GHLConv1d(GHLConv, nn.Conv1d):
    """:class:`torch.nn.Conv1d` trained by a Hebbian rule; see :class:`GHLConv2d`."""


class GHLConv2d(GHLConv, nn.Conv2d):
    """:class:`torch.nn.Conv2d` trained by a Hebbian rule: x (B, C, H, W) -> u (B, N, OH, OW).

    Competition runs over the N = out_channels units at each output position, over all groups; the
    sums are per group. Unbatched input, every padding and padding_mode, and any memory format work.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias,
            padding_mode, device, dtype: as for torch.nn.Conv2d.
        rule: see :class:`HebbianRule`; None is ``HebbianRule.ghl()``.
        gate_at, sums_at: see :class:`GHLLayer`.

    Raises:
        TypeError, ValueError: a rule, option or dtype that is not allowed; in training, an input that does
            not fit.
    """


class GHLConv3d(GHLConv, nn.Conv3d):
    """:class:`torch.nn.Conv3d` trained by a Hebbian rule; see :class:`GHLConv2d`."""


def named_layers(model: nn.Module) -> dict[str, GHLLayer]:
    """The GHL layers of a model by their qualified names."""
    return {name: module for name, module in model.named_modules() if isinstance(module, GHLLayer)}


def computed_weight(module: nn.Module) -> tuple[str, str]:
    """What a message says of a weight that is computed from other parameters, and what ends that."""
    if parametrize.is_parametrized(module, "weight"):
        return (
            "its weight is parametrized (weight_norm, spectral_norm or the like)",
            "remove it with torch.nn.utils.parametrize.remove_parametrizations first",
        )
    return (
        "its weight is no parameter but computed by weight_norm, spectral_norm or pruning",
        "remove it (remove_weight_norm, remove_spectral_norm, torch.nn.utils.prune.remove) first",
    )


def check_options(rule: object, gate_at: object, sums_at: object) -> None:
    """TypeError or ValueError unless these are a rule and two known options."""
    _check.rule(rule)
    for name, value, choices in (
        ("gate_at", gate_at, get_args(GateAt)),
        ("sums_at", sums_at, get_args(SumsAt)),
    ):
        if value not in choices:
            raise ValueError(f"{name} must be one of {choices}, got {value!r}")


def _is_batched(tensor: Tensor) -> bool:
    """Whether a surrounding torch.func.vmap maps over the tensor; torch has no public way to ask."""
    functorch = torch._C._functorch
    if torch.compiler.is_compiling():  # which cannot look below the uppermost transform
        return functorch.is_batchedtensor(tensor)
    while functorch.is_functorch_wrapped_tensor(tensor):
        if functorch.is_batchedtensor(tensor):
            return True
        tensor = functorch.get_unwrapped(tensor)
    return False


def _refused_vmap() -> RuntimeError:
    return RuntimeError(
        "torch.func.vmap cannot train GHL layers: the rule is not linear in the data, and vmap would leave "
        "the plain gradient. Train the members of an ensemble in turn; eval mode and no_grad are fine"
    )


def _refuse_compilers() -> None:
    """RuntimeError in what would train otherwise than the rule says."""
    if torch.compiler.is_compiling():
        config: Any = torch._dynamo.config
    else:  # not loaded by everyone
        config = sys.modules.get("torch._dynamo.config")
    # not by is_exporting(), which the compiler of torch 2.8 takes for True
    if torch.compiler._is_exporting_flag:
        raise RuntimeError(
            "torch.export of a GHL layer in training would leave a program that does not train it; call "
            "eval() first, and the layer is exported as its torch layer"
        )
    if getattr(config, "compiled_autograd", False):
        raise RuntimeError(
            "GHL layers do not train under compiled autograd, which traces into their operations and keeps "
            "the sums of gradients that were zeroed; turn torch._dynamo.config.compiled_autograd off"
        )


def _refused_tracing() -> RuntimeError:
    return RuntimeError(
        "torch.fx traces into a GHL layer in training, and would leave its torch operations without the "
        "rule; use a tracer whose is_leaf_module is true of ghl_kernels.GHLLayer (for torchvision's "
        "create_feature_extractor: tracer_kwargs={'leaf_modules': [ghl_kernels.GHLLayer]}). In eval mode a "
        "layer traces as its torch layer, which trains by backpropagation"
    )


_warnings_given: set[str] = set()


def _warn_if_distributed(message: str) -> None:
    if torch.compiler.is_compiling() or message in _warnings_given:
        return
    distributed = torch.distributed
    if distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1:
        _warnings_given.add(message)
        warnings.warn(message, stacklevel=4)
