"""What a user's code is: one digest of a function, a class or a value, and of all that it reaches.

Followed is what the code names: globals, closures, defaults, the members of classes, attributes of
the user's other modules, imports inside functions; and of a value what it holds: numbers, arrays,
tensors, networks, whatever can be pickled. Of this package and of installed ones the version
counts. Comments, docstrings and annotations do not count, nor does where the code stands.

What cannot be followed is an error: better no name for a result than one that does not tell it
from another. Not seen is what the code finds while it runs under a name that it makes up then: with
``getattr``, in the tables of ``records``, in files that it has a library open.
"""

import copyreg
import dis
import enum
import functools
import hashlib
import importlib.util
import os
import random
import sys
import types
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch

from dlm_core.harness.sources import Origin, digest, exists, origin, version

PLAIN = (type(None), bool, int, float, complex, str, bytes, type(Ellipsis), type(NotImplemented))
HIDING = {"eval", "exec", "globals", "__import__", "importlib.import_module"}
READING = {
    "_io.open",
    "open",
    "os.environ",
    "os.getenv",
    "dlm_core.weights.load_weights",
    "numpy.fromfile",
    "numpy.load",
    "numpy.loadtxt",
    "io.open",
    "safetensors.torch.load_file",
    "torch.serialization.load",
}
# Random generators of the whole process, which no digest could tell.
GLOBAL = (random.random.__self__, np.random.random.__self__)  # type: ignore[attr-defined]
# Of C: they have a name, and nothing else to be told apart by.
COMPILED = (
    types.BuiltinFunctionType,
    types.ClassMethodDescriptorType,
    types.GetSetDescriptorType,
    types.MemberDescriptorType,
    types.MethodDescriptorType,
    types.MethodWrapperType,
    types.WrapperDescriptorType,
)
NO_MEMBERS = {"__annotate__", "__annotate_func__", "__dict__", "__weakref__", "_abc_impl"}


class Unfollowable(ValueError):
    """Something that a user's code reaches cannot be part of a digest."""


def contents(what: str, value: Any) -> str:
    """Digest of a value and of all that it reaches; the same in every process.

    Parameters
    ----------
    what
        Whose it is, for the error: "attack 'mine'".
    value
        A function, a class, or anything else.

    Raises
    ------
    Unfollowable
        Where something in it cannot be followed; the sentence says what it is, and what to do.
    """
    return _Reading(what).digest(value)


class _Reading:
    """Things are numbered as they are met, and described one after the other, others by number: so
    neither cycles nor depth matter.
    """

    def __init__(self, what: str) -> None:
        self.what = what
        # (thing, its name, number of that which led to it): held, so that an id is given once
        self.met: list[tuple[Any, str, int]] = []
        self.numbers: dict[int, int] = {}
        self.at = 0

    def digest(self, value: Any) -> str:
        lines = [self.of(value, "")]
        while self.at < len(self.met):
            try:
                lines.append(" ".join(self.described(self.met[self.at][0])))
            except Unfollowable:
                raise
            except Exception as error:
                how = "make it inside the function, or give its class a method __reduce__"
                raise self.error(f"whose content cannot be told ({error})", how) from error
            self.at += 1
        return digest(lines)

    def of(self, value: Any, name: str) -> str:
        """A value's text where it is short, else its number."""
        if type(value) in PLAIN:
            return f"{type(value).__name__} {value!r}"
        if id(value) not in self.numbers:
            self.numbers[id(value)] = len(self.met)
            self.met.append((value, name, self.at))
        return f"#{self.numbers[id(value)]}"

    def error(self, why: str, how: str) -> Unfollowable:
        """Of the thing under way, with the names that led to it."""
        thing, name, led = self.met[self.at]
        trail = [name]
        while led:
            _, name, led = self.met[led]
            trail.insert(0, name)
        path = ".".join([each for each in trail if each][-4:]) or "itself"
        kind = f"{type(thing).__module__}.{type(thing).__name__}".removeprefix("builtins.")
        said = f"{self.what} reaches {path}, a {kind}, {why}, so that no result of it can be named"
        return Unfollowable(" ".join(f"{said}: {how}; or keep none (store=None)".split()))

    def described(self, value: Any) -> Iterator[str]:
        """What a thing is, in pieces."""
        kind = type(value)
        yield f"{kind.__module__}.{kind.__qualname__}"
        if isinstance(value, types.ModuleType):
            yield from self.module(value)
        elif isinstance(value, type):
            yield from self.type(value)
        elif isinstance(value, types.FunctionType):
            yield from self.function(value)
        elif isinstance(value, types.CodeType):
            yield _read(value).text
        elif isinstance(value, COMPILED):
            yield from self.compiled(value)
        elif isinstance(value, types.MethodType):
            yield from (self.of(value.__func__, value.__name__), self.of(value.__self__, ""))
        elif isinstance(value, (staticmethod, classmethod)):
            yield self.of(value.__func__, "")
        elif isinstance(value, (property, types.DynamicClassAttribute)):
            yield from (self.of(each, "") for each in (value.fget, value.fset, value.fdel))
        elif isinstance(value, functools.cached_property):
            yield self.of(value.func, "")
        elif isinstance(value, torch.Tensor) and value.layout is torch.strided:
            yield from self.tensor(value)
        elif kind is np.ndarray and not value.dtype.hasobject:
            yield f"{value.dtype.descr} {value.shape} {_hashed(value)}"
        elif kind in (list, tuple):
            yield from (self.of(each, str(i)) for i, each in enumerate(value))
        elif kind in (dict, types.MappingProxyType):
            for name, each in value.items():
                yield from (self.of(name, "a key"), self.of(each, str(name)))
        elif kind in (set, frozenset):  # whose order is another in each process
            yield from sorted(contents(self.what, each) for each in value)
        elif isinstance(value, functools._lru_cache_wrapper):
            yield self.of(value.__wrapped__, "")
        elif value is os.environ:
            self.refuse("os.environ")
        elif any(value is each for each in GLOBAL):
            raise self.error("of the whole process", "draw from one of your own, with the seed")
        else:
            yield from self.reduced(value)

    def module(self, value: types.ModuleType) -> Iterator[str]:
        yield value.__name__
        if origin(value.__name__) is not Origin.FOREIGN:
            yield version(value.__name__)
            return
        for name, each in sorted(vars(value).items()):
            if not name.startswith("__"):
                yield from (name, self.of(each, name))

    def type(self, value: type) -> Iterator[str]:
        yield f"{value.__module__}.{value.__qualname__}"
        if origin(value.__module__) is not Origin.FOREIGN:
            yield version(value.__module__)
            return
        yield from (self.of(base, base.__name__) for base in (type(value), *value.__bases__))
        members = dict(vars(value))
        if issubclass(value, enum.Enum):
            own = {n: m for n, m in members.items() if not n.startswith("_")}
            members = own | {name: each._value_ for name, each in value.__members__.items()}
        for name, member in sorted(members.items()):
            is_code = callable(member) or isinstance(member, (staticmethod, classmethod, property))
            if name not in NO_MEMBERS and (is_code or not name.startswith("__")):
                yield from (name, self.of(member, name))

    def function(self, value: types.FunctionType) -> Iterator[str]:
        # Its home by its globals: functools.wraps gives it the name and the module of another.
        home = value.__globals__.get("__name__", "__main__")
        if origin(home) is not Origin.FOREIGN:
            yield from self.installed(value, home)
            return
        read = _read(value.__code__)
        yield read.text
        yield from (self.of(each, "a default") for each in value.__defaults__ or ())
        for several in (value.__kwdefaults__ or {}, vars(value)):
            for name, each in sorted(several.items()):
                yield from (name, self.of(each, name))
        yield from self.closure(value)
        for path in read.paths:
            yield from self.named(value.__globals__, path)
        for each in read.imports:
            yield from self.imported(value.__globals__, each)

    def installed(self, value: types.FunctionType, home: str) -> Iterator[str]:
        """A function of ours or of a package. One that their decorator made of a user's goes with
        the user's.
        """
        self.refuse(f"{value.__module__}.{value.__qualname__}")
        yield from (home, value.__code__.co_qualname, version(home))
        wrapped = getattr(value, "__wrapped__", None)
        if _has_a_home(value):
            return
        if wrapped is not None and origin(home) is Origin.OURS:
            yield self.of(wrapped, "")
        else:
            yield from self.closure(value)

    def closure(self, value: types.FunctionType) -> Iterator[str]:
        for name, cell in zip(value.__code__.co_freevars, value.__closure__ or ()):
            try:
                yield self.of(cell.cell_contents, name)
            except ValueError:
                yield "empty"

    def compiled(self, value: Any) -> Iterator[str]:
        home = getattr(value, "__module__", None)
        yield value.__qualname__
        if home is None:
            bound = value.__self__ if hasattr(value, "__self__") else value.__objclass__
            yield self.of(bound, "")
        else:
            self.refuse(f"{home}.{value.__qualname__}")
            yield from (home, "" if origin(home) is Origin.FOREIGN else version(home))

    def refuse(self, name: str) -> None:
        """Raise for a function whose results are told by nothing that the code holds."""
        name = name.removeprefix("builtins.")
        if name in HIDING:
            raise self.error(f"and it calls {name}, which hides what it takes", "write it out")
        if name in READING:
            how = "read that outside, into a global, whose content counts"
            raise self.error(f"and what {name} returns stands elsewhere", how)

    def tensor(self, value: torch.Tensor) -> Iterator[str]:
        plain = value.detach().resolve_conj().resolve_neg().cpu().contiguous()
        yield self.of(type(value), "")
        yield f"{value.dtype} {tuple(value.shape)} {value.requires_grad} {value.device}"
        yield _hashed(plain.reshape(-1).view(torch.uint8).numpy())

    def named(self, known: Mapping[str, Any], path: tuple[str, ...]) -> Iterator[str]:
        """What a function's code takes from its globals: helper.strength, torch.nn.Linear, …"""
        first, *more = path
        yield ".".join(path)
        if first not in known:
            self.refuse(first)
            return
        value, within = known[first], Origin.FOREIGN
        while more and isinstance(value, types.ModuleType):
            within = origin(value.__name__)
            if not hasattr(value, more[0]):
                return
            value = getattr(value, more.pop(0))
        name = ".".join(path[: len(path) - len(more)])
        bound = getattr(value, "__self__", None)
        is_code = isinstance(value, (*COMPILED, types.FunctionType, types.ModuleType, type))
        if any(bound is each for each in GLOBAL):
            yield self.of(bound, name)
        elif within is Origin.FOREIGN or is_code or value is os.environ:
            yield self.of(value, name)
        else:  # a constant of a package
            yield version(known[first].__name__)

    def imported(self, known: Mapping[str, Any], what: "_Import") -> Iterator[str]:
        """What an import inside a function takes."""
        package = known.get("__package__") or str(known.get("__name__")).rpartition(".")[0]
        name = importlib.util.resolve_name("." * what.level + what.module, package)
        yield name
        if not exists(name):
            return
        if origin(name) is Origin.INSTALLED and name not in sys.modules:
            yield version(name)  # without importing it here
            return
        try:
            module = importlib.import_module(name)
        except ImportError:
            return
        if not what.names:
            yield self.of(module, name)
        for each in what.names:
            if not hasattr(module, each):
                importlib.import_module(f"{name}.{each}")
            yield from (each, *self.named({name: module}, (name, each)))

    def reduced(self, value: Any) -> Iterator[str]:
        """Anything else, by what pickle would take of it."""
        reducer = copyreg.dispatch_table.get(type(value))
        parts = reducer(value) if reducer else value.__reduce_ex__(4)
        if isinstance(parts, str):
            yield from (parts, self.of(type(value), ""))
            return
        made, arguments, state, items, pairs = (*parts, None, None, None)[:5]
        for each in (made, arguments, state, list(items or ()), list(pairs or ())):
            yield self.of(each, "")


class _Import(NamedTuple):
    """``from ..module import names``; no names for ``import module``."""

    level: int
    module: str
    names: tuple[str, ...]


class _Code(NamedTuple):
    """A code object: its instructions as text, what it takes from globals, its imports."""

    text: str
    paths: list[tuple[str, ...]]
    imports: list[_Import]


@functools.lru_cache(maxsize=4096)
def _read(code: types.CodeType) -> _Code:
    """A code object with those inside it; without line numbers and docstrings."""
    lines = [str((code.co_argcount, code.co_posonlyargcount, code.co_kwonlyargcount))]
    lines += [str(code.co_varnames), code.co_exceptiontable.hex()]
    paths: set[tuple[str, ...]] = set()
    imports: set[_Import] = set()
    steps = [each for each in dis.get_instructions(code) if each.opname != "EXTENDED_ARG"]
    for i, step in enumerate(steps):
        argument = step.argval
        following = [(each.opname, each.argval) for each in steps[i + 1 : i + 2]]
        is_docstring = following == [("STORE_NAME", "__doc__")]
        if isinstance(argument, types.CodeType):
            inner = _read(argument)
            paths |= set(inner.paths)
            imports |= set(inner.imports)
        lines.append(f"{step.opname} {'' if is_docstring else _constant(argument)}")
        if step.opname in ("LOAD_GLOBAL", "LOAD_NAME", "LOAD_FROM_DICT_OR_GLOBALS"):
            path = [argument]
            for further in steps[i + 1 :]:
                if further.opname not in ("LOAD_ATTR", "LOAD_METHOD"):
                    break
                path.append(further.argval)
            paths.add(tuple(path))
        if step.opname == "IMPORT_NAME":
            level, names = (each.argval for each in steps[i - 2 : i])
            imports.add(_Import(level, argument, names or ()))
    return _Code(digest(lines), sorted(paths), sorted(imports))


def _constant(value: Any) -> str:
    """An instruction's argument as text, the same in every process."""
    if isinstance(value, types.CodeType):
        return _read(value).text
    if isinstance(value, frozenset):
        return f"frozenset {sorted(map(_constant, value))}"
    if isinstance(value, tuple):
        return f"tuple {[_constant(each) for each in value]}"
    return f"{type(value).__name__} {value!r}"


def _has_a_home(function: types.FunctionType) -> bool:
    """Whether it is what its module and name say, and that module no user's."""
    place: Any = sys.modules.get(function.__module__)
    for name in function.__qualname__.split("."):
        place = getattr(place, name, None)
    return place is function and origin(function.__module__) is not Origin.FOREIGN


def _hashed(array: Any) -> str:
    flat = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    return hashlib.sha256(flat.data).hexdigest()[:32]
