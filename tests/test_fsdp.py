"""StepGate over FSDP2: sharded weights in two processes are one process on the whole batch."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import processes
import pytest
import torch
from reference_model import small_batches, small_network
from torch import Tensor, nn
from torch.nn import functional as F

import ghl_kernels as ghl
from ghl_kernels import HebbianRule

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available(), reason="torch was built without distributed"
)

STEPS = 5
RULES = {
    "softmax": HebbianRule.ghl(),
    "kwta": HebbianRule.kwta(1),
    "instar, filter": HebbianRule(decay="instar", normalize="filter"),
    "none, mean": HebbianRule(decay="none", normalize="mean"),
    "no gate": HebbianRule.softhebb(),
}
# Passes that a step accumulates; whether only the last is reduced; set_to_none of zero_grad.
MODES = {
    "plain": (1, False, True),
    "zeroed in place": (1, False, False),
    "accumulated": (3, False, True),
    "accumulated, zeroed in place": (3, False, False),
    "no sync": (3, True, True),
    "no sync, zeroed in place": (3, True, False),
}
CASES = [
    (rule, mode)
    for rule, mode in itertools.product(RULES, MODES)
    if rule == "softmax" or mode == "plain" or (rule == "no gate" and "in place" in mode)
]


def _network(inplace: bool = True) -> nn.Sequential:
    """Without batch norm, whose statistics are each process's own; the head's 5 rows are 3 and 2."""
    torch.manual_seed(0)
    return nn.Sequential(
        *(m for m in small_network(inplace=inplace) if not isinstance(m, nn.BatchNorm2d))
    ).double()


def _sharded(model: nn.Sequential, mesh: Any = None, **options: Any) -> Any:
    """Every layer and then the whole, as large models are sharded."""
    from torch.distributed.fsdp import fully_shard

    for layer in model:
        if next(layer.parameters(), None) is not None:
            fully_shard(layer, mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


def _whole(model: nn.Module) -> list[Tensor]:
    return [p.full_tensor() if hasattr(p, "full_tensor") else p.detach().clone() for p in model.parameters()]


def _train(model: Any, mode: str, rank: int | None, *, moves: bool = False) -> list[Tensor]:
    """Parameters after STEPS steps: one rank's share of every batch, or (None) the whole.

    ``moves``: after every pass the model goes to where it is, for which torch swaps its tensors.
    """
    passes, no_sync, set_to_none = MODES[mode]
    world = torch.distributed.get_world_size() if rank is not None else 1
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    ghl.StepGate(optimizer, model)
    for step in range(STEPS):
        for index, (x, target) in enumerate(small_batches(*[8] * passes, seed=step)):
            if rank is not None:
                model.set_requires_gradient_sync(not no_sync or index == passes - 1)
            F.cross_entropy(model(x[rank or 0 :: world]), target[rank or 0 :: world]).backward()
            if moves:
                model.to("cpu")
        optimizer.step()
        optimizer.zero_grad(set_to_none)
    return _whole(model)


def _rank(rank: int) -> dict[str, Any]:
    """Everything that two processes do, in one start of them."""
    found: dict[str, Any] = {}
    for rule, mode in CASES:
        model = _sharded(ghl.convert(_network(), RULES[rule], exclude=[], gate_at="step"))
        found[f"{rule}/{mode}"] = _train(model, mode, rank)
    # a layer that is compiled by itself may keep its output for backward
    model = _sharded(ghl.convert(_network(inplace=False), RULES["softmax"], exclude=[], gate_at="step"))
    for layer in model:
        layer.compile(backend="aot_eager")
    found["compiled layers"] = _train(model, "no sync", rank)
    model = _sharded(ghl.convert(_network(), RULES["softmax"], exclude=[], gate_at="step"))
    found["moved"] = _train(model, "accumulated", rank, moves=True)
    found["dead rows"] = _dead_rows(rank)
    found["zero gradient"] = {case: _zero_gradient(rank, *case) for case in ZERO}
    found["more processes than rows"] = _one_row(rank)
    found["mixed precision"] = _mixed_precision(rank)
    found["a bad sum"] = _bad_sum(rank)
    found["state dict"] = _state_dict()
    found["refused"] = {case: _message(refused) for case, refused in REFUSED.items()}
    found["unreduced"] = _message_for_unreduced_pass(rank)
    found["changed weight"] = _message_for_changed_weight()
    found["eval mode"] = [_message_for_pass_in_eval_mode(rank, *case) for case in EVAL]
    found["zeroed in place"] = _message_for_zeroing_in_place(rank)
    found["not reduced"] = _message_for_pass_that_is_not_reduced(rank)
    found["replaced"] = _message_for_replaced_weight(rank)
    found["moved by NaN"] = {case: _discarded_bad_sum(rank, *case) for case in DISCARDED}
    found["moved by nothing"] = {case: _step_of_no_pass(rank, *case) for case in NOTHING}
    return found


def _dead_rows(rank: int | None) -> list[Tensor]:
    """Half of the rows, which one process holds, have no gradient; passes are accumulated nevertheless."""
    torch.manual_seed(0)
    layer = ghl.GHLLinear(6, 4, bias=False, gate_at="step", dtype=torch.float64)
    model: Any = nn.Sequential(layer)
    if rank is not None:
        model = _sharded(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    ghl.StepGate(optimizer, model)
    for i in range(3):
        x = torch.randn(8, 6, generator=torch.Generator().manual_seed(i), dtype=torch.float64)
        share = x if rank is None else x[rank::2]
        model(share)[:, :2].square().mean().backward()
    optimizer.step()
    return _whole(model)


# The loss weight of every pass of a step, and whether each of them is reduced.
ZERO = [(weights, True) for weights in ((0, 1), (1, 0), (1, 0, 1), (0, 0, 1))] + [
    ((0, 1), False),
    ((1, 0), False),
]


def _zero_gradient(rank: int | None, weights: tuple[int, ...], reduced: bool) -> list[Tensor]:
    """Some passes of a step have no gradient, in two steps that are zeroed in place."""
    torch.manual_seed(0)
    model: Any = nn.Sequential(ghl.GHLLinear(6, 4, bias=False, gate_at="step", dtype=torch.float64))
    if rank is not None:
        model = _sharded(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    ghl.StepGate(optimizer, model)
    for step in range(3):
        x = torch.randn(
            len(weights), 8, 6, generator=torch.Generator().manual_seed(step), dtype=torch.float64
        )
        if rank is None:  # in one pass, in which no layer's gradient is 0
            (torch.tensor(weights).view(-1, 1, 1) * model(x).square()).mean((1, 2)).sum().backward()
        else:
            for i, weight in enumerate(weights):
                model.set_requires_gradient_sync(reduced or i == len(weights) - 1)
                (weight * model(x[i, rank::2]).square().mean()).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
    return _whole(model)


def _one_row(rank: int | None) -> list[Tensor]:
    """A layer of one unit: the second process holds none of it."""
    torch.manual_seed(0)
    rule = HebbianRule(activity="linear")
    model: Any = nn.Sequential(ghl.GHLLinear(6, 1, rule=rule, gate_at="step", dtype=torch.float64))
    if rank is not None:
        model = _sharded(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    ghl.StepGate(optimizer, model)
    x = torch.randn(8, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    model(x if rank is None else x[rank::2]).square().mean().backward()
    optimizer.step()
    return _whole(model)


def _mixed_precision(rank: int) -> dict[str, Any]:
    """bfloat16 weights in a pass, float32 gradients, sums and weights at the step."""
    from torch.distributed.fsdp import MixedPrecisionPolicy

    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    model = ghl.convert(_network().float(), gate_at="step")
    before = model[2].weight.detach().clone()
    model = _sharded(model, mp_policy=policy)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    ghl.StepGate(optimizer, model)
    for i, (x, target) in enumerate(small_batches(8, 8, dtype=torch.float32)):
        model.set_requires_gradient_sync(i == 1)
        F.cross_entropy(model(x[rank::2]).float(), target[rank::2]).backward()
    optimizer.step()
    weight = model[2].weight.full_tensor()
    return {"dtype": weight.dtype, "largest": ((weight - before).abs().max() / 0.05).item()}


def _bad_sum(rank: int) -> bool:
    """An inf in one process's share: no process steps on a finite gradient."""
    model = _sharded(nn.Sequential(ghl.GHLLinear(6, 4, bias=False, gate_at="step")))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    ghl.StepGate(optimizer, model)
    x = torch.randn(4, 6)
    if rank == 0:
        x[0, 0] = torch.inf
    model(x).square().mean().backward()
    optimizer.step()
    return bool(model[0].weight.to_local().isnan().all())


def _state_dict() -> bool:
    """The names and, gathered, the values of the torch model."""
    plain = _network()
    model = _sharded(ghl.convert(_network(), gate_at="step"))
    ours = {name: t.full_tensor() for name, t in model.state_dict().items()}
    return list(ours) == list(plain.state_dict()) and all(
        torch.equal(t, plain.state_dict()[name]) for name, t in ours.items()
    )


def _step_gate(model: nn.Module, **options: Any) -> None:
    ghl.StepGate(torch.optim.SGD(model.parameters(), lr=0.1), model, **options)


def _columns() -> None:
    from torch.distributed.tensor import Shard

    model = nn.Sequential(ghl.GHLLinear(6, 4, bias=False, gate_at="step"))
    _step_gate(_sharded(model, shard_placement_fn=lambda _: Shard(1)))


def _half_sharded() -> None:
    from torch.distributed.fsdp import fully_shard

    model = ghl.convert(_network(), gate_at="step")
    fully_shard(model[0])
    _step_gate(model)


def _mixing(decay: Any) -> None:
    rule = HebbianRule(activity="linear", decay=decay)
    _step_gate(_sharded(ghl.convert(_network(), rule, gate_at="step")))


REFUSED = {
    "the weight of '0' is sharded": lambda: ghl.Monitor(_sharded(ghl.convert(_network(), gate_at="step"))),
    "must be sharded by rows": _columns,
    "over one device mesh": _half_sharded,
    "'subspace' of '0' mixes all rows": lambda: _mixing("subspace"),
    "'sanger' of '0' mixes all rows": lambda: _mixing("sanger"),
    "leave out process_group": lambda: _step_gate(
        _sharded(ghl.convert(_network(), gate_at="step")), process_group=torch.distributed.group.WORLD
    ),
    "GHLSGD takes no sharded weights": lambda: ghl.GHLSGD(
        _sharded(ghl.convert(_network(), gate_at="step")), lr=0.1
    ),
}


def _message(refused: Any) -> str:
    with pytest.raises(ValueError, match=r"\w") as error:
        refused()
    return str(error.value)


def _message_for_unreduced_pass(rank: int) -> str:
    """A reduced pass, one that is not, and then the gradients are zeroed: FSDP still holds the second's."""
    model = _sharded(ghl.convert(_network(), gate_at="step"))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ghl.StepGate(optimizer, model)
    for sync, (x, target) in zip((True, False), small_batches(4, 4), strict=True):
        model.set_requires_gradient_sync(sync)
        F.cross_entropy(model(x[rank::2]), target[rank::2]).backward()
    optimizer.zero_grad()
    with pytest.raises(RuntimeError) as error:
        optimizer.step()
    return str(error.value)


def _message_for_changed_weight() -> str:
    model = _sharded(ghl.convert(_network(), gate_at="step"))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ghl.StepGate(optimizer, model)
    ((x, target),) = small_batches(4)
    F.cross_entropy(model(x), target).backward()
    with torch.no_grad():
        model[0].weight.mul_(2)
    with pytest.raises(RuntimeError) as error:
        optimizer.step()
    return str(error.value)


def _attached(rule: str = "softmax") -> tuple[Any, torch.optim.Optimizer]:
    model = _sharded(ghl.convert(_network(), RULES[rule], gate_at="step"))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ghl.StepGate(optimizer, model)
    return model, optimizer


def _pass(model: Any, rank: int, *, seed: int, sync: bool = True) -> None:
    ((x, target),) = small_batches(4, seed=seed)
    model.set_requires_gradient_sync(sync)
    F.cross_entropy(model(x[rank::2]), target[rank::2]).backward()


def _refusal(optimizer: torch.optim.Optimizer) -> str:
    with pytest.raises(RuntimeError) as error:
        optimizer.step()
    return str(error.value)


# Whether the pass in eval mode comes first, whether the first is reduced, whether they come after a step. Not
# (True, False, False): nothing counts gradients of a weight that no pass in training mode has gathered yet.
EVAL = list(itertools.product((True, False), (True, False), (True, False)))
EVAL.remove((True, False, False))


def _message_for_pass_in_eval_mode(rank: int, is_first: bool, sync: bool, is_later: bool) -> str:
    model, optimizer = _attached()
    if is_later:
        _pass(model, rank, seed=0)
        optimizer.step()
        optimizer.zero_grad()
    model.train(not is_first)
    _pass(model, rank, seed=1, sync=sync)
    model.train(is_first)
    _pass(model, rank, seed=2)
    return _refusal(optimizer)


def _message_for_zeroing_in_place(rank: int) -> str:
    """While a pass waits for its reduction."""
    model, optimizer = _attached()
    _pass(model, rank, seed=0)
    _pass(model, rank, seed=1, sync=False)
    optimizer.zero_grad(set_to_none=False)
    _pass(model, rank, seed=2)
    return _refusal(optimizer)


def _message_for_pass_that_is_not_reduced(rank: int) -> str:
    model, optimizer = _attached()
    _pass(model, rank, seed=0)
    _pass(model, rank, seed=1, sync=False)
    message = _refusal(optimizer)
    _pass(model, rank, seed=2)
    optimizer.step()
    return message


def _message_for_replaced_weight(rank: int) -> str:
    """The old parameter's shape is that of the new one, and FSDP gathers the new one."""
    model, optimizer = _attached()
    _pass(model, rank, seed=0)
    optimizer.step()
    model.load_state_dict(copy.deepcopy(model.state_dict()), assign=True)
    with pytest.raises(RuntimeError) as error:
        _pass(model, rank, seed=1)
    return str(error.value)


class Branches(nn.Module):
    """Of which a pass takes one."""

    def __init__(self, rule: str) -> None:
        super().__init__()
        self.a, self.b = (ghl.GHLLinear(6, 4, rule=RULES[rule], gate_at="step") for _ in range(2))

    def forward(self, name: str, x: Tensor) -> Tensor:
        return self.get_submodule(name)(x)


DISCARDED = list(itertools.product(RULES, (True, False)))


def _discarded_bad_sum(rank: int, rule: str, set_to_none: bool) -> bool:
    """Whether a step moves a layer whose only pass, with a NaN in one process's share, was zeroed."""
    from torch.distributed.fsdp import fully_shard

    model: Any = Branches(rule)
    for part in (model.a, model.b, model):
        fully_shard(part)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    ghl.StepGate(optimizer, model)
    x = torch.randn(4, 6)
    model("a", x / (0.0 if rank == 0 else 1.0)).square().mean().backward()
    optimizer.zero_grad(set_to_none)
    model("b", x).square().mean().backward()
    before = _whole(model.a)
    optimizer.step()
    return not all(torch.equal(a, b) for a, b in zip(before, _whole(model.a), strict=True))


NOTHING = list(itertools.product(("softmax", "no gate"), (True, False), (True, False)))


def _step_of_no_pass(rank: int, rule: str, is_later: bool, set_to_none: bool) -> bool:
    """Whether a step moves anything when all passes since the last one were zeroed."""
    model, optimizer = _attached(rule)
    _pass(model, rank, seed=0)
    if is_later:
        optimizer.step()
    optimizer.zero_grad(set_to_none)
    before = _whole(model)
    optimizer.step()
    return not all(torch.equal(a, b) for a, b in zip(before, _whole(model), strict=True))


@pytest.fixture
def alone() -> Iterator[None]:
    """A process group of this process."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of the two processes found."""
    return processes.run(_rank, 2, tmp_path_factory.mktemp("ranks"))


def _assert_one(found: list[list[Tensor]], alone: list[Tensor]) -> None:
    for replica in found:
        for ours, whole in zip(replica, alone, strict=True):
            torch.testing.assert_close(ours, whole, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize(("rule", "mode"), CASES)
def test_shards_are_one_process_on_the_whole_batch(ranks: list[dict[str, Any]], rule: str, mode: str) -> None:
    alone = _train(ghl.convert(_network(), RULES[rule], exclude=[], gate_at="step"), mode, None)
    _assert_one([found[f"{rule}/{mode}"] for found in ranks], alone)


def test_compiled_layers(ranks: list[dict[str, Any]]) -> None:
    alone = _train(ghl.convert(_network(), RULES["softmax"], exclude=[], gate_at="step"), "no sync", None)
    _assert_one([found["compiled layers"] for found in ranks], alone)


def test_moving_the_model_keeps_its_gradients(ranks: list[dict[str, Any]]) -> None:
    alone = _train(ghl.convert(_network(), RULES["softmax"], exclude=[], gate_at="step"), "accumulated", None)
    _assert_one([found["moved"] for found in ranks], alone)


def test_rows_without_a_gradient_do_not_end_an_accumulation(ranks: list[dict[str, Any]]) -> None:
    _assert_one([found["dead rows"] for found in ranks], _dead_rows(None))


@pytest.mark.parametrize("case", ZERO)
def test_pass_whose_gradient_is_zero_keeps_its_sums(
    ranks: list[dict[str, Any]], case: tuple[tuple[int, ...], bool]
) -> None:
    _assert_one([found["zero gradient"][case] for found in ranks], _zero_gradient(None, *case))


def test_process_without_rows(ranks: list[dict[str, Any]]) -> None:
    _assert_one([found["more processes than rows"] for found in ranks], _one_row(None))


def test_mixed_precision(ranks: list[dict[str, Any]]) -> None:
    for found in ranks:
        assert found["mixed precision"]["dtype"] == torch.float32
        # the layer's largest |H| is 1 after its normalization, whatever the precision of the pass
        assert found["mixed precision"]["largest"] == pytest.approx(1.0, rel=1e-4)


def test_bad_sums_reach_every_process(ranks: list[dict[str, Any]]) -> None:
    assert all(found["a bad sum"] for found in ranks)


@pytest.mark.parametrize("case", DISCARDED)
def test_bad_sums_that_were_zeroed_move_nothing(ranks: list[dict[str, Any]], case: tuple[str, bool]) -> None:
    assert not any(found["moved by NaN"][case] for found in ranks)


def test_state_dict_is_the_torch_models(ranks: list[dict[str, Any]]) -> None:
    assert all(found["state dict"] for found in ranks)


@pytest.mark.parametrize("gate_at", ["backward", "step"])
def test_tensor_parallelism_is_refused_in_training(gate_at: str, alone: None) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    model = nn.Sequential(ghl.GHLLinear(6, 4, gate_at=gate_at), nn.ReLU())
    parallelize_module(model, init_device_mesh("cpu", (1,)), {"0": ColwiseParallel()})
    if gate_at == "step":
        _step_gate(model)
    with pytest.raises(RuntimeError, match="as tensor parallelism does"):
        model(torch.randn(3, 6))
    assert model.eval()(torch.randn(3, 6)).shape == (3, 4)


@pytest.mark.parametrize("use_orig_params", [False, True])
def test_layers_that_the_older_fsdp_has_flattened(use_orig_params: bool, alone: None) -> None:
    """Those that it ignores are ordinary ones."""
    from torch.distributed.fsdp import FullyShardedDataParallel

    layers = [ghl.GHLLinear(4, 4, gate_at="step") for _ in range(2)]
    model = FullyShardedDataParallel(
        nn.Sequential(*layers),
        device_id=torch.device("cpu"),
        use_orig_params=use_orig_params,
        ignored_modules=layers[1:],
    )
    with pytest.raises(ValueError, match=r"0' is in a FullyShardedDataParallel, .*fully_shard instead"):
        _step_gate(model)
    layers[0].gate_at = "backward"
    _step_gate(model)


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_right_is_refused(ranks: list[dict[str, Any]], case: str) -> None:
    for found in ranks:
        assert case in found["refused"][case]


def test_zeroing_before_a_pass_is_reduced(ranks: list[dict[str, Any]]) -> None:
    for found in ranks:
        assert "without gradient sync" in found["unreduced"]


def test_weight_changed_before_the_step(ranks: list[dict[str, Any]]) -> None:
    for found in ranks:
        assert "changed between backward and the optimizer's step" in found["changed weight"]


def test_pass_in_eval_mode(ranks: list[dict[str, Any]]) -> None:
    for found in ranks:
        assert len(found["eval mode"]) == len(EVAL)
        for message in found["eval mode"]:
            assert "has no Hebbian sums" in message


def test_zeroing_in_place_before_a_pass_is_reduced(ranks: list[dict[str, Any]]) -> None:
    for found in ranks:
        assert "part of weight.grad of" in found["zeroed in place"]


def test_step_before_a_pass_is_reduced(ranks: list[dict[str, Any]]) -> None:
    for found in ranks:
        assert "FSDP has yet to reduce the gradient of a pass through '0'" in found["not reduced"]


def test_parameters_that_load_state_dict_replaced(ranks: list[dict[str, Any]]) -> None:
    for found in ranks:
        assert "needs a new optimizer and StepGate" in found["replaced"]


@pytest.mark.parametrize("case", NOTHING)
def test_step_of_no_pass_moves_nothing(ranks: list[dict[str, Any]], case: tuple[str, bool, bool]) -> None:
    assert not any(found["moved by nothing"][case] for found in ranks)


def _replicated_shards(rank: int) -> dict[str, list[Tensor]]:
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replica", "shard"))
    return {
        rule: _train(
            _sharded(ghl.convert(_network(), RULES[rule], gate_at="step"), mesh), "accumulated", rank
        )
        for rule in RULES
    }


@pytest.mark.slow
def test_four_processes_that_shard_and_replicate(tmp_path: Path) -> None:
    found = processes.run(_replicated_shards, 4, tmp_path)
    for rule in RULES:
        alone = _train(ghl.convert(_network(), RULES[rule], gate_at="step"), "accumulated", None)
        _assert_one([replica[rule] for replica in found], alone)
