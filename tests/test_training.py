"""Whole training loops: every preset learns, in both modes, with the parts that real loops have."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import ghl_kernels as ghl
from ghl_kernels import HebbianRule

GATED = {
    "ghl": HebbianRule.ghl(),
    "ghl, sharp": HebbianRule.ghl(temperature=0.2),
    "kwta": HebbianRule.kwta(0.25),
    "kwta, one": HebbianRule.kwta(1),
}
LOCAL = {
    "softhebb": HebbianRule.softhebb(),
    "hard_wta": HebbianRule.hard_wta(),
    "oja": HebbianRule.oja(),
    "instar": HebbianRule.instar(),
    "hpca": HebbianRule.hpca(),
}
PRESETS = GATED | LOCAL


class Residual(nn.Module):
    """Batch norm, ReLU in place and an addition in place, all on outputs of GHL layers."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(channels)
        self.second = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        out = self.second(F.relu(self.norm(self.first(x)), inplace=True))
        out += x
        return F.relu(out, inplace=True)


def network() -> nn.Sequential:
    """A residual network of x (B, 1, 8, 8) in four classes."""
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1),
        nn.ReLU(inplace=True),
        Residual(8),
        nn.AvgPool2d(2),
        nn.Conv2d(8, 12, 3, groups=2),
        nn.ReLU(inplace=True),
        nn.Flatten(),
        nn.Linear(48, 16),
        nn.ReLU(inplace=True),
        nn.Linear(16, 4),
    )


def images(count: int) -> tuple[Tensor, Tensor]:
    """A bright bar at one of four places in noise."""
    generator = torch.Generator().manual_seed(7)
    target = torch.arange(count) % 4
    x = 0.5 * torch.randn(count, 1, 8, 8, generator=generator)
    for place in range(4):
        x[target == place, :, 2 * place : 2 * place + 2, 1:7] += 1.0
    return x, target


def optimizer_of(name: str, model: nn.Module, lr: float = 0.005) -> torch.optim.Optimizer:
    if name == "SGD":
        return torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    return torch.optim.Adam(model.parameters(), lr=lr)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, epochs: int = 6) -> list[float]:
    """Mean loss of every epoch."""
    losses = []
    loader = DataLoader(
        TensorDataset(*images(96)), batch_size=20, shuffle=True, generator=torch.Generator().manual_seed(3)
    )
    for _ in range(epochs):
        total = 0.0
        for x, target in loader:
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), target)
            loss.backward()
            optimizer.step()
            total += loss.item() / len(loader)
        losses.append(total)
    return losses


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("optimizer", ["SGD", "Adam"])
@pytest.mark.parametrize("gate_at", ["backward", "step"])
@pytest.mark.parametrize("preset", GATED)
def test_presets_with_a_gate_lower_the_loss(preset: str, gate_at: str, optimizer: str) -> None:
    torch.manual_seed(0)
    model = ghl.convert(network(), GATED[preset], gate_at=gate_at)
    chosen = optimizer_of(optimizer, model)
    if gate_at == "step":
        ghl.StepGate(chosen, model)
    losses = train(model, chosen, epochs=5)
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("optimizer", ["SGD", "Adam"])
@pytest.mark.parametrize("gate_at", ["backward", "step"])
@pytest.mark.parametrize("preset", LOCAL)
def test_presets_without_a_gate_run_under_an_optimizer(preset: str, gate_at: str, optimizer: str) -> None:
    """They follow the data, not the loss: every parameter moves, and stays finite."""
    torch.manual_seed(0)
    model = ghl.convert(network(), LOCAL[preset], gate_at=gate_at)
    before = copy.deepcopy(model.state_dict())
    chosen = optimizer_of(optimizer, model, lr=1e-4)
    if gate_at == "step":
        ghl.StepGate(chosen, model)
    assert all(torch.tensor(train(model, chosen, epochs=2)).isfinite())
    for name, p in model.named_parameters():
        assert p.isfinite().all(), name
        assert not torch.equal(p, before[name]), name


@pytest.mark.large
@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("preset", PRESETS)
def test_both_modes_are_one_when_every_step_has_one_pass(preset: str) -> None:
    torch.manual_seed(0)
    start = network()
    results = []
    for gate_at in ("backward", "step"):
        model = ghl.convert(copy.deepcopy(start), PRESETS[preset], gate_at=gate_at)
        optimizer = optimizer_of("SGD", model, lr=1e-3)
        if gate_at == "step":
            ghl.StepGate(optimizer, model)
        train(model, optimizer, epochs=1)
        results.append(list(model.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.large
@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("sums_at", ["forward", "backward"])
def test_training_is_reproducible_bit_for_bit(sums_at: str) -> None:
    runs = []
    for _ in range(2):
        torch.manual_seed(0)
        model = network()
        if sums_at == "backward":
            for m in model.modules():
                if isinstance(m, nn.ReLU):
                    m.inplace = False
            model[2].forward = lambda x, block=model[2]: F.relu(
                x + block.second(F.relu(block.norm(block.first(x))))
            )
        ghl.convert(model, HebbianRule.kwta(0.25), sums_at=sums_at)
        train(model, optimizer_of("SGD", model), epochs=1)
        runs.append(list(model.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("sums_at", ["forward", "backward"])
def test_in_place_consumers_of_the_output(sums_at: str) -> None:
    """Summed in forward they work as before; summed in backward autograd says what is wrong."""
    torch.manual_seed(0)
    model = ghl.convert(network(), sums_at=sums_at)
    x, target = images(4)
    loss = F.cross_entropy(model(x), target)
    if sums_at == "forward":
        loss.backward()
        assert all(p.grad.isfinite().all() for p in model.parameters())
    else:
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


@pytest.mark.parametrize("preset", ["ghl", "kwta", "softhebb", "hard_wta", "instar"])
def test_local_learning_layer_by_layer(preset: str) -> None:
    """learn_ alone, then a linear read-out: better than the loss of a constant answer."""
    torch.manual_seed(0)
    features = nn.Sequential(
        ghl.GHLConv2d(1, 16, 4, rule=PRESETS[preset]), nn.ReLU(), nn.AvgPool2d(2), nn.Flatten()
    )
    x, target = images(96)
    before = features[0].weight.detach().clone()
    for rows in range(0, 96, 24):
        features[0].learn_(x[rows : rows + 24], lr=0.02)
    assert not torch.equal(features[0].weight, before)
    assert features[0].weight.isfinite().all()
    with torch.no_grad():
        z = features(x)
    head = nn.Linear(z.shape[1], 4)
    optimizer = torch.optim.Adam(head.parameters(), lr=0.02)
    for _ in range(60):
        optimizer.zero_grad()
        loss = F.cross_entropy(head(z), target)
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.5 * torch.tensor(4.0).log().item()


def test_transformer_block_trains() -> None:
    """Linear layers on (B, T, D) inside a block of torch's own."""
    torch.manual_seed(0)
    block = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    model = nn.Sequential(block, nn.Flatten(), nn.Linear(32, 4))
    ghl.convert(model)
    assert isinstance(block.linear1, ghl.GHLLinear)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.003)
    x, target = torch.randn(16, 4, 8), torch.arange(16) % 4
    losses = []
    for _ in range(25):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), target)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    assert model.eval()(x).shape == (16, 4)


def test_workers_of_a_data_loader_do_not_disturb_the_kernels() -> None:
    """Forked workers inherit the thread pool; batches come out, and training goes on."""
    torch.manual_seed(0)
    model = ghl.convert(network(), HebbianRule.kwta(0.25))
    optimizer = optimizer_of("SGD", model)
    x, target = images(24)
    F.cross_entropy(model(x), target).backward()  # the kernels' threads exist before the fork
    loader: Any = DataLoader(TensorDataset(x, target), batch_size=12, num_workers=1)
    for x, target in loader:
        optimizer.zero_grad()
        F.cross_entropy(model(x), target).backward()
        optimizer.step()
    assert all(p.isfinite().all() for p in model.parameters())
