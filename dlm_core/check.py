"""One clear sentence for bad input: the argument, its value, and what is allowed."""

import difflib
import math
import numbers


def one_of(argument, value, allowed):
    """Raise ValueError unless ``value`` is among ``allowed``; the message offers the near ones."""
    allowed = [str(name) for name in allowed]
    if value not in allowed:
        near = difflib.get_close_matches(str(value), allowed, n=3, cutoff=0.5)
        hint = f"; did you mean {' or '.join(near)}?" if near else ""
        raise ValueError(f"{argument} {value!r} is unknown: choose from {', '.join(allowed)}{hint}")


def at_least(argument, value, lowest):
    """Raise unless ``value`` is a whole number of at least ``lowest``."""
    if not isinstance(value, numbers.Integral) or isinstance(value, bool) or value < lowest:
        raise ValueError(f"{argument} is {value!r}; it takes a whole number of at least {lowest}")


def in_range(argument, value, low, high, *, open_low=False):
    """Raise unless ``value`` is a number in [low, high], or in (low, high] with ``open_low``."""
    inside = isinstance(value, numbers.Real) and math.isfinite(value) and low <= value <= high
    if not inside or (open_low and value == low):
        interval = f"{'(' if open_low else '['}{low:g}, {high:g}{')' if math.isinf(high) else ']'}"
        raise ValueError(f"{argument} is {value!r}; it takes a finite number in {interval}")
