"""Annotations are kept: of functions and of dataclasses."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
import pytest
import torch

from dlm_core import check


@dataclass(frozen=True)
class Step:
    learning_rate: check.Positive
    batch_size: check.Count | None = None
    kind: Literal["sgd", "adam"] = "sgd"

    def __post_init__(self):
        check.fields(self)


def test_a_dataclass_is_checked_when_it_is_made():
    made = Step(np.float32(0.5), np.int64(3))
    assert type(made.learning_rate) is float and type(made.batch_size) is int
    for wrong in ({"learning_rate": -1}, {"batch_size": 0}, {"kind": "sdg"}):
        (name,) = wrong
        with pytest.raises(ValueError, match=f"^{name} is"):
            Step(**{"learning_rate": 0.1, **wrong})


def test_an_optional_argument_says_what_its_value_lacks():
    with pytest.raises(ValueError, match="takes a whole number of at least 1 or None$"):
        Step(0.1, 0)


@pytest.mark.parametrize("value", [np.array(["sgd", "a"]), torch.zeros(2), 3, None])
def test_a_choice_takes_nothing_else(value):
    with pytest.raises(ValueError, match="^kind is"):
        Step(0.1, kind=value)


class Doubled:
    def convert(self, value):
        return value if isinstance(value, str) else str(value)

    def check(self, value):
        if len(value) > 3:
            raise check.Wrong("at most three letters")
        return value * 2


Text = Annotated[str, Doubled()]


@check.arguments
def take(one: Text = "", several: Sequence[Text] = (), named: Mapping[str, Text] | None = None):
    return one, several, named


def test_what_a_rule_makes_of_a_value_is_what_the_function_gets():
    assert take(7, (1, "b"), {"x": 3}) == ("77", ("11", "bb"), {"x": "33"})
    with pytest.raises(ValueError, match="^one is 'long'; it takes at most three letters"):
        take("long")


def test_what_need_not_change_is_passed_on_as_it_is():
    @check.arguments
    def same(values: Sequence[float], table: Mapping[str, int]):
        return values, table

    values, table = [1.0, 2], {"a": 1}
    assert same(values, table)[0] is values and same(values, table)[1] is table
    assert same([np.float64(1)], table)[0] == [1.0]


@pytest.mark.parametrize("value", [int, torch.optim.SGD([torch.zeros(1)], lr=1), "sgd"])
def test_a_class_is_one_of_its_kind(value):
    assert check.fitting("kind", torch.optim.Adam, type[torch.optim.Optimizer]) is torch.optim.Adam
    with pytest.raises(ValueError, match="^kind is .*; it takes a class of Optimizer"):
        check.fitting("kind", value, type[torch.optim.Optimizer])


def test_options_are_checked_before_the_call():
    check.named(take, {"one": "a", "other": object()})
    with pytest.raises(ValueError, match="^one is 'long'"):
        check.named(take, {"one": "long"})
    with pytest.raises(ValueError, match="^nesterov is 'no'; it takes True or False"):
        check.named(torch.optim.SGD, {"nesterov": "no", "momentum": 0.9})
    check.named(lambda weights, scale: weights, {"scale": "any"})


def test_a_function_may_be_left_out():
    assert check.fitting("defend", None, Callable[[int], str] | None) is None
    with pytest.raises(ValueError, match="^defend is 3; it takes a Callable or None"):
        check.fitting("defend", 3, Callable[[int], str] | None)


def test_whole_numbers_of_any_size_are_compared():
    assert check.fitting("n", 10**400, check.Count) == 10**400
    with pytest.raises(ValueError, match="^n is 1000.*; it takes a whole number in"):
        check.fitting("n", 10**400, Annotated[int, check.Range(1, 1e9)])
    with pytest.raises(ValueError, match="^x is 1000.*; it takes a finite number"):
        check.fitting("x", 10**400, check.Positive)
