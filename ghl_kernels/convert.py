"""convert and revert: swap a model's torch layers for ours and back, in place."""

from __future__ import annotations

import fnmatch
import logging
import warnings
from collections.abc import Iterable, Iterator, Sequence

from torch import nn
from torch.nn.utils import parametrize

from ghl_kernels import _check
from ghl_kernels._processes import is_sharded
from ghl_kernels.nn import (
    GateAt,
    GHLConv1d,
    GHLConv2d,
    GHLConv3d,
    GHLLayer,
    GHLLinear,
    SumsAt,
    check_options,
    computed_weight,
    named_layers,
)
from ghl_kernels.rule import HebbianRule

logger = logging.getLogger("ghl_kernels")

_GHL_TYPES: dict[type[nn.Module], type[GHLLayer]] = {
    nn.Linear: GHLLinear,
    nn.Conv1d: GHLConv1d,
    nn.Conv2d: GHLConv2d,
    nn.Conv3d: GHLConv3d,
}
_TORCH_TYPES = {ours: torchs for torchs, ours in _GHL_TYPES.items()}

_REPLACED_FORWARD = "its forward was replaced by one of its own (module.forward = ...), which some hooks do"

Exclusion = str | nn.Module | type[nn.Module]


def convert(
    model: nn.Module,
    rule: HebbianRule = HebbianRule.ghl(),  # noqa: B008  immutable
    *,
    exclude: Exclusion | Iterable[Exclusion] = (),
    gate_at: GateAt = "backward",
    sums_at: SumsAt = "forward",
) -> nn.Module:
    """Let every Conv1d/2d/3d and Linear of a model, except the last Linear, learn by ``rule``, in place.

    Classes are swapped: parameters, buffers, hooks, mode and device stay, and so do optimizers and
    checkpoints. Only exact torch types are converted; subclasses are left alone, the projections of
    nn.MultiheadAttention among them, and so are GHL layers: a second call with the same arguments changes
    nothing. What was converted and what was kept is logged at INFO to the logger ``ghl_kernels``.

    The last Linear is the last one that the model registered (the last of ``named_modules()``), which need
    not be the last one to run. It is kept whatever ``exclude`` says. Given by itself it is converted, too,
    with a warning that it was:

        convert(encoder)                      # an encoder without a head: all but its last Linear,
        convert(encoder.projection)           # and that one
        convert(model, exclude="classifier")  # a head that was not registered last,
        convert(model.auxiliary)              # and the Linear that was

    Args:
        model: the model; converted itself when it is such a layer.
        rule: the rule of every converted layer.
        exclude: kept besides the last Linear: qualified names, globs over them, modules or module
            types, each with everything inside.
        gate_at, sums_at: see :class:`GHLLayer`.

    Returns:
        ``model``.

    Warns:
        When the model's last convertible module is not the one kept (its output layer, then, would
        learn without a target), and when it has neither a layer to convert nor a GHL layer.

    Raises:
        TypeError: ``model``, ``rule`` or an exclusion of the wrong type.
        ValueError: an unknown gate_at or sums_at; an exclusion that matches nothing; a layer that cannot be
            converted, because its weight is shared, lazy, sharded, computed (weight_norm, spectral_norm,
            pruning) or too narrow for the rule's winners, or its ``forward`` was replaced; no layer left to
            convert in a model whose GHL layers have another rule, gate_at or sums_at. Nothing has been
            swapped then.
    """
    _check.module(model)
    check_options(rule, gate_at, sums_at)
    excluded = _excluded(model, exclude)
    candidates = [(name, m) for name, m in model.named_modules() if _is_candidate(m)]
    linears = [m for _, m in candidates if type(m) is nn.Linear]
    head = linears[-1] if linears and model is not linears[-1] else None
    chosen = [(name, m) for name, m in candidates if m is not head and m not in excluded]
    present = [layer for layer in named_layers(model).values() if layer not in excluded]
    if not chosen:
        _check_agreement(present, {"rule": rule, "gate_at": gate_at, "sums_at": sums_at})
    _check_shared(model, chosen)
    for name, module in chosen:
        _check_convertible(name, module, rule)
    for _, module in chosen:
        module.__class__ = _GHL_TYPES[type(module)]
        assert isinstance(module, GHLLayer)
        module.set_rule(rule, gate_at, sums_at)
    _log(model, [name for name, _ in chosen])
    if not chosen:
        if not present:
            warnings.warn("convert found no layer to convert", stacklevel=2)
        return model
    name, last = candidates[-1]
    if last is not head and last not in excluded:
        warnings.warn(
            f"the last convertible module is {_check.label(name)!r}, which was converted: if it is the "
            "output layer, exclude it, because an output layer has to follow its targets",
            stacklevel=2,
        )
    return model


def revert(model: nn.Module) -> nn.Module:
    """Turn every GHL layer of a model back into its torch layer, in place; returns ``model``.

    Raises:
        TypeError: ``model`` is no module.
        ValueError: a layer is attached to a StepGate, which would then find gradients without sums, or
            watched by a Monitor; or it has no torch layer to go back to: it is parametrized, passed to
            fully_shard, of a subclass, or its ``forward`` was replaced. Nothing has been swapped then.
    """
    _check.module(model)
    layers = named_layers(model)
    for name, layer in layers.items():
        shown = repr(_check.label(name))
        if layer._attachment is not None:
            raise ValueError(f"{shown} is attached to a StepGate; call the gate's remove() first")
        if layer._probe is not None:
            raise ValueError(f"{shown} is watched by a Monitor; call the monitor's remove() first")
        _check_revertible(shown, layer)
    for layer in layers.values():
        del layer.rule, layer.gate_at, layer.sums_at
        layer.__class__ = _TORCH_TYPES[type(layer)]  # type: ignore[assignment]
    return model


def _is_candidate(module: nn.Module) -> bool:
    """An exact torch type, or one that a torch utility made of it, which is refused by name later."""
    if type(module) in _GHL_TYPES:
        return True
    if not isinstance(module, tuple(_GHL_TYPES)) or isinstance(module, GHLLayer):
        return False
    lazy = isinstance(module, nn.modules.lazy.LazyModuleMixin)
    is_parametrized = parametrize.is_parametrized(module, "weight")
    return lazy or is_parametrized or is_sharded(module._parameters.get("weight"))


def _excluded(model: nn.Module, exclude: Exclusion | Iterable[Exclusion]) -> set[nn.Module]:
    if isinstance(exclude, str | nn.Module | type):
        items = [exclude]
    elif isinstance(exclude, Iterable):
        items = list(exclude)
    else:
        raise TypeError(
            f"exclude takes names, globs, modules, module types or several of these, got {exclude!r}"
        )
    named = list(model.named_modules())
    excluded: set[nn.Module] = set()
    for item in items:
        if isinstance(item, str):
            roots = [m for name, m in named if fnmatch.fnmatchcase(name, item)]
        elif isinstance(item, nn.Module):
            roots = [m for _, m in named if m is item]
        elif isinstance(item, type) and issubclass(item, nn.Module):
            roots = [m for _, m in named if isinstance(m, item)]
        else:
            raise TypeError(f"exclude takes names, globs, modules and module types, got {item!r}")
        if not roots and not isinstance(item, type):
            raise ValueError(f"exclude matches no module of the model: {item!r}")
        excluded.update(inner for root in roots for inner in root.modules())
    return excluded


def _check_agreement(layers: Sequence[GHLLayer], asked: dict[str, object]) -> None:
    """ValueError unless all layers have the options asked for: convert would be taken to have set them."""
    differing = [[name for name, value in asked.items() if getattr(m, name) != value] for m in layers]
    names = [name for name in asked if any(name in own for own in differing)]
    if names:
        raise ValueError(
            f"convert found no torch layer to convert but {_check.counted(len(layers), 'GHL layer')}, "
            f"{sum(map(bool, differing))} with another {' or '.join(names)}; call revert(model) first, or "
            "set_rule on each layer"
        )


def _check_shared(model: nn.Module, chosen: list[tuple[str, nn.Module]]) -> None:
    owners: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        for key, parameter in module._parameters.items():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append(f"{name}.{key}".lstrip("."))
    for name, module in chosen:
        sharing = owners.get(id(module._parameters.get("weight")), [])
        if len(sharing) > 1:
            raise ValueError(
                f"cannot convert {_check.label(name)!r}: its weight is shared ({', '.join(sharing)}), and a "
                "sum of gated gradients is not the rule; untie the weights or exclude these modules"
            )


def _check_convertible(name: str, module: nn.Module, rule: HebbianRule) -> None:
    def refuse(what: str, remedy: str) -> ValueError:
        return ValueError(f"cannot convert {_check.label(name)!r}: {what}; {remedy}, or exclude it")

    if "forward" in module.__dict__:  # it holds on to the torch layer's, which the swap does not reach
        raise refuse(_REPLACED_FORWARD, "convert before it is wrapped")
    weight = module._parameters.get("weight")
    if isinstance(module, nn.modules.lazy.LazyModuleMixin) or isinstance(
        weight, nn.parameter.UninitializedParameter
    ):
        raise refuse("it is lazy and has no weight yet", "run one forward pass before converting")
    if weight is None:
        raise refuse(*computed_weight(module))
    if is_sharded(weight):
        raise refuse("its weight is sharded (a DTensor)", "convert before fully_shard")
    if not weight.is_leaf:
        raise refuse("its weight is not a leaf", "assign it a torch.nn.Parameter")
    if not weight.is_floating_point():
        raise refuse(f"its weight is {weight.dtype}", "use a real floating-point dtype")
    try:
        rule.winners_of(weight.shape[0])
    except ValueError as error:
        raise refuse(str(error), "use fewer winners or a fraction") from None


def _check_revertible(shown: str, layer: GHLLayer) -> None:
    if "forward" in layer.__dict__:
        what, remedy = _REPLACED_FORWARD, "take the wrapper off first"
    elif type(layer) in _TORCH_TYPES:
        return
    elif parametrize.is_parametrized(layer):
        what = "it is parametrized"
        remedy = "call torch.nn.utils.parametrize.remove_parametrizations first"
    elif is_sharded(layer._parameters.get("weight")):
        what, remedy = "it was passed to fully_shard", "revert before that"
    else:
        what, remedy = f"{type(layer).__name__} is a subclass", "replace it by hand"
    raise ValueError(f"cannot revert {shown}: {what}; {remedy}")


def _log(model: nn.Module, converted: Sequence[str]) -> None:
    def listed(names: Iterable[str]) -> str:
        return ", ".join(repr(_check.label(name)) for name in names) or "none"

    layers = _check.counted(len(converted), "layer")
    logger.info("converted %s (%s), kept %s", layers, listed(converted), listed(_kept(model)))


def _kept(model: nn.Module) -> Iterator[str]:
    """What is left of Linear and convolutions, subclasses and the projections of attention too."""
    for name, module in model.named_modules():
        if isinstance(module, nn.MultiheadAttention):  # which holds its input projection as a bare parameter
            yield f"{name}.in_proj".lstrip(".")
        elif isinstance(module, tuple(_GHL_TYPES)) and not isinstance(module, GHLLayer):
            yield name
