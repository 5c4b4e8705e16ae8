"""convert and revert: swap a model's torch layers for ours and back, in place."""

from __future__ import annotations

import fnmatch
import logging
import warnings
from collections.abc import Iterable

import torch
from torch import nn
from torch.nn.utils import parametrize

from ghl_kernels.nn import GateAt, GHLConv1d, GHLConv2d, GHLConv3d, GHLLayer, GHLLinear, SumsAt, check_options
from ghl_kernels.rule import HebbianRule

logger = logging.getLogger("ghl_kernels")

_GHL_TYPES: dict[type[nn.Module], type[GHLLayer]] = {
    nn.Linear: GHLLinear,
    nn.Conv1d: GHLConv1d,
    nn.Conv2d: GHLConv2d,
    nn.Conv3d: GHLConv3d,
}
_TORCH_TYPES = {ours: torchs for torchs, ours in _GHL_TYPES.items()}

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
    checkpoints. Only exact torch types are converted; subclasses are left alone. What was converted
    and what was kept is logged at INFO to the logger ``ghl_kernels``.

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
        learn without a target), and when nothing is converted.

    Raises:
        TypeError: ``model``, ``rule`` or an exclusion of the wrong type.
        ValueError: an exclusion that matches nothing; a layer that cannot be converted, because its
            weight is shared, lazy, sharded, computed (weight_norm, spectral_norm, pruning) or too
            narrow for the rule's winners. Nothing has been swapped then.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    check_options(rule, gate_at, sums_at)
    excluded = _excluded(model, exclude)
    candidates = [(name, m) for name, m in model.named_modules() if _is_candidate(m)]
    linears = [m for _, m in candidates if type(m) is nn.Linear]
    head = linears[-1] if linears and model is not linears[-1] else None
    chosen = [(name, m) for name, m in candidates if m is not head and m not in excluded]
    _check_shared(model, chosen)
    for name, module in chosen:
        _check_convertible(name, module, rule)
    for _, module in chosen:
        module.__class__ = _GHL_TYPES[type(module)]
        assert isinstance(module, GHLLayer)
        module.set_rule(rule, gate_at, sums_at)
    _report(candidates, chosen, head, excluded)
    return model


def revert(model: nn.Module) -> nn.Module:
    """Turn every GHL layer of a model back into its torch layer, in place; returns ``model``.

    Raises:
        TypeError: ``model`` is no module.
        ValueError: a layer is attached to a StepGate, which would then find gradients without sums, or
            watched by a Monitor.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    layers = [(name, m) for name, m in model.named_modules() if isinstance(m, GHLLayer)]
    for name, layer in layers:
        if layer._attachment is not None:
            raise ValueError(f"{name!r} is attached to a StepGate; call the gate's remove() first")
        if layer._probe is not None:
            raise ValueError(f"{name!r} is watched by a Monitor; call the monitor's remove() first")
    for _, layer in layers:
        torch_type = _TORCH_TYPES.get(type(layer))
        if torch_type is not None:
            del layer.rule, layer.gate_at, layer.sums_at
            layer.__class__ = torch_type  # type: ignore[assignment]
    return model


def _is_candidate(module: nn.Module) -> bool:
    """An exact torch type, or one that a torch utility made of it, which is refused by name later."""
    if type(module) in _GHL_TYPES:
        return True
    if not isinstance(module, tuple(_GHL_TYPES)) or isinstance(module, GHLLayer):
        return False
    lazy = isinstance(module, nn.modules.lazy.LazyModuleMixin)
    return lazy or parametrize.is_parametrized(module, "weight") or _is_sharded(module)


def _is_sharded(module: nn.Module) -> bool:
    if not torch.distributed.is_available():
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(module._parameters.get("weight"), DTensor)


def _excluded(model: nn.Module, exclude: Exclusion | Iterable[Exclusion]) -> set[nn.Module]:
    items = [exclude] if isinstance(exclude, str | nn.Module | type) else list(exclude)
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
                f"cannot convert {name!r}: its weight is shared ({', '.join(sharing)}), and a sum of gated "
                "gradients is not the rule; untie the weights or exclude these modules"
            )


def _check_convertible(name: str, module: nn.Module, rule: HebbianRule) -> None:
    def refuse(what: str, remedy: str) -> ValueError:
        return ValueError(f"cannot convert {name!r}: {what}; {remedy}, or exclude it")

    weight = module._parameters.get("weight")
    if isinstance(module, nn.modules.lazy.LazyModuleMixin) or isinstance(
        weight, nn.parameter.UninitializedParameter
    ):
        raise refuse("it is lazy and has no weight yet", "run one forward pass before converting")
    if parametrize.is_parametrized(module, "weight"):
        remedy = "remove it with torch.nn.utils.parametrize.remove_parametrizations first"
        raise refuse("its weight is parametrized (weight_norm, spectral_norm or the like)", remedy)
    if weight is None:
        remedy = "remove it (remove_weight_norm, remove_spectral_norm, torch.nn.utils.prune.remove) first"
        raise refuse(
            "its weight is no parameter but computed by weight_norm, spectral_norm or pruning", remedy
        )
    if _is_sharded(module):
        raise refuse("its weight is sharded (a DTensor)", "convert before fully_shard")
    if not weight.is_leaf:
        raise refuse("its weight is not a leaf", "assign it a torch.nn.Parameter")
    if not weight.is_floating_point():
        raise refuse(f"its weight is {weight.dtype}", "use a real floating-point dtype")
    try:
        rule.winners_of(weight.shape[0])
    except ValueError as error:
        raise refuse(str(error), "use fewer winners or a fraction") from None


def _report(
    candidates: list[tuple[str, nn.Module]],
    chosen: list[tuple[str, nn.Module]],
    head: nn.Module | None,
    excluded: set[nn.Module],
) -> None:
    converted = [name for name, _ in chosen]
    kept = [name for name, m in candidates if name not in converted]
    logger.info(
        "converted %d layers (%s), kept %s", len(converted), ", ".join(converted), ", ".join(kept) or "none"
    )
    if not chosen:
        warnings.warn("convert found no layer to convert", stacklevel=3)
        return
    last_name, last = candidates[-1]
    if last is not head and last not in excluded:
        warnings.warn(
            f"the last convertible module is {last_name!r}, which was converted: if it is the output layer, "
            "exclude it, because an output layer has to follow its targets",
            stacklevel=3,
        )
