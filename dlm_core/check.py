"""One clear sentence for bad input: the argument, its value, and what is allowed."""

import difflib
import functools
import math
import numbers
from collections.abc import Callable, Iterable
from typing import Any


def one_of(argument: str, value: object, allowed: Iterable[object]) -> None:
    """Raise ValueError unless ``value`` is among ``allowed``; the message offers the near ones.

    Parameters
    ----------
    argument
        Its name, for the message, here and below.
    value
        What was given.
    allowed
        Names, or what prints as one.
    """
    names = [str(name) for name in allowed]
    if value not in names:
        near = difflib.get_close_matches(str(value), names, n=3, cutoff=0.5)
        hint = f"; did you mean {' or '.join(near)}?" if near else ""
        raise ValueError(f"{argument} {value!r} is unknown: choose from {', '.join(names)}{hint}")


def at_least(argument: str, value: object, lowest: int) -> None:
    """Raise ValueError unless ``value`` is a whole number of at least ``lowest``."""
    if not isinstance(value, numbers.Integral) or isinstance(value, bool) or value < lowest:
        raise ValueError(f"{argument} is {value!r}; it takes a whole number of at least {lowest}")


def in_range(argument: str, value: Any, low: float, high: float, *, open_low: bool = False) -> None:
    """Raise ValueError unless ``value`` is a finite number in [low, high].

    Parameters
    ----------
    argument, value
        As in ``one_of``.
    low, high
        The interval; ``high`` may be infinite.
    open_low
        Whether ``low`` itself is refused.
    """
    inside = (
        isinstance(value, numbers.Real) and math.isfinite(value) and low <= float(value) <= high
    )
    if not inside or (open_low and value == low):
        interval = f"{'(' if open_low else '['}{low:g}, {high:g}{')' if math.isinf(high) else ']'}"
        raise ValueError(f"{argument} is {value!r}; it takes a finite number in {interval}")


def renamed(**new_names: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorator: keyword arguments by their former names {former: new} still serve, for one
    version.

    Raises
    ------
    TypeError
        When called with both names of one argument.
    """

    def accept(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def called(*arguments: Any, **named: Any) -> Any:
            for former, new in new_names.items():
                if former in named:
                    if new in named:
                        raise TypeError(f"{former} is the former name of {new}; give one of them")
                    named[new] = named.pop(former)
            return function(*arguments, **named)

        return called

    return accept
