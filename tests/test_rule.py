"""HebbianRule: what it accepts, what it refuses and in which words, and that it is a value."""

from __future__ import annotations

import dataclasses
import functools
import math
import pickle
import re
from typing import Any

import numpy as np
import pytest

from ghl_kernels import HebbianRule
from ghl_kernels.rule import Competition

NAN = float("nan")


@pytest.mark.parametrize("field", ["activity", "losers", "decay", "normalize", "gate"])
@pytest.mark.parametrize(
    ("value", "error"),
    [("soft-max", ValueError), ("", ValueError), (None, TypeError), (3, TypeError), (NAN, TypeError)],
)
def test_unknown_choice_is_refused_by_name(field: str, value: Any, error: type[Exception]) -> None:
    with pytest.raises(error) as caught:
        HebbianRule(**{field: value})
    message = str(caught.value)
    assert field in message
    assert repr(value) in message
    allowed = {
        "activity": "softmax",
        "losers": "anti",
        "decay": "sanger",
        "normalize": "filter",
        "gate": "sign",
    }
    assert allowed[field] in message


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("activity", ("softmax", "linear", "relu")),
        ("losers", ("silent", "anti")),
        ("decay", ("oja", "instar", "none", "subspace", "sanger")),
        ("normalize", ("layer", "filter", "mean", "none")),
        ("gate", ("sign", "none")),
    ],
)
def test_every_choice_is_accepted(field: str, values: tuple[str, ...]) -> None:
    assert [getattr(HebbianRule(**{field: value}), field) for value in values] == list(values)
    assert HebbianRule(activity="binary", winners=2).activity == "binary"


@pytest.mark.parametrize(
    ("winners", "error"),
    [
        (True, TypeError),
        (False, TypeError),
        (np.bool_(True), TypeError),
        ("3", TypeError),
        ([3], TypeError),
        (1 + 0j, TypeError),
        (0, ValueError),
        (-1, ValueError),
        (np.int64(0), ValueError),
        (0.0, ValueError),
        (-0.5, ValueError),
        (1.5, ValueError),
        (NAN, ValueError),
        (math.inf, ValueError),
    ],
)
def test_bad_winners_are_refused(winners: Any, error: type[Exception]) -> None:
    with pytest.raises(error) as caught:
        HebbianRule(winners=winners)
    assert "winners must be None, an int >= 1 or a fraction in (0, 1]" in str(caught.value)
    assert repr(winners) in str(caught.value)


@pytest.mark.parametrize(
    ("temperature", "error"),
    [
        (True, TypeError),
        ("1", TypeError),
        (None, TypeError),
        (1j, TypeError),
        (0, ValueError),
        (0.0, ValueError),
        (-1.0, ValueError),
        (NAN, ValueError),
        (math.inf, ValueError),
    ],
)
def test_bad_temperature_is_refused(temperature: Any, error: type[Exception]) -> None:
    with pytest.raises(error) as caught:
        HebbianRule(temperature=temperature)
    assert "temperature must be a finite number > 0" in str(caught.value)
    assert repr(temperature) in str(caught.value)


@pytest.mark.parametrize("temperature", [5e-324, 1e-320, 1e-45, 1e-40, 1.1754943e-38, 3.4028236e38, 1e39])
def test_temperature_that_float32_has_not_is_refused(temperature: float) -> None:
    message = (
        f"normal float32 number, in [1.1754943508222875e-38, 3.4028234663852886e+38], got {temperature!r}"
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        HebbianRule.ghl(temperature)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"losers": "anti", "winners": 1}, ("anti", "winners=1")),
        ({"activity": "binary"}, ("binary", "winners")),
        ({"activity": "binary", "winners": 1.0}, ("binary", "winners")),
        ({"activity": "linear", "temperature": 2.0}, ("temperature=2.0", "'linear'")),
        ({"activity": "relu", "temperature": 0.5}, ("temperature=0.5", "'relu'")),
        ({"activity": "binary", "winners": 2, "temperature": 0.5}, ("temperature=0.5", "'binary'")),
    ],
)
def test_combinations_that_mean_nothing_are_refused(fields: dict[str, Any], words: tuple[str, ...]) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011  checked word by word below
        HebbianRule(**fields)
    assert all(word in str(caught.value) for word in words)


@pytest.mark.parametrize(
    ("winners", "units", "k"),
    [
        (None, 7, 0),
        (3, 7, 3),
        (7, 7, 7),
        (0.5, 7, 4),
        (0.5, 8, 4),
        (0.01, 7, 1),
        (0.1, 10, 1),
        (0.3, 10, 3),
        # in doubles 0.07 * 100 is 7.000000000000001: the definition says ceil of that product
        (0.07, 100, 8),
        (np.float32(0.5), 8, 4),
        (5e-324, 1000, 1),
        (1.0 - 2**-53, 10, 10),
    ],
)
def test_winners_of(winners: Any, units: int, k: int) -> None:
    assert HebbianRule(winners=winners).winners_of(units) == k


def test_more_winners_than_units_are_refused() -> None:
    with pytest.raises(ValueError, match="got 8 of 7"):
        HebbianRule(winners=8).winners_of(7)


@pytest.mark.parametrize(
    ("units", "error"),
    [("a", TypeError), (None, TypeError), (2.5, TypeError), (True, TypeError), (-3, ValueError)],
)
@pytest.mark.parametrize("winners", [None, 2, 0.5])
def test_units_that_are_no_number_of_units(winners: Any, units: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match=f"units must be an int >= 0, got {units!r}"):
        HebbianRule(winners=winners).winners_of(units)


def test_a_fraction_that_leaves_one_winner_excludes_anti() -> None:
    rule = HebbianRule(winners=0.1, losers="anti")
    assert rule.winners_of(20) == 2
    with pytest.raises(ValueError, match=r"winners=0\.1 of 10 units"):
        rule.winners_of(10)


def test_all_units_are_stored_as_none() -> None:
    assert HebbianRule(winners=1.0).winners is None
    assert HebbianRule(winners=np.float64(1.0)).winners is None
    assert HebbianRule(winners=1).winners == 1


@pytest.mark.parametrize("kind", [np.int8, np.int32, np.int64, np.uint16])
def test_numpy_integers_become_python_ints(kind: Any) -> None:
    rule = HebbianRule(winners=kind(5))
    assert type(rule.winners) is int
    assert rule == HebbianRule(winners=5)


def test_numbers_become_python_floats() -> None:
    rule = HebbianRule(winners=np.float32(0.25), temperature=np.float32(2))
    assert (type(rule.winners), type(rule.temperature)) == (float, float)
    assert type(HebbianRule(temperature=2).temperature) is float


def test_immutable() -> None:
    rule = HebbianRule()
    with pytest.raises(dataclasses.FrozenInstanceError):
        rule.winners = 3  # type: ignore[misc]


def test_equality_hash_and_pickle() -> None:
    rule = HebbianRule(winners=3, losers="anti")
    same = HebbianRule(winners=np.int64(3), losers="anti")
    assert rule == same
    assert hash(rule) == hash(same)
    assert rule != HebbianRule(winners=3)
    assert pickle.loads(pickle.dumps(rule)) == rule
    assert dataclasses.replace(rule, losers="silent") == HebbianRule(winners=3)
    with pytest.raises(ValueError, match="anti"):
        dataclasses.replace(rule, winners=1)


def test_str_shows_the_competition_and_what_is_not_the_default() -> None:
    assert str(HebbianRule()) == "HebbianRule(activity='softmax', winners=None)"
    assert eval(str(HebbianRule())) == HebbianRule()
    rule = HebbianRule(activity="linear", winners=0.02, normalize="filter")
    assert str(rule) == "HebbianRule(activity='linear', winners=0.02, normalize='filter')"
    assert eval(str(rule)) == rule
    assert eval(repr(rule)) == rule


@pytest.mark.parametrize(
    ("preset", "fields"),
    [
        (HebbianRule.ghl(), {}),
        (HebbianRule.ghl(0.5), {"temperature": 0.5}),
        (HebbianRule.ghl(temperature=0.5), {"temperature": 0.5}),
        (HebbianRule.kwta(4), {"activity": "linear", "winners": 4}),
        (HebbianRule.kwta(0.02), {"activity": "linear", "winners": 0.02}),
        (HebbianRule.softhebb(2.0), {"temperature": 2.0, "losers": "anti", "gate": "none"}),
        (HebbianRule.hard_wta(), {"activity": "binary", "winners": 1, "gate": "none"}),
        (HebbianRule.oja(), {"activity": "linear", "normalize": "mean", "gate": "none"}),
        (HebbianRule.instar(), {"decay": "instar", "normalize": "mean", "gate": "none"}),
        (HebbianRule.hpca(), {"activity": "relu", "decay": "sanger", "normalize": "mean", "gate": "none"}),
    ],
)
def test_presets(preset: HebbianRule, fields: dict[str, Any]) -> None:
    assert preset == HebbianRule(**fields)


ROWS = re.findall(r"^ *``(\w+)\((\w*)\)`` +(\S.*)$", str(HebbianRule.__doc__), re.MULTILINE)
ARGUMENTS = {"temperature": 0.5, "k": 4}
OTHERS = {
    "activity": "relu",
    "winners": 3,
    "temperature": 2.0,
    "losers": "anti",
    "decay": "none",
    "normalize": "filter",
    "gate": "none",
}


@pytest.mark.parametrize(("name", "argument", "sets"), ROWS, ids=[row[0] for row in ROWS])
def test_presets_set_what_is_documented_and_take_the_rest(name: str, argument: str, sets: str) -> None:
    preset = functools.partial(getattr(HebbianRule, name), *([ARGUMENTS[argument]] if argument else []))
    own = eval(f"dict({re.sub('^temperature', 'temperature=temperature', sets)})", dict(ARGUMENTS))
    assert preset() == HebbianRule(**own)
    for field, value in OTHERS.items():
        if field in own:
            with pytest.raises(TypeError, match=field):
                preset(**{field: value})
            continue
        try:
            expected = HebbianRule(**own, **{field: value})
        except ValueError as error:
            with pytest.raises(ValueError, match=re.escape(str(error))):
                preset(**{field: value})
        else:
            assert preset(**{field: value}) == expected


def test_presets_are_all_documented() -> None:
    methods = {name for name, member in vars(HebbianRule).items() if isinstance(member, classmethod)}
    assert {row[0] for row in ROWS} == {name for name in methods if not name.startswith("_")}


def test_presets_say_what_they_set_themselves() -> None:
    with pytest.raises(
        TypeError, match=r"kwta sets activity, winners itself, got activity='relu'; .*replace"
    ):
        HebbianRule.kwta(4, activity="relu")
    with pytest.raises(TypeError, match="normalise"):
        HebbianRule.kwta(4, normalise="filter")


def test_competition() -> None:
    rule = HebbianRule(winners=0.5, temperature=2.0, losers="anti")
    assert rule.competition(7) == Competition("softmax", 4, 2.0, True)
    assert HebbianRule().competition(7) == Competition("softmax", 0, 1.0, False)
