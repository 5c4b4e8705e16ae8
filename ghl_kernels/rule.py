"""The learning rule: a validated, immutable description of one competitive Hebbian update."""

from __future__ import annotations

import dataclasses
import math
import numbers
from typing import Any, Literal, NamedTuple, cast, get_args

from ghl_kernels._geometry import to_int

Activity = Literal["softmax", "linear", "relu", "binary"]
Losers = Literal["silent", "anti"]
Decay = Literal["oja", "instar", "none", "subspace", "sanger"]
Normalize = Literal["layer", "filter", "mean", "none"]
Gate = Literal["sign", "none"]

_CHOICES: dict[str, tuple[str, ...]] = {
    "activity": get_args(Activity),
    "losers": get_args(Losers),
    "decay": get_args(Decay),
    "normalize": get_args(Normalize),
    "gate": get_args(Gate),
}


# Kernels compute in float32, where larger temperatures are infinite and smaller ones 0 on some devices.
_LEAST_TEMPERATURE, _LARGEST_TEMPERATURE = 2.0**-126, (2.0 - 2.0**-23) * 2.0**127


class Competition(NamedTuple):
    """The part of a rule that maps the responses u of N units at one position to activities y.

    ``winners`` is resolved for N units: 0 means that all of them compete.
    """

    activity: str
    winners: int
    temperature: float
    anti: bool


@dataclasses.dataclass(frozen=True)
class HebbianRule:
    r"""A competitive Hebbian rule, gated by the sign of the task gradient.

    With patches :math:`x_p`, responses :math:`u_p = W x_p + b` and positions p = 1..P of one layer:

    .. math::
        y_p &= c(u_p), \quad A = \sum_p y_p x_p^T, \quad H = A - R, \quad
            H \leftarrow H / (scale + 10^{-30}) \\
        G &= \sum_p (\partial L / \partial u_p) x_p^T, \quad weight.grad = |H| \, sign(G)

    Args:
        activity: activity of a unit that may learn. ``"softmax"``: softmax of u / temperature over the
            winners; ``"linear"``: u; ``"relu"``: max(u, 0); ``"binary"``: 1.
        winners: ``None``: all units compete. An int k: the k largest u at a position keep their
            activity (ties go to the lowest index), all others are 0. A fraction f in (0, 1): k =
            max(1, ceil(f * N)); 1.0 is stored as ``None``.
        temperature: of the softmax, > 0, a normal float32 number (about 1.18e-38 to 3.40e38), which is what
            kernels compute with.
        losers: ``"silent"``, or ``"anti"``: the activity of every unit but the single largest is negated.
        decay: R. ``"oja"``: :math:`R_k = \langle W_k, A_k \rangle W_k`; ``"instar"``:
            :math:`R_k = (\sum_p y_{pk}) W_k`; ``"none"``: 0; ``"subspace"``:
            :math:`R = (\sum_p y_p y_p^T) W`; ``"sanger"``: its lower triangle, with the diagonal, times W.
        normalize: scale. ``"layer"``: max |H| over the layer; ``"filter"``: over each row; ``"mean"``:
            H / max(P, 1); ``"none"``: no scaling.
        gate: ``"sign"`` as above, or ``"none"``: weight.grad = -H and G is not computed.

    Presets set these fields; all others can be given to them as well, as in ``kwta(4, normalize="filter")``:

    ========================== ==============================================================
    preset                     sets
    ========================== ==============================================================
    ``ghl(temperature)``       temperature
    ``kwta(k)``                activity="linear", winners=k
    ``softhebb(temperature)``  temperature, losers="anti", gate="none"
    ``hard_wta()``             activity="binary", winners=1, gate="none"
    ``oja()``                  activity="linear", normalize="mean", gate="none"
    ``instar()``               decay="instar", normalize="mean", gate="none"
    ``hpca()``                 activity="relu", decay="sanger", normalize="mean", gate="none"
    ========================== ==============================================================

    With ``normalize="layer"`` max |H| is 1: the learning rate of plain SGD is the largest change of a weight
    in a step, whatever the data and the batch size. Choose it as a small part of the weights' own size.

    Raises:
        TypeError: a field of the wrong type (``winners`` a bool, say), or one that the preset sets itself.
        ValueError: a value outside the above, NaN anywhere, or a combination that means nothing:
            anti with one winner, binary without winners, a temperature other than 1 without softmax.

    Source: Hua et al., "Hebbian Learning with Global Direction", ICASSP 2026 (arXiv 2601.21367).
    """

    activity: Activity = "softmax"
    winners: int | float | None = None
    temperature: float = 1.0
    losers: Losers = "silent"
    decay: Decay = "oja"
    normalize: Normalize = "layer"
    gate: Gate = "sign"

    def __post_init__(self) -> None:
        for field, allowed in _CHOICES.items():
            value = getattr(self, field)
            if not isinstance(value, str):
                raise TypeError(f"{field} must be one of {allowed}, got {value!r}")
            if value not in allowed:
                raise ValueError(f"{field} must be one of {allowed}, got {value!r}")
        object.__setattr__(self, "winners", _check_winners(self.winners))
        object.__setattr__(self, "temperature", _check_temperature(self.temperature))
        if self.losers == "anti" and self.winners == 1:
            raise ValueError("losers='anti' with winners=1 leaves no loser to negate; use losers='silent'")
        if self.activity == "binary" and self.winners is None:
            raise ValueError("activity='binary' needs winners: without a competition every unit would be 1")
        if self.temperature != 1.0 and self.activity != "softmax":
            raise ValueError(
                f"temperature={self.temperature} has no effect on activity={self.activity!r}; "
                "only softmax has one"
            )

    def winners_of(self, units: int) -> int:
        """Number of winners among ``units`` units, 0 when all compete.

        Raises:
            TypeError: ``units`` is no int.
            ValueError: fewer than 0 units, more winners than units, or "anti" where a fraction leaves a
                single winner.
        """
        if type(units) is not int and to_int(units) is None:
            raise TypeError(f"units must be an int >= 0, got {units!r}")
        if units < 0:
            raise ValueError(f"units must be an int >= 0, got {units!r}")
        if self.winners is None:
            return 0
        if isinstance(self.winners, int):
            if self.winners > units:
                raise ValueError(
                    f"winners must be at most the number of units, got {self.winners} of {units}"
                )
            return self.winners
        k = max(1, math.ceil(self.winners * units))
        if self.losers == "anti" and k == 1:
            raise ValueError(
                f"winners={self.winners} of {units} units is one winner, which losers='anti' excludes"
            )
        return k

    def competition(self, units: int) -> Competition:
        """The competition among ``units`` units."""
        return Competition(self.activity, self.winners_of(units), self.temperature, self.losers == "anti")

    def __str__(self) -> str:
        shown = [
            f"{field.name}={getattr(self, field.name)!r}"
            for field in dataclasses.fields(self)
            if field.name in ("activity", "winners") or getattr(self, field.name) != field.default
        ]
        return f"HebbianRule({', '.join(shown)})"

    @classmethod
    def ghl(cls, temperature: float = 1.0, **fields: Any) -> HebbianRule:
        """Global-guided Hebbian learning: softmax competition, Oja decay, sign gate (arXiv 2601.21367).

        The authors' ``t_invert`` is 1 / temperature.
        """
        return cls(temperature=temperature, **fields)

    @classmethod
    def kwta(cls, k: int | float, **fields: Any) -> HebbianRule:
        """GHL with k winners that keep their responses (k-winner-take-all), Oja decay, sign gate."""
        return cls._preset("kwta", fields, activity="linear", winners=k)

    @classmethod
    def softhebb(cls, temperature: float = 1.0, **fields: Any) -> HebbianRule:
        """SoftHebb: softmax with anti-Hebbian losers, Oja decay, purely local.

        Source: Journé et al., "Hebbian Deep Learning Without Feedback", ICLR 2023.
        """
        return cls._preset("softhebb", fields, temperature=temperature, losers="anti", gate="none")

    @classmethod
    def hard_wta(cls, **fields: Any) -> HebbianRule:
        """Hard winner-take-all: the largest unit has activity 1; Oja decay, purely local."""
        return cls._preset("hard_wta", fields, activity="binary", winners=1, gate="none")

    @classmethod
    def oja(cls, **fields: Any) -> HebbianRule:
        """Oja's rule averaged over positions, every unit on its own, purely local.

        Source: Oja, "A simplified neuron model as a principal component analyzer", 1982.
        """
        return cls._preset("oja", fields, activity="linear", normalize="mean", gate="none")

    @classmethod
    def instar(cls, **fields: Any) -> HebbianRule:
        """Soft competitive learning, sum_p y_pk (x_p - W_k) averaged over positions, purely local."""
        return cls._preset("instar", fields, decay="instar", normalize="mean", gate="none")

    @classmethod
    def hpca(cls, **fields: Any) -> HebbianRule:
        """Hebbian PCA: Sanger's rule on rectified responses, averaged over positions, purely local.

        Source: Sanger, "Optimal unsupervised learning in a single-layer linear feedforward neural
        network", 1989; the rectifier after Lagani et al., "FastHebb", 2022.
        """
        own = {"activity": "relu", "decay": "sanger", "normalize": "mean", "gate": "none"}
        return cls._preset("hpca", fields, **own)

    @classmethod
    def _preset(cls, name: str, fields: dict[str, Any], **own: Any) -> HebbianRule:
        taken = [field for field in own if field in fields]
        if taken:
            raise TypeError(
                f"HebbianRule.{name} sets {', '.join(own)} itself, got {taken[0]}={fields[taken[0]]!r}; "
                "dataclasses.replace changes a field of a rule"
            )
        return cls(**own, **fields)


def _check_winners(winners: object) -> int | float | None:
    if winners is None:
        return None
    if isinstance(winners, bool) or not isinstance(winners, numbers.Real):
        raise TypeError(f"winners must be None, an int >= 1 or a fraction in (0, 1], got {winners!r}")
    if isinstance(winners, numbers.Integral):
        if winners < 1:
            raise ValueError(f"winners must be None, an int >= 1 or a fraction in (0, 1], got {winners!r}")
        return int(winners)
    fraction = float(winners)
    if not 0.0 < fraction <= 1.0:
        raise ValueError(f"winners must be None, an int >= 1 or a fraction in (0, 1], got {winners!r}")
    return None if fraction == 1.0 else fraction


def _check_temperature(temperature: object) -> float:
    if isinstance(temperature, bool) or not isinstance(temperature, numbers.Real):
        raise TypeError(f"temperature must be a finite number > 0, got {temperature!r}")
    value = float(cast(float, temperature))
    if not (math.isfinite(value) and value > 0.0):
        raise ValueError(f"temperature must be a finite number > 0, got {temperature!r}")
    if not _LEAST_TEMPERATURE <= value <= _LARGEST_TEMPERATURE:
        raise ValueError(
            "temperature must be a normal float32 number, in "
            f"[{_LEAST_TEMPERATURE}, {_LARGEST_TEMPERATURE}], got {temperature!r}"
        )
    return value
