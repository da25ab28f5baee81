"""Bad input ends in one clear sentence: the argument, its value, and what is allowed.

``arguments`` reads a function's annotations, ``fields`` those of a dataclass: a type, or a type
with a range (``Count``, ``Positive``, …). What annotations cannot say, such as two arguments that
must fit each other, the function says itself.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import inspect
import math
import numbers
import sys
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar

F = TypeVar("F", bound=Callable[..., Any])
# Characters of a list of names that is left out where there are near ones.
LONG = 400


@dataclass(frozen=True)
class Range:
    """Of a number, in an annotation: it is finite and lies between ``low`` and ``high``.

    Attributes
    ----------
    low, high
        The ends; an infinite one is no bound.
    open_low, open_high
        Whether that end itself is refused.
    """

    low: float = -math.inf
    high: float = math.inf
    open_low: bool = False
    open_high: bool = False

    def __contains__(self, value: Any) -> bool:
        above = value > self.low if self.open_low else value >= self.low
        below = value < self.high if self.open_high else value <= self.high
        # A whole number is finite, and may be too large to be asked as a float.
        return above and below and (isinstance(value, int) or math.isfinite(value))

    def __str__(self) -> str:
        left = "(" if self.open_low or math.isinf(self.low) else "["
        right = ")" if self.open_high or math.isinf(self.high) else "]"
        return f"{left}{self.low:g}, {self.high:g}{right}"


@dataclass(frozen=True)
class Must:
    """Of a value, in an annotation: what else must hold of it than its type.

    Attributes
    ----------
    said
        In words that follow the type's: "of floating point".
    holds
        Value to bool.
    """

    said: str
    holds: Callable[[Any], bool]

    def __contains__(self, value: Any) -> bool:
        return self.holds(value)

    def __str__(self) -> str:
        return self.said


Count = Annotated[int, Range(1)]  # at least one
Whole = Annotated[int, Range(0)]  # a seed, an index, a number that may be none
Finite = Annotated[float, Range()]
Positive = Annotated[float, Range(0, open_low=True)]
NonNegative = Annotated[float, Range(0)]
Percent = Annotated[float, Range(0, 100)]


class Wrong(Exception):
    """A value does not fit an annotation; its text says what is allowed."""


def arguments(function: F) -> F:
    """Decorator: check what a function is given against its annotations, before it begins.

    Numbers of NumPy are taken as Python's. A bool is no number. The items of sequences, tuples and
    mappings are taken the same way.

    Raises
    ------
    ValueError
        When called with a value that does not fit; the sentence names the argument, the value and
        what it takes.
    """
    signature = inspect.signature(function)

    @functools.wraps(function)
    def called(*positional: Any, **named: Any) -> Any:
        hints = _hints(function)
        try:
            bound = signature.bind(*positional, **named)
        except TypeError as error:  # an argument is missing, or unknown
            raise TypeError(f"{function.__name__}() {error}") from None
        for name, value in bound.arguments.items():
            if name in hints and signature.parameters[name].kind not in _SEVERAL:
                bound.arguments[name] = fitting(name, value, hints[name])
        return function(*bound.args, **bound.kwargs)

    return typing.cast(F, called)


@functools.cache
def _hints(function: Any) -> dict[str, Any]:
    """A function's annotations, read when it is first called: they may name what is defined below
    it.
    """
    return typing.get_type_hints(function, include_extras=True)


_SEVERAL = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


def fields(made: Any) -> None:
    """The same for a frozen dataclass, called in its ``__post_init__``: check its fields against
    their annotations.

    Raises
    ------
    ValueError
        Where one does not fit.
    """
    kind: Any = type(made)
    hints = _hints(kind)
    for each in dataclasses.fields(made):
        value = fitting(each.name, getattr(made, each.name), hints[each.name])
        object.__setattr__(made, each.name, value)


def named(function: Callable[..., Any], given: Mapping[str, Any]) -> None:
    """The same for some arguments of a function that is called later, and for its own alone.

    Parameters
    ----------
    function
        Without annotations, or with some that cannot be read, it takes anything.
    given
        {name of an argument: value}.

    Raises
    ------
    ValueError
        Where a value does not fit.
    """
    function = inspect.unwrap(function)
    try:
        hints = _hints(vars(function)["__init__"] if isinstance(function, type) else function)
    except (TypeError, NameError, KeyError):
        hints = {}
    for name, value in given.items():
        fitting(name, value, hints.get(name, Any))


def fitting(argument: str, value: Any, hint: Any) -> Any:
    """``value`` as the annotation ``hint`` takes it: a number of NumPy as Python's.

    Parameters
    ----------
    argument
        Its name, for the message.
    value
        What was given.
    hint
        A class, None, Any, a union, Literal, or Annotated with a ``Range``, a ``Must`` or another
        object that has a method ``convert`` (before the type is looked at) or ``check`` (after), of
        value to value, which raises ``Wrong``; Sequence, tuple, list, Mapping, dict and Callable
        with or without types.

    Raises
    ------
    ValueError
        Where it does not fit.
    """
    try:
        return _fit(value, hint)
    except Wrong as wrong:
        raise ValueError(f"{argument} is {shown(value)}; it takes {wrong}") from None


def shown(value: Any) -> str:
    """A value in a sentence: short, in one line; a tensor by shape and type."""
    if hasattr(value, "dtype") and hasattr(value, "shape") and value.shape != ():
        return f"a {type(value).__name__} of shape {tuple(value.shape)} and {value.dtype}"
    text = " ".join(repr(value).split())
    return text if len(text) <= 80 else f"{text[:60]} … (a {type(value).__name__})"


def _fit(value: Any, hint: Any) -> Any:
    """The value as ``hint`` takes it; ``Wrong`` where it does not."""
    origin = typing.get_origin(hint)
    if hint is Any or isinstance(hint, TypeVar):
        return value
    if origin is Annotated:
        return _within(value, hint)
    if origin in (typing.Union, types.UnionType):
        return _one_of_several(value, hint)
    if origin is typing.Literal:
        if any(isinstance(value, type(each)) and value == each for each in typing.get_args(hint)):
            return value
        raise Wrong(_named(hint))
    if hint in (int, float):
        return _number(value, hint)
    if origin is type:
        if isinstance(value, type) and issubclass(value, typing.get_args(hint)):
            return value
        raise Wrong(_named(hint))
    if origin is not None and isinstance(origin, type):
        return _container(value, hint, origin)
    if isinstance(value, type(None) if hint is None else hint):
        return value
    raise Wrong(_named(hint))


def _within(value: Any, hint: Any) -> Any:
    kind, *rules = typing.get_args(hint)
    for rule in rules:
        if hasattr(rule, "convert"):
            value = rule.convert(value)
    try:
        value = _fit(value, kind)
    except Wrong:
        raise Wrong(_named(hint)) from None
    for rule in rules:
        if isinstance(rule, (Range, Must)) and value not in rule:
            raise Wrong(_named(hint))
        if hasattr(rule, "check"):
            value = rule.check(value)
    return value


def _one_of_several(value: Any, hint: Any) -> Any:
    refused = []
    for each in sorted(typing.get_args(hint), key=lambda kind: kind is type(None)):
        try:
            return _fit(value, each)
        except Wrong as wrong:
            refused.append(str(wrong))
    raise Wrong((", or " if "," in refused[0] else " or ").join(refused))


def _number(value: Any, kind: type) -> Any:
    abstract = numbers.Integral if kind is int else numbers.Real
    if not isinstance(value, abstract) or isinstance(value, bool):
        raise Wrong(_named(kind))
    if kind is float and isinstance(value, int) and abs(value) > sys.float_info.max:
        raise Wrong(_named(kind))
    return value.item() if hasattr(value, "item") else value  # of NumPy


def _container(value: Any, hint: Any, origin: type) -> Any:
    inner = typing.get_args(hint)
    if not isinstance(value, origin) or (origin is not str and isinstance(value, (str, bytes))):
        raise Wrong(_named(hint))
    if isinstance(value, Mapping) and inner:
        names = [_inside(name, inner[0], hint) for name in value]
        taken = [_inside(each, inner[1], hint) for each in value.values()]
        differ = _differ(names, value) or _differ(taken, value.values())
        return dict(zip(names, taken)) if differ else value
    if isinstance(value, Sequence) and inner:
        each_of = origin is tuple and inner[-1] is not Ellipsis
        if each_of and len(value) != len(inner):
            raise Wrong(_named(hint))
        kinds = inner if each_of else inner[:1] * len(value)
        taken = [_inside(each, kind, hint) for each, kind in zip(value, kinds)]
        rebuilt = tuple if isinstance(value, tuple) else list
        return rebuilt(taken) if _differ(taken, value) else value
    return value


def _differ(taken: Iterable[Any], given: Iterable[Any]) -> bool:
    return any(one is not other for one, other in zip(taken, given))


def _inside(value: Any, kind: Any, hint: Any) -> Any:
    try:
        return _fit(value, kind)
    except Wrong:
        raise Wrong(f"{_named(hint)}, and not {shown(value)} in it") from None


def _named(hint: Any) -> str:
    """An annotation in words."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        kind, rule = inner[:2]
        if isinstance(rule, Range) and kind is int and math.isinf(rule.high):
            return f"a whole number of at least {rule.low:g}"
        if isinstance(rule, Range):
            return f"{_named(kind).replace('a number', 'a finite number')} in {rule}"
        if isinstance(rule, Must):
            return f"{rule}" if kind is Any else f"{_named(kind)} {rule}"
        return f"{_named(kind)}: {rule}"
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_named(each) for each in inner)
    if origin is typing.Literal:
        return " or ".join(repr(each) for each in inner)
    if origin is type:
        return f"a class of {inner[0].__name__}"
    if origin is not None and isinstance(origin, type):
        parts = inner if issubclass(origin, Iterable) else ()  # of a Callable they are no contents
        several = [_named(each) for each in parts if each is not Ellipsis and each is not Any]
        of = f" of {', '.join(several)}" if several else ""
        return f"a {origin.__name__}{of}"
    plain = {int: "a whole number", float: "a number", str: "a text", bool: "True or False"}
    if hint in (None, type(None)):
        return "None"
    return plain.get(hint) or f"a {hint.__name__}"


def one_of(argument: str, value: object, allowed: Iterable[object]) -> None:
    """Raise ValueError unless ``value`` is the text of one of ``allowed``; the message offers the
    near ones.

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
        said = [f"choose from {', '.join(names)}"]
        if near:
            long = len(said[0]) > LONG  # then the near ones do
            said = [*([] if long else said), f"did you mean {' or '.join(near)}?"]
        raise ValueError(f"{argument} {shown(value)} is unknown: {'; '.join(said)}")


def at_least(argument: str, value: object, lowest: int) -> None:
    """Raise ValueError unless ``value`` is a whole number of at least ``lowest``."""
    fitting(argument, value, Annotated[int, Range(lowest)])


def renamed(**new_names: str) -> Callable[[F], F]:
    """Decorator: keyword arguments by their former names {former: new} still serve, for one
    version. The function's attribute ``renamed`` has them.

    Raises
    ------
    TypeError
        When called with both names of one argument.
    """

    def accept(function: F) -> F:
        @functools.wraps(function)
        def called(*arguments: Any, **named: Any) -> Any:
            for former, new in new_names.items():
                if former in named:
                    if new in named:
                        raise TypeError(f"{former} is the former name of {new}; give one of them")
                    named[new] = named.pop(former)
            return function(*arguments, **named)

        noted: Any = called
        noted.renamed = {**getattr(function, "renamed", {}), **new_names}
        return typing.cast(F, called)

    return accept
