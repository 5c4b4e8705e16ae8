"""Monitor: what the layers of a model are doing, kept on the device and read when asked."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from os import PathLike
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from ghl_kernels import _check
from ghl_kernels._geometry import to_int
from ghl_kernels._probe import Probe
from ghl_kernels._processes import is_sharded
from ghl_kernels.nn import GHLLayer, named_layers

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.table import Table

Counts = npt.NDArray[np.int64]


@dataclasses.dataclass(frozen=True)
class LayerReading:
    """One layer's statistics over the steps observed since the last reset; N units.

    Attributes:
        wins: (N,) int64, positions at which the unit was among the winners (rules in which all units
            compete: at which it had the largest response).
        largest: (N,) int64, positions at which it had the largest response; ties go to the lowest unit.
        invalid: positions that count nowhere, because a response was NaN.
        row_norms: (N,) float64, Euclidean norm of each unit's weights as they are now.
        gates: how often the rule was seen being applied; the four below are about these.
        agreeing: weights, added up over gates, that the local rule and the task move the same way:
            sign(-H) = sign(G). Weights where H or G is 0 are neither agreeing nor opposed.
        opposed: weights that they move opposite ways.
        delta_max: max |H| before it is normalized, mean over gates.
        delta_ratio: Euclidean norm of the normalized H as a multiple of W's, mean over gates: the relative
            size of an update at a learning rate of 1.
    """

    wins: Counts
    largest: Counts
    invalid: int
    row_norms: npt.NDArray[np.float64]
    gates: int
    agreeing: int
    opposed: int
    delta_max: float
    delta_ratio: float

    @property
    def positions(self) -> int:
        """Positions counted."""
        return int(self.largest.sum())

    @property
    def entropy(self) -> float:
        """Entropy of the wins in bits, -sum p log2 p with p = wins / sum(wins); NaN before any win."""
        total = self.wins.sum()
        if total == 0:
            return math.nan
        p = self.wins[self.wins > 0] / total
        return float(-(p * np.log2(p)).sum()) + 0.0  # one unit that wins everything: 0, not -0

    @property
    def evenness(self) -> float:
        """Entropy as a share of log2(N): 1 where all units win equally often, 0 where one wins always.

        NaN before any win.
        """
        if len(self.wins) > 1:
            return self.entropy / math.log2(len(self.wins))
        return 1.0 if self.wins.any() else math.nan

    @property
    def dead(self) -> npt.NDArray[np.intp]:
        """The units that won at no position counted, ascending: all of them before any was."""
        return np.flatnonzero(self.wins == 0)

    @property
    def dead_share(self) -> float:
        """Dead units as a share of all: 0 of a layer without units, else NaN before any position."""
        if not len(self.wins):
            return 0.0
        return len(self.dead) / len(self.wins) if self.positions else math.nan

    @property
    def agreement(self) -> float:
        """agreeing / (agreeing + opposed); NaN before any, or where the rule has no gate."""
        directed = self.agreeing + self.opposed
        return self.agreeing / directed if directed else math.nan


Readings = Mapping[str, LayerReading]


class Monitor:
    """Statistics of every GHL layer of a model, gathered as it trains.

        with ghl.Monitor(model) as monitor:
            train(model)
            rich.print(monitor.table())

    Sums stay on the layer's device: a training step neither waits for them nor changes by a bit. Only
    :meth:`read` and what calls it synchronize. Layers in eval mode, frozen or run without grad mode are not
    observed; ``learn_`` always is. A step of a layer lasts until its weight changes, so all passes that a
    step accumulates, and all uses of a layer, are observed together. Sums of H are those of the whole batch
    wherever the rule's are (StepGate and GHLSGD over several processes); winners are this process's own.

    Args:
        model: the model, or a wrapper of it (DistributedDataParallel, torch.compile).
        every: each layer is observed in its first step and every ``every``-th from then on. An observed
            step costs a third to a half more; the default keeps the average below 1%.
        positions: winners are counted at about this many positions of a pass at most, in whole items evenly
            spaced over the batch.

    Under torch.compile the monitor may be made before or after; making or removing it compiles anew. A CUDA
    graph replays what its capture did: capture an observed step and every replay adds to the sums.

    Raises:
        TypeError: ``model`` is no module, ``every`` or ``positions`` no int.
        ValueError: a model without GHL layers, ``every`` or ``positions`` below 1, a layer that another
            Monitor watches, or one whose weight is sharded.
    """

    def __init__(self, model: nn.Module, every: int = 100, *, positions: int = 65536) -> None:
        _check.module(model)
        every, positions = _count("every", every), _count("positions", positions)
        self._layers = named_layers(model)
        if not self._layers:
            raise ValueError("the model has no GHL layer to watch; convert it first")
        for name, layer in self._layers.items():
            shown = repr(_check.label(name))
            if layer._probe is not None:
                raise ValueError(f"{shown} is watched by a Monitor already; call its remove() first")
            if is_sharded(layer.weight):
                raise ValueError(
                    f"the weight of {shown} is sharded: a pass sees all of it and a step some of its rows, "
                    "which a Monitor cannot bring together; watch the model before it is sharded"
                )
        self._probes = {name: Probe(layer, every, positions) for name, layer in self._layers.items()}
        for name, layer in self._layers.items():
            layer._probe = self._probes[name]

    def read(self) -> dict[str, LayerReading]:
        """Each layer's statistics, by its qualified name ("" for the model itself). Waits for the device."""
        return self._readings([probe.sums() for probe in self._probes.values()])

    def reduce(self, group: Any = None) -> dict[str, LayerReading]:
        """As :meth:`read`, with the sums of all processes of the group; every process has to call it.

        This process's own sums stay as they are. Where a StepGate has reduced H and G already, all processes
        hold the same gates, and the sums count each of them once a process.

        Raises:
            RuntimeError: torch.distributed is not initialized.
        """
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            raise RuntimeError("reduce() needs an initialized torch.distributed; use read() in one process")
        sums = [probe.sums() for probe in self._probes.values()]
        for device in dict.fromkeys(part.device for part in sums):
            members = [i for i, part in enumerate(sums) if part.device == device]
            flat = torch.cat([sums[i] for i in members])
            torch.distributed.all_reduce(flat, group=group)
            for i, part in zip(members, flat.split([len(sums[i]) for i in members]), strict=True):
                sums[i] = part
        return self._readings(sums)

    def scalars(self, readings: Readings | None = None) -> dict[str, float]:
        """One flat dict of numbers, ``{layer}/{statistic}``, for TensorBoard or wandb.

        A model that is itself the layer is called ``(model)``, as in the table and the figure.

        Args:
            readings: of :meth:`read` (default) or :meth:`reduce`.

        Statistics: entropy, evenness, dead (share of the units), agreement, delta_max, delta_ratio,
        row_norm_min, row_norm_mean, row_norm_max. One that is not known yet is NaN.

        Raises:
            TypeError: ``readings`` that neither returned.
        """
        readings = self._given(readings)
        return {
            f"{_check.label(name)}/{key}": value
            for name, reading in readings.items()
            for key, value in _scalars(reading).items()
        }

    def table(self, readings: Readings | None = None) -> Table:
        """A rich table, one row a layer, that fits 80 columns; "-" is what is not known yet.

        ``readings`` and errors as for :meth:`scalars`.
        """
        from rich import box
        from rich.table import Table

        out = Table(
            title="GHL layers",
            title_justify="left",
            box=box.SIMPLE_HEAD,
            show_edge=False,
            pad_edge=False,
            collapse_padding=True,
        )
        # what gives way where the terminal is narrow: names, which fold, and ranges, which wrap
        out.add_column("layer", min_width=8, overflow="fold")
        for heading in ("units", "positions", "dead", "even-\nness", "agree-\nment", "max |H|", "|H|/|W|"):
            out.add_column(heading, justify="right", no_wrap=True)
        out.add_column("row norm", justify="right")
        for name, reading in self._given(readings).items():
            out.add_row(_check.label(name), *_cells(reading))
        return out

    def plot(self, path: str | PathLike[str] | None = None, readings: Readings | None = None) -> Figure:
        """A matplotlib figure of all layers; also written to ``path`` (PNG, PDF, SVG by its suffix).

        Args:
            path: where to write the figure, if anywhere.
            readings: as for :meth:`scalars`.

        Raises:
            TypeError: as for :meth:`scalars`.
            ImportError: matplotlib is not installed.
            OSError: the file cannot be written.
            ValueError: a suffix that matplotlib does not know.
        """
        from ghl_kernels._monitor_figure import draw

        figure = draw(self._given(readings))
        if path is not None:
            figure.savefig(path)
        return figure

    def reset(self) -> None:
        """Forget all sums; each layer's next step is observed."""
        for probe in self._probes.values():
            probe.reset()

    def remove(self) -> None:
        """Stop observing; what was gathered can still be read. Does nothing the second time."""
        for name, layer in self._layers.items():
            if layer._probe is self._probes[name]:
                del layer._probe

    def __enter__(self) -> Monitor:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def __repr__(self) -> str:
        return f"Monitor({', '.join(map(_check.label, self._layers))})"

    def __getstate__(self) -> dict[str, Any]:
        raise TypeError("a Monitor belongs to one model and cannot be copied; make a new one")

    def _given(self, readings: Readings | None) -> Readings:
        """The readings, checked; those of now where none are given."""
        if readings is None:
            return self.read()
        is_mapping = isinstance(readings, Mapping)
        if not (is_mapping and all(isinstance(value, LayerReading) for value in readings.values())):
            raise TypeError(f"readings must be what read() or reduce() returned, got {readings!r}")
        return readings

    def _readings(self, sums: list[Tensor]) -> dict[str, LayerReading]:
        return {
            name: _reading(part, _row_norms(layer))
            for (name, layer), part in zip(self._layers.items(), sums, strict=True)
        }


def _reading(sums: Tensor, row_norms: Tensor) -> LayerReading:
    values = sums.cpu().numpy()
    gates, agreeing, opposed, largest_sum, ratio_sum = values[-5:].tolist()
    wins, largest = values[:-5].astype(np.int64).reshape(2, -1)
    return LayerReading(
        wins=wins[:-1],
        largest=largest[:-1],
        invalid=int(largest[-1]),
        row_norms=row_norms.cpu().numpy(),
        gates=int(gates),
        agreeing=int(agreeing),
        opposed=int(opposed),
        delta_max=largest_sum / gates if gates else math.nan,
        delta_ratio=ratio_sum / gates if gates else math.nan,
    )


def _row_norms(layer: GHLLayer) -> Tensor:
    return torch.linalg.vector_norm(layer.weight.detach().flatten(1), dim=1, dtype=torch.float64)


def _scalars(reading: LayerReading) -> dict[str, float]:
    smallest, mean, largest = _norms(reading)
    return {
        "entropy": reading.entropy,
        "evenness": reading.evenness,
        "dead": reading.dead_share,
        "agreement": reading.agreement,
        "delta_max": reading.delta_max,
        "delta_ratio": reading.delta_ratio,
        "row_norm_min": smallest,
        "row_norm_mean": mean,
        "row_norm_max": largest,
    }


def _norms(reading: LayerReading) -> tuple[float, float, float]:
    """Smallest, mean and largest of the row norms; NaN of a layer without units."""
    norms = reading.row_norms
    if not len(norms):
        return math.nan, math.nan, math.nan
    return float(norms.min()), float(norms.mean()), float(norms.max())


def _cells(reading: LayerReading) -> list[str]:
    smallest, _, largest = _norms(reading)
    return [
        str(len(reading.wins)),
        f"{reading.positions:,}",
        "-" if math.isnan(reading.dead_share) else str(len(reading.dead)),
        "-" if math.isnan(reading.evenness) else f"{reading.evenness:.3f}",
        f"{reading.agreement:.1%}" if reading.agreeing + reading.opposed else "-",
        f"{reading.delta_max:.3g}" if reading.gates else "-",
        f"{reading.delta_ratio:.3g}" if reading.gates else "-",
        f"{smallest:.2g} - {largest:.2g}",
    ]


def _count(name: str, value: object) -> int:
    number = to_int(value)
    if number is None:
        raise TypeError(f"{name} must be an int >= 1, got {value!r}")
    if number < 1:
        raise ValueError(f"{name} must be an int >= 1, got {value!r}")
    return number
