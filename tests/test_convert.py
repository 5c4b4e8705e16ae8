"""convert and revert: which layers are swapped, what stays the same, and what is refused."""

from __future__ import annotations

import copy
import logging
import pickle
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from reference_model import small_batches, small_network, summed_loss
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune, spectral_norm, weight_norm

import ghl_kernels as ghl
from ghl_kernels import HebbianRule
from ghl_kernels.nn import GHLLayer

CONVERTED = {
    nn.Conv1d: ghl.GHLConv1d,
    nn.Conv2d: ghl.GHLConv2d,
    nn.Conv3d: ghl.GHLConv3d,
    nn.Linear: ghl.GHLLinear,
}


def converted(model: nn.Module) -> list[str]:
    return [name for name, m in model.named_modules() if isinstance(m, GHLLayer)]


class Nested(nn.Module):
    """encoder.{stem,block.{conv,mix}}, decoder.{hidden,head}"""

    def __init__(self) -> None:
        super().__init__()
        block = nn.ModuleDict({"conv": nn.Conv2d(4, 4, 3, padding=1), "mix": nn.Conv2d(4, 4, 1)})
        self.encoder = nn.ModuleDict({"stem": nn.Conv2d(3, 4, 3), "block": block})
        self.decoder = nn.ModuleDict({"hidden": nn.Linear(4, 8), "head": nn.Linear(8, 5)})

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.encoder["stem"](x))
        x = x + self.encoder["block"]["mix"](torch.relu(self.encoder["block"]["conv"](x)))
        return self.decoder["head"](torch.relu(self.decoder["hidden"](x.mean((2, 3)))))


NESTED = ["encoder.stem", "encoder.block.conv", "encoder.block.mix", "decoder.hidden"]


# --- which layers -------------------------------------------------------------------------------


def test_default_keeps_the_last_linear() -> None:
    model = Nested()
    assert ghl.convert(model) is model
    assert converted(model) == NESTED
    assert type(model.decoder["head"]) is nn.Linear


@pytest.mark.parametrize("kind", CONVERTED)
def test_each_type_becomes_its_own(kind: type[nn.Module]) -> None:
    layer = kind(4, 4, *([] if kind is nn.Linear else [3]))
    model = nn.Sequential(layer, nn.Linear(4, 4))
    ghl.convert(model)
    assert type(layer) is CONVERTED[kind]
    assert isinstance(layer, kind)


def test_rule_and_options_are_stored() -> None:
    rule = HebbianRule.kwta(2)
    model = ghl.convert(small_network(), rule, gate_at="step", sums_at="backward")
    for name in converted(model):
        layer = model.get_submodule(name)
        assert (layer.rule, layer.gate_at, layer.sums_at) == (rule, "step", "backward")
    assert ghl.convert(small_network())[0].rule == HebbianRule.ghl()


EXCLUSIONS: dict[str, tuple[Callable[[Nested], Any], list[str]]] = {
    "nothing": (lambda m: (), []),
    "name": (lambda m: "encoder.stem", ["encoder.stem"]),
    "name of a container": (lambda m: ["encoder.block"], ["encoder.block.conv", "encoder.block.mix"]),
    "glob": (lambda m: ["*.conv", "decoder.*"], ["encoder.block.conv", "decoder.hidden"]),
    "glob, one character": (lambda m: "encoder.ste?", ["encoder.stem"]),
    "module": (lambda m: m.encoder["stem"], ["encoder.stem"]),
    "container": (lambda m: [m.encoder], NESTED[:3]),
    "type": (lambda m: nn.Linear, ["decoder.hidden"]),
    "base type": (lambda m: nn.modules.conv._ConvNd, NESTED[:3]),
    "type that is not there": (lambda m: nn.Conv1d, []),
    "container type": (lambda m: (nn.ModuleDict,), NESTED),
    "several kinds": (
        lambda m: [nn.Linear, "encoder.stem", m.encoder["block"]["mix"]],
        ["decoder.hidden", "encoder.stem", "encoder.block.mix"],
    ),
    "the head too": (lambda m: "decoder.head", []),
    "a generator": (lambda m: (name for name in NESTED[:2]), NESTED[:2]),
}


@pytest.mark.filterwarnings("ignore:convert found no layer")
@pytest.mark.parametrize("case", EXCLUSIONS)
def test_exclusions_add_to_the_default(case: str) -> None:
    exclude, kept = EXCLUSIONS[case]
    model = Nested()
    ghl.convert(model, exclude=exclude(model))
    assert converted(model) == [name for name in NESTED if name not in kept]
    assert type(model.decoder["head"]) is nn.Linear


@pytest.mark.parametrize("exclude", ["encodr.stem", "head*", nn.Linear(2, 2)], ids=["name", "glob", "module"])
def test_exclusion_that_matches_nothing(exclude: Any) -> None:
    model = Nested()
    with pytest.raises(ValueError, match="matches no module"):
        ghl.convert(model, exclude=["encoder.stem", exclude])
    assert converted(model) == []


@pytest.mark.parametrize(
    ("exclude", "shown"), [(3, "3"), (None, "None"), ([None], "None"), (dict, "<class 'dict'>")]
)
def test_exclusion_of_the_wrong_type(exclude: Any, shown: str) -> None:
    with pytest.raises(TypeError, match=f"exclude takes names, globs, .* got {shown}"):
        ghl.convert(Nested(), exclude=exclude)


@pytest.mark.filterwarnings("ignore:the last convertible module is '.model.'")
def test_the_head_is_the_last_registered_whatever_is_excluded() -> None:
    """What the docstring shows: the other Linear is given by itself."""
    encoder = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    ghl.convert(encoder, exclude=[])
    assert converted(encoder) == ["0"]
    ghl.convert(encoder[2])
    assert converted(encoder) == ["0", "2"]
    model = nn.ModuleDict(
        {"body": nn.Linear(3, 4), "classifier": nn.Linear(4, 2), "auxiliary": nn.Linear(4, 4)}
    )
    ghl.convert(model, exclude="classifier")
    assert converted(model) == ["body"]
    ghl.convert(model["auxiliary"])
    assert converted(model) == ["body", "auxiliary"]


def test_bare_layer_is_converted_itself() -> None:
    for layer in (nn.Linear(3, 4), nn.Conv2d(3, 4, 3)):
        with pytest.warns(UserWarning, match=r"'\(model\)', which was converted: .*output layer"):
            assert ghl.convert(layer) is layer
        assert isinstance(layer, GHLLayer)
        assert ghl.revert(layer) is layer
        assert not isinstance(layer, GHLLayer)


def test_subclasses_and_other_layers_are_left_alone() -> None:
    class MyLinear(nn.Linear):
        pass

    model = nn.Sequential(
        MyLinear(4, 4),
        nn.MultiheadAttention(4, 2),
        nn.ConvTranspose2d(2, 2, 3),
        nn.Bilinear(2, 2, 2),
        nn.Linear(4, 4),
    )
    types = [type(m) for m in model.modules()]
    with pytest.warns(UserWarning, match="no layer to convert"):
        ghl.convert(model)
    assert [type(m) for m in model.modules()] == types


def test_module_registered_twice_is_one_layer(caplog: pytest.LogCaptureFixture) -> None:
    shared = nn.Linear(4, 4)
    model = nn.Sequential(shared, nn.ReLU(), shared, nn.Linear(4, 2))
    with caplog.at_level(logging.INFO, "ghl_kernels"):
        ghl.convert(model, gate_at="step")
    assert type(model[2]) is ghl.GHLLinear
    assert model[0] is model[2]
    assert "converted 1 layer ('0'), kept '3'" in caplog.text


# --- a second time ------------------------------------------------------------------------------


@pytest.mark.filterwarnings("error")
def test_converting_twice_changes_nothing() -> None:
    options = {"gate_at": "step", "sums_at": "backward"}
    model = ghl.convert(small_network(), HebbianRule.kwta(2), **options)
    kept = [dict(vars(m)) for m in model.modules()]
    assert ghl.convert(model, HebbianRule.kwta(2), **options) is model
    assert [vars(m) for m in model.modules()] == kept
    assert converted(model) == ["0", "3", "6"]
    assert type(model[8]) is nn.Linear


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"rule": HebbianRule.oja()}, "rule"),
        ({"gate_at": "step"}, "gate_at"),
        ({"sums_at": "backward"}, "sums_at"),
        ({"rule": HebbianRule.oja(), "gate_at": "step"}, "rule or gate_at"),
    ],
)
def test_other_options_for_a_converted_model_are_refused(options: dict[str, Any], named: str) -> None:
    model = ghl.convert(small_network())
    kept = [dict(vars(m)) for m in model.modules()]
    match = rf"no torch layer to convert but 3 GHL layers, 3 with another {named}; call revert\(model\)"
    with pytest.raises(ValueError, match=match):
        ghl.convert(model, **options)
    assert [vars(m) for m in model.modules()] == kept
    ghl.convert(ghl.revert(model), **options)
    assert all(getattr(model[3], name) == value for name, value in options.items())


def test_layers_that_differ_are_counted() -> None:
    model = ghl.convert(small_network())
    model[3].set_rule(HebbianRule.kwta(2))
    with pytest.raises(ValueError, match="3 GHL layers, 1 with another rule;"):
        ghl.convert(model)


@pytest.mark.filterwarnings("error")
def test_parts_of_a_model_by_rules_of_their_own() -> None:
    model, rest = small_network(), HebbianRule.kwta(2)
    for _ in range(2):
        ghl.convert(model, exclude=["3", "6"])
        ghl.convert(model, rest, exclude="0")
    assert [model[i].rule for i in (0, 3, 6)] == [HebbianRule.ghl(), rest, rest]


# --- what it says -------------------------------------------------------------------------------


def test_log_says_what_was_converted_and_kept(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "ghl_kernels"):
        ghl.convert(Nested(), exclude="*.mix")
    (record,) = caplog.records
    message = record.getMessage()
    assert record.levelno == logging.INFO
    before, after = message.split("kept")
    assert all(name in before for name in NESTED if name != "encoder.block.mix")
    assert "encoder.block.mix" in after
    assert "decoder.head" in after


@pytest.mark.filterwarnings("ignore:convert found no layer")
def test_log_names_what_attention_keeps(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16), nn.Linear(8, 3))
    with caplog.at_level(logging.INFO, "ghl_kernels"):
        ghl.convert(model)
        ghl.convert(model)
        ghl.convert(nn.MultiheadAttention(4, 2))
    assert [record.getMessage() for record in caplog.records] == [
        "converted 2 layers ('0.linear1', '0.linear2'), "
        "kept '0.self_attn.in_proj', '0.self_attn.out_proj', '1'",
        "converted 0 layers (none), kept '0.self_attn.in_proj', '0.self_attn.out_proj', '1'",
        "converted 0 layers (none), kept 'in_proj', 'out_proj'",
    ]


def test_no_warning_where_the_last_layer_is_the_one_kept() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ghl.convert(Nested())
        ghl.convert(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.Conv2d(2, 2, 1)), exclude="2")


@pytest.mark.parametrize(
    "model",
    [
        nn.Sequential(nn.Linear(4, 4), nn.Conv1d(4, 2, 1)),
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 5, 1)),
    ],
    ids=["after a linear", "no linear"],
)
def test_warns_when_the_last_layer_is_not_the_one_kept(model: nn.Sequential) -> None:
    with pytest.warns(UserWarning, match="last convertible module is '1'") as record:
        ghl.convert(model)
    assert record[0].filename == __file__


# --- what stays ---------------------------------------------------------------------------------


def test_parameters_buffers_hooks_and_state_stay() -> None:
    model = small_network(inplace=False)  # torch's own backward hooks do not go with in-place consumers
    layer = model[0]
    layer.register_buffer("mask", torch.ones(2))
    layer.note = "mine"
    calls: list[str] = []
    layer.register_forward_hook(lambda *_: calls.append("forward"))
    model[6].register_full_backward_hook(lambda *_: calls.append("backward"))
    layer.weight.register_hook(lambda grad: calls.append("weight"))
    model[3].eval()
    model[6].weight.requires_grad_(False)
    ids = {name: id(t) for name, t in (*model.named_parameters(), *model.named_buffers())}
    modes = [m.training for m in model.modules()]

    ghl.convert(model)
    assert {name: id(t) for name, t in (*model.named_parameters(), *model.named_buffers())} == ids
    assert [m.training for m in model.modules()] == modes
    assert not model[6].weight.requires_grad
    assert layer.note == "mine"
    summed_loss(model, small_batches(2, dtype=torch.float32)[0]).backward()
    assert sorted(calls) == ["backward", "forward", "weight"]

    ghl.revert(model)
    assert {name: id(t) for name, t in (*model.named_parameters(), *model.named_buffers())} == ids
    assert layer.note == "mine"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_dtype_and_memory_format_stay(dtype: torch.dtype) -> None:
    model = small_network().to(dtype, memory_format=torch.channels_last)
    strides = [p.stride() for p in model.parameters()]
    ghl.convert(model)
    assert [p.stride() for p in model.parameters()] == strides
    assert {p.dtype for p in model.parameters()} == {dtype}


def test_models_on_the_meta_device_can_be_converted() -> None:
    with torch.device("meta"):
        model = small_network()
    ghl.convert(model)
    assert model[0].weight.is_meta
    model.to_empty(device="cpu")
    assert model[0](torch.zeros(1, 3, 8, 8)).shape == (1, 8, 8, 8)


def test_optimizer_made_before_convert_still_trains() -> None:
    model = small_network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    ghl.convert(model)
    before = [p.detach().clone() for p in model.parameters()]
    summed_loss(model, small_batches(4, dtype=torch.float32)[0]).backward()
    layers = [model[i].weight.grad.abs().max().item() for i in (0, 3, 6)]
    assert layers == pytest.approx([1.0] * 3)  # "layer" normalization: the gate is on
    optimizer.step()
    assert all(not torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))


def test_output_and_state_dict_are_the_torch_models() -> None:
    model = small_network().eval()
    x = small_batches(3, dtype=torch.float32)[0][0]
    y = model(x)
    state = copy.deepcopy(model.state_dict())
    ghl.convert(model)
    assert torch.equal(model(x), y)
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), state.values(), strict=True))


def test_checkpoints_load_both_ways() -> None:
    x = small_batches(3, dtype=torch.float32)[0][0]
    plain, ours = small_network(), ghl.convert(small_network())
    ours.load_state_dict(plain.state_dict(), strict=True)
    assert torch.equal(ours.eval()(x), plain.eval()(x))
    summed_loss(ours.train(), small_batches(3, dtype=torch.float32)[0]).backward()
    torch.optim.SGD(ours.parameters(), lr=0.1).step()
    plain.load_state_dict(ours.state_dict(), strict=True)
    assert torch.equal(ours.eval()(x), plain.eval()(x))


def test_converted_models_are_copied_and_pickled() -> None:
    model = ghl.convert(small_network(), HebbianRule.kwta(3))
    x = small_batches(3, dtype=torch.float32)[0][0]
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert converted(twin) == converted(model)
        assert twin[0].rule == HebbianRule.kwta(3)
        assert torch.equal(twin.eval()(x), model.eval()(x))
        assert twin[0].weight is not model[0].weight


# --- revert -------------------------------------------------------------------------------------


def test_revert_gives_back_the_torch_model() -> None:
    model = Nested()
    types = [type(m) for m in model.modules()]
    attributes = [set(vars(m)) for m in model.modules()]
    assert ghl.revert(ghl.convert(model)) is model
    assert [type(m) for m in model.modules()] == types
    assert [set(vars(m)) for m in model.modules()] == attributes
    assert repr(model) == repr(Nested())


def test_reverted_layers_have_plain_gradients() -> None:
    (batch,) = small_batches(4, dtype=torch.float32)
    plain = small_network()
    model = ghl.revert(ghl.convert(copy.deepcopy(plain)))
    summed_loss(plain, batch).backward()
    summed_loss(model, batch).backward()
    assert all(
        torch.equal(p.grad, q.grad) for p, q in zip(plain.parameters(), model.parameters(), strict=True)
    )


def test_revert_turns_layers_made_by_hand() -> None:
    model = nn.Sequential(ghl.GHLConv1d(2, 3, 3), ghl.GHLLinear(4, 4))
    ghl.revert(model)
    assert [type(m) for m in model] == [nn.Conv1d, nn.Linear]


def _wrapped(layer: nn.Module) -> nn.Module:
    forward = layer.forward
    layer.forward = lambda x: forward(x)
    return layer


class OfMyOwn(ghl.GHLLinear):
    pass


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (parametrizations.weight_norm, "it is parametrized; call .*remove_parametrizations first"),
        (lambda layer: parametrize.register_parametrization(layer, "bias", nn.Tanh()), "it is parametrized"),
        (_wrapped, "its forward was replaced .* take the wrapper off first"),
        (lambda layer: OfMyOwn(3, 4), "OfMyOwn is a subclass; replace it by hand"),
    ],
)
def test_revert_refuses_what_has_no_torch_layer(
    prepare: Callable[[nn.Module], nn.Module], message: str
) -> None:
    model = nn.Sequential(ghl.GHLLinear(2, 3), prepare(ghl.GHLLinear(3, 4)))
    with pytest.raises(ValueError, match=f"cannot revert '1': {message}"):
        ghl.revert(model)
    assert type(model[0]) is ghl.GHLLinear
    assert model[0].rule == HebbianRule.ghl()


def test_layers_wrapped_after_convert_learn() -> None:
    model = ghl.convert(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)))
    _wrapped(model[0])
    model(torch.randn(5, 3)).square().sum().backward()
    assert model[0].weight.grad.abs().max() == 1


def test_revert_once_the_parametrization_is_removed() -> None:
    layer = parametrizations.weight_norm(ghl.GHLLinear(2, 3))
    parametrize.remove_parametrizations(layer, "weight")
    assert type(ghl.revert(layer)) is nn.Linear


def test_revert_of_a_model_without_ghl_layers() -> None:
    model = small_network()
    assert ghl.revert(model) is model


def test_revert_refuses_attached_layers() -> None:
    model = ghl.convert(small_network(), gate_at="step")
    only_last = torch.optim.SGD(model[6].parameters(), lr=0.1)
    gate = ghl.StepGate(only_last, model)
    with pytest.raises(ValueError, match="'6' is attached to a StepGate"):
        ghl.revert(model)
    assert converted(model) == ["0", "3", "6"]  # none was swapped before the refusal
    gate.remove()
    attributes = [set(vars(m)) for m in small_network().modules()]
    ghl.revert(model)
    assert converted(model) == []
    assert [set(vars(m)) for m in model.modules()] == attributes


def test_revert_of_the_wrong_type() -> None:
    with pytest.raises(TypeError, match=r"torch\.nn\.Module"):
        ghl.revert([nn.Linear(2, 2)])


# --- refusals -----------------------------------------------------------------------------------


class Tied(nn.Module):
    def __init__(self, *, embedding: bool) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.second = nn.Embedding(4, 4) if embedding else nn.Linear(4, 4)
        self.second.weight = self.first.weight
        self.head = nn.Linear(4, 2)


class Doubled(nn.Linear):
    """Not of an exact type itself; its weight is another module's."""


def _tied_to_the_head() -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    return model


def _tied_to_a_subclass() -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 4), Doubled(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    return model


def _with(prepare: Callable[[nn.Module], Any]) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        layer = nn.Conv2d(4, 4, 3)
        return nn.Sequential(nn.Linear(4, 4), prepare(layer) or layer, nn.Linear(4, 4))

    return build


def _pruned(layer: nn.Module) -> nn.Module:
    prune.l1_unstructured(layer, "weight", 0.5)
    return layer


def _computed(layer: nn.Module) -> nn.Module:
    weight = layer.weight.detach().clone().requires_grad_()
    del layer._parameters["weight"]
    layer.weight = weight * 2
    return layer


def _integer(layer: nn.Module) -> nn.Module:
    layer.weight = nn.Parameter(torch.ones(4, 4, 3, 3, dtype=torch.int8), requires_grad=False)
    return layer


def _complex(layer: nn.Module) -> nn.Module:
    layer.weight = nn.Parameter(layer.weight.detach().to(torch.complex64))
    return layer


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "shared by two layers": (lambda: Tied(embedding=False), "'first'.*shared.*first.weight, second.weight"),
    "tied to an embedding": (lambda: Tied(embedding=True), "'first'.*shared.*second.weight"),
    "tied to the kept head": (_tied_to_the_head, "'0'.*shared.*0.weight, 1.weight"),
    "tied to a subclass": (_tied_to_a_subclass, "'0'.*shared"),
    "weight_norm, parametrized": (_with(parametrizations.weight_norm), "'1'.*remove_parametrizations"),
    "spectral_norm, parametrized": (_with(parametrizations.spectral_norm), "'1'.*remove_parametrizations"),
    "orthogonal, parametrized": (_with(parametrizations.orthogonal), "'1'.*remove_parametrizations"),
    "spectral_norm, old": (_with(spectral_norm), "'1'.*remove_spectral_norm"),
    "pruned": (_with(_pruned), "'1'.*prune.remove"),
    "computed": (_with(_computed), "'1'.*no parameter"),
    "forward replaced": (_with(_wrapped), r"'1'.*forward was replaced.*convert before it is wrapped"),
    "lazy": (_with(lambda layer: nn.LazyConv2d(4, 3)), "'1'.*lazy.*forward pass"),
    "integer": (_with(_integer), "'1'.*int8"),
    "complex": (_with(_complex), "'1'.*complex64"),
}


def _refuses(model: nn.Module, match: str, rule: HebbianRule | None = None) -> None:
    """ValueError before anything is swapped."""
    types = {name: type(m) for name, m in model.named_modules()}
    with pytest.raises(ValueError, match=match):
        ghl.convert(model, rule or HebbianRule.ghl())
    assert {name: type(m) for name, m in model.named_modules()} == types


@pytest.mark.parametrize("case", REFUSED)
def test_refusals(case: str) -> None:
    build, match = REFUSED[case]
    _refuses(build(), match)


def test_refusals_name_a_model_that_is_the_layer() -> None:
    _refuses(nn.LazyLinear(3), r"cannot convert '\(model\)': it is lazy")
    layer = ghl.GHLLinear(3, 4, gate_at="step")
    gate = ghl.StepGate(torch.optim.SGD(layer.parameters(), lr=0.1), layer)
    assert repr(gate) == "StepGate(SGD, layers: (model))"
    with pytest.raises(ValueError, match=r"'\(model\)' is attached to a StepGate"):
        ghl.revert(layer)
    gate.remove()
    with ghl.Monitor(layer), pytest.raises(ValueError, match=r"'\(model\)' is watched by a Monitor"):
        ghl.revert(layer)


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_old_weight_norm_is_refused_until_removed() -> None:
    model = nn.Sequential(nn.Linear(4, 4), weight_norm(nn.Conv2d(4, 4, 3)), nn.Linear(4, 4))
    _refuses(model, "'1'.*remove_weight_norm")
    nn.utils.remove_weight_norm(model[1])
    assert converted(ghl.convert(model)) == ["0", "1"]


@pytest.mark.parametrize("case", ["weight_norm, parametrized", "pruned", "lazy", "shared by two layers"])
def test_refused_layers_can_be_excluded(case: str) -> None:
    model = REFUSED[case][0]()
    exclude = ["first", "second"] if case == "shared by two layers" else "1"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # nothing may be left to convert
        ghl.convert(model, exclude=exclude)
    assert not any(name in converted(model) for name in ("1", "first", "second"))


def test_lazy_layers_convert_after_a_forward_pass() -> None:
    model = nn.Sequential(nn.LazyConv2d(4, 3), nn.Flatten(), nn.LazyLinear(3), nn.Linear(3, 2))
    model(torch.zeros(1, 2, 4, 4))
    assert converted(ghl.convert(model)) == ["0", "2"]


def test_too_many_winners_for_one_layer() -> None:
    model = nn.Sequential(nn.Linear(4, 16), nn.Linear(16, 4), nn.Linear(4, 2))
    _refuses(model, "'1'.*got 8 of 4", HebbianRule.kwta(8))
    _refuses(model, "'1'.*anti", HebbianRule(winners=0.25, losers="anti"))
    ghl.convert(model, HebbianRule.kwta(8), exclude="1")
    assert converted(model) == ["0"]


@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[None]:
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without distributed")
@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("where", ["root", "layer"])
def test_sharded_weights(where: str) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (1,))
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    fully_shard(model if where == "root" else model[1], mesh=mesh)
    _refuses(model, "'0'.*before fully_shard" if where == "root" else "'1'.*before fully_shard")


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without distributed")
@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("where", ["root", "layer"])
def test_revert_of_sharded_layers(where: str) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = nn.Sequential(ghl.GHLLinear(4, 4), ghl.GHLLinear(4, 4))
    fully_shard(model if where == "root" else model[1], mesh=init_device_mesh("cpu", (1,)))
    if where == "layer":
        with pytest.raises(ValueError, match="cannot revert '1': it was passed to fully_shard"):
            ghl.revert(model)
    else:
        assert [type(m) for m in ghl.revert(model)] == [nn.Linear, nn.Linear]
        assert model(torch.randn(2, 4)).shape == (2, 4)


def test_wrong_types() -> None:
    with pytest.raises(TypeError, match=r"torch\.nn\.Module, got list"):
        ghl.convert([nn.Linear(2, 2)])
    with pytest.raises(TypeError, match="HebbianRule"):
        ghl.convert(small_network(), "softmax")
    for option in ("gate_at", "sums_at"):
        with pytest.raises(ValueError, match=f"{option} must be one of .* got 'later'"):
            ghl.convert(small_network(), **{option: "later"})
