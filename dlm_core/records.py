"""What the artifact knows of each attack, defence, client optimizer, network, data set and
protocol: one record of each.

A record stands beside the function that it describes, as a decorator, and puts it into the table of
its kind when that module is imported (``harness.registry`` imports all of ours). Whatever names one
of them by key reads these tables: trials, figures, the audit, help texts, notebooks. A user's own
is registered the same way, a class of ``torch.optim`` with ``client_optimizer``::

    @records.attack("mine", title="Mine", client="one step of SGD")
    def mine(seen, *, num_images=1, seed=0): ...
"""

import dataclasses
import functools
import inspect
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, TypeVar, cast

import numpy as np

from dlm_core import check
from dlm_core.arrays import Shape

F = TypeVar("F", bound=Callable[..., Any])


def plain(value: Any) -> Any:
    """``value`` as what JSON can write: dataclasses and mappings as dicts, a whole number the same
    as int and as float.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(name): plain(each) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(each) for each in value]
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value


def typed(argument: str, kind: type[Any], given: Any) -> Any:
    """What is given as a dataclass, or as a dict of its fields.

    Parameters
    ----------
    argument
        Its name, for the error.
    kind
        The dataclass.
    given
        One of it, which is returned as it is, or the dict.

    Raises
    ------
    ValueError
        For anything else, and for a field that it has not.
    """
    if isinstance(given, kind):
        return given
    names = [f.name for f in dataclasses.fields(kind)]
    if not isinstance(given, Mapping):
        raise ValueError(
            f"{argument} is {check.shown(given)}; it takes a {kind.__name__} "
            f"or a dict of {', '.join(names)}"
        )
    for name in given:
        check.one_of(f"{argument} setting", name, names)
    return kind(**given)


def with_options(argument: str, kind: type[Any], given: Any, known: Iterable[str]) -> Any:
    """What is given as a dataclass with a name and options, or as a dict of its fields with the
    options beside them.

    Parameters
    ----------
    argument, kind, given
        As in ``typed``.
    known
        Names that it may have, for the error.

    Raises
    ------
    ValueError
        For anything else, and as the class does.
    """
    if isinstance(given, kind):
        return given
    if not isinstance(given, Mapping) or "name" not in given:
        raise ValueError(
            f"{argument} is {check.shown(given)}; it takes a {kind.__name__} "
            f"or a dict with a name: {', '.join(known)}"
        )
    names = [f.name for f in dataclasses.fields(kind) if f.name != "options"]
    own = {name: given[name] for name in names if name in given}
    return kind(options=Options({n: v for n, v in given.items() if n not in own}), **own)


class Options(Mapping):
    """Named options as a value: immutable, compared and hashed by content, written as JSON.

    Numbers keep their types, those of NumPy become Python's; lists in it become tuples, and
    mappings Options.

    Raises
    ------
    ValueError
        Where no mapping of names is given.
    """

    def __init__(self, given: Mapping[str, Any] | None = None, /, **named: Any) -> None:
        given = {} if given is None else given
        if not isinstance(given, Mapping) or not all(isinstance(name, str) for name in given):
            raise ValueError(f"options is {check.shown(given)}; it takes a mapping of names")
        content = {**given, **named}
        self._content = {name: _frozen(content[name]) for name in sorted(content)}

    def __getitem__(self, name: str) -> Any:
        return self._content[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._content)

    def __len__(self) -> int:
        return len(self._content)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Mapping):
            return NotImplemented
        return self._written == Options(other)._written

    def __hash__(self) -> int:
        return hash(self._written)

    def __repr__(self) -> str:
        return repr(self._content)

    @property
    def _written(self) -> str:
        return json.dumps(plain(self._content), sort_keys=True, default=repr)


class Written:
    """The rule of ``Plain``: a mapping that JSON can write, so that trials can be told apart, kept
    and sent.
    """

    def convert(self, value: Any) -> Any:
        """The same as Options."""
        if not isinstance(value, Mapping):
            raise check.Wrong(str(self))
        return Options(value)

    def check(self, value: Options) -> Options:
        """The same, where JSON can write it."""
        for name, each in value.items():
            try:
                json.dumps(plain(each))
            except (TypeError, ValueError):
                kind = type(each).__name__
                what = "numbers, texts, True, False, None, and lists and dicts of them"
                raise check.Wrong(f"{what}, and no {kind} ({name!r})") from None
        return value

    def __str__(self) -> str:
        return "a dict of options"


Plain = Annotated[Options, Written()]


def _frozen(value: Any) -> Any:
    """``value`` as something that nobody changes."""
    if isinstance(value, Options):
        return value
    if isinstance(value, Mapping):
        return Options(value)
    if isinstance(value, (list, tuple)):
        return tuple(_frozen(each) for each in value)
    return value.item() if isinstance(value, np.generic) else value


@dataclass(frozen=True, kw_only=True)
class Record:
    """What all kinds share.

    Attributes
    ----------
    key
        The name in trials, tables and commands.
    function
        What it describes.
    title
        The name in figures, as the papers write it.
    example
        Options that it is tried with (``harness.battery``), among them all that it demands.
    """

    key: str
    function: Callable[..., Any]
    title: str
    example: Options = Options()

    def __post_init__(self) -> None:
        for each in dataclasses.fields(self):
            if isinstance(each.default, Options):
                object.__setattr__(self, each.name, Options(getattr(self, each.name)))
        check.fields(self)

    # What the caller fills in, by place and by name; the other arguments are options.
    by_place: ClassVar[int] = 0
    supplied: ClassVar[tuple[str, ...]] = ()

    @property
    def parameters(self) -> dict[str, inspect.Parameter]:
        """The function's own arguments that may be given by name, those that the caller fills in
        aside.
        """
        every = list(inspect.signature(self.function).parameters.values())[self.by_place :]
        named = (p for p in every if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY))
        return {p.name: p for p in named if p.name not in self.supplied}

    @property
    def demands(self) -> list[str]:
        """Those without a default: it cannot be run without being told them."""
        return [name for name, p in self.parameters.items() if p.default is p.empty]

    @property
    def options(self) -> list[str]:
        """Names of the options that may be given, and those of the functions that it passes others
        on to.
        """
        passed = (name for name in _passed_on(self.function) if name not in self.supplied)
        return list(dict.fromkeys([*self.parameters, *passed]))

    @property
    def renamed(self) -> Mapping[str, str]:
        """{former name of an option, which still serves: its name}."""
        return getattr(self.function, "renamed", {})

    def check_options(self, argument: str, options: Iterable[str]) -> None:
        """Raise ValueError for an option that the function does not take, naming the near ones."""
        every = inspect.signature(self.function).parameters.values()
        open_ended = any(p.kind is p.VAR_KEYWORD for p in every) and not _passed_on(self.function)
        for name in () if open_ended else options:
            if name not in self.renamed:
                check.one_of(f"{argument} of {self.key}", name, self.options)

    def check_values(self, options: Mapping[str, Any]) -> None:
        """Raise ValueError for an option whose value is refused by the annotations of the function,
        or of one that it passes the option on to.
        """
        _check_values(self.function, {self.renamed.get(n, n): v for n, v in options.items()})

    def check_told(self, given: Iterable[str]) -> None:
        """Raise ValueError unless ``given`` has the names of all that it demands."""
        told = {self.renamed.get(name, name) for name in given}
        missing = [name for name in self.demands if name not in told]
        if missing:
            kind = type(self).__name__.lower()
            raise ValueError(f"{kind} {self.key!r} must be told {', '.join(missing)}")


@dataclass(frozen=True, kw_only=True)
class Attack(Record):
    """An attack: a function of an Observation that returns a Reconstruction.

    Attributes
    ----------
    colour, marker
        How figures draw it: an index into seaborn's colour-blind palette, and a matplotlib marker.
    assumes
        What it is told, in words, beyond the arguments that it demands. ``told`` has both.
    client
        The kind of client it is for, in words.
    several
        Whether it takes several images in the client's step.
    seeded
        Whether it starts at random.
    audited
        Its place among the attacks that an audit tries in turn, and ``--list`` names; None where
        an audit does not try it.
    scene
        The client that it is tried on, where it is not one step of SGD on a LeNet: fields of
        ``harness.battery.Scene``.
    """

    colour: Annotated[int, check.Range(0, 9)] = 7
    marker: str = "o"
    assumes: tuple[str, ...] = ()
    client: str = ""
    several: bool = True
    seeded: bool = True
    audited: int | None = None
    scene: Options = Options()

    by_place: ClassVar[int] = 1
    supplied: ClassVar[tuple[str, ...]] = ("num_images", "seed")

    @property
    def told(self) -> tuple[str, ...]:
        """All that it is told beside the Observation."""
        return (*(name.replace("_", " ") for name in self.demands), *self.assumes)

    @check.arguments
    def __call__(
        self, seen: Any, *, num_images: check.Count = 1, seed: check.Whole = 0, **options: Any
    ) -> Any:
        """Run it, with ``num_images`` and ``seed`` where it takes them."""
        if num_images > 1 and not self.several:
            several = [key for key, record in ATTACKS.items() if record.several]
            raise ValueError(
                f"num_images is {num_images}; {self.key} takes one, "
                f"several are taken by {', '.join(several)}"
            )
        self.check_options("option", options)
        self.check_told(options)
        common = {"num_images": num_images} if self.several else {}
        if self.seeded:
            common["seed"] = seed
        return self.function(seen, **common, **options)


@dataclass(frozen=True, kw_only=True)
class Defence(Record):
    """A defence: a function of what the client would send, that returns what it sends instead.

    Attributes
    ----------
    acts_on
        "snapshot" (a state dict; whether both snapshots are defended is the observer's matter),
        "update" (Δ, a list of tensors; W_t is public), or "training" (it replaces the client's
        training).
    random
        Whether it draws noise, and takes a ``seed``.
    variance
        (Observation, ``defenses.Setting``) -> variance of what its noise adds to an entry of Δ, one
        number per parameter; None for a defence without noise.
    leaves_out
        Whether it zeroes entries, which an observer can see and leave out.
    neutral
        Options at strength zero, where it must be the identity; empty where it has no such
        strength.
    """

    colour: Annotated[int, check.Range(0, 9)] = 7
    marker: str = "o"
    acts_on: Literal["snapshot", "update", "training"] = "snapshot"
    random: bool = True
    variance: Callable[..., list[float]] | None = None
    leaves_out: bool = False
    neutral: Options = Options()

    by_place: ClassVar[int] = 1
    supplied: ClassVar[tuple[str, ...]] = ("seed", "parameters", "images", "labels")


@dataclass(frozen=True, kw_only=True)
class ClientOptimizer(Record):
    """A client's optimizer: ``function`` is its class of ``torch.optim``.

    Attributes
    ----------
    step
        The same as a differentiable function of one tensor (``beyond.clients``); None where none is
        written.
    """

    step: Callable[..., Any] | None = None

    by_place: ClassVar[int] = 1
    supplied: ClassVar[tuple[str, ...]] = ("lr",)


@dataclass(frozen=True, kw_only=True)
class Network(Record):
    """A network: a function ``(image_shape, num_classes, **options) -> nn.Module`` that ends in
    nn.Linear with bias.
    """

    by_place: ClassVar[int] = 2


@dataclass(frozen=True, kw_only=True)
class DataSet(Record):
    """A data set: a function without arguments that returns its images [N, C, H, W] in [0, 1] and
    labels [N], all of them; ``data.load`` serves it.

    Attributes
    ----------
    image_shape, num_classes
        (C, H, W), and K.
    full_set
        Whether there is a larger set than the one bundled.
    """

    image_shape: Annotated[tuple[int, ...], Shape()] = (3, 32, 32)
    num_classes: int = 2
    full_set: bool = False


@dataclass(frozen=True, kw_only=True)
class Protocol(Record):
    """A way to learn together: a function ``(model, clients, **options) -> Observation``, or a list
    of them.

    Attributes
    ----------
    defended
        Whether its clients may defend what they send.
    """

    defended: bool = False

    by_place: ClassVar[int] = 2


ATTACKS: dict[str, Attack] = {}
DEFENCES: dict[str, Defence] = {}
CLIENT_OPTIMIZERS: dict[str, ClientOptimizer] = {}
NETWORKS: dict[str, Network] = {}
DATA_SETS: dict[str, DataSet] = {}
PROTOCOLS: dict[str, Protocol] = {}
TABLES: dict[type[Record], dict[str, Any]] = {
    Attack: ATTACKS,
    Defence: DEFENCES,
    ClientOptimizer: CLIENT_OPTIMIZERS,
    Network: NETWORKS,
    DataSet: DATA_SETS,
    Protocol: PROTOCOLS,
}


def add(record: Record) -> Record:
    """Put a record into the table of its kind; it replaces one of the same key by the same
    function's name and module.

    Raises
    ------
    ValueError
        Where the key is taken by another function.
    """
    table = TABLES[type(record)]
    taken = table.get(record.key)
    place = record.audited if isinstance(record, Attack) else None
    for each in ATTACKS.values():
        if each.audited == place is not None and each.key != record.key:
            raise ValueError(f"audited is {place}; that is the place of {each.key!r}: take another")
    if taken is not None and _origin(taken.function) != _origin(record.function):
        kind = type(record).__name__
        raise ValueError(
            f"key {record.key!r} is taken by {'.'.join(_origin(taken.function))}; "
            f"a {kind} of another name can be added"
        )
    table[record.key] = record
    return record


def _origin(function: Callable[..., Any]) -> tuple[str, str]:
    return function.__module__, getattr(function, "__qualname__", repr(function))


def _decorator(kind: type[Record]) -> Callable[..., Callable[[Callable[..., Any]], Any]]:
    def describe(
        key: str, *, title: str | None = None, **about: Any
    ) -> Callable[[Callable[..., Any]], Any]:
        def keep(function: Callable[..., Any]) -> Callable[..., Any]:
            for name in about:
                of_it = [each.name for each in dataclasses.fields(kind)]
                check.one_of(f"field of {kind.__name__}", name, of_it)
            add(kind(key=key, function=function, title=title or key, **about))
            return function

        return keep

    describe.__doc__ = (
        f"Decorator: register a function as a {kind.__name__}, with the fields of that record."
    )
    return describe


attack = _decorator(Attack)
defence = _decorator(Defence)
client_optimizer = _decorator(ClientOptimizer)
network = _decorator(Network)
data_set = _decorator(DataSet)
protocol = _decorator(Protocol)


def keyword_names(function: Callable[..., Any]) -> list[str]:
    """Names of the arguments that a function, and those that it ``passes_on_to``, take by name.

    An argument with a default counts as well as one that is taken by name alone.
    """
    own = [
        p.name
        for p in inspect.signature(function).parameters.values()
        if p.kind is p.KEYWORD_ONLY
        or (p.kind is p.POSITIONAL_OR_KEYWORD and p.default is not p.empty)
    ]
    return list(dict.fromkeys([*own, *_passed_on(function)]))


def _passed_on(function: Callable[..., Any]) -> tuple[str, ...]:
    return getattr(function, "passed_on", ())


def _check_values(function: Callable[..., Any], given: Mapping[str, Any]) -> None:
    check.named(function, given)
    own = inspect.signature(function).parameters
    passed = {name: value for name, value in given.items() if name not in own}
    for taker in getattr(function, "takers", ()):
        _check_values(taker, passed)


def passes_on_to(*functions: Callable[..., Any], fixed: Iterable[str] = ()) -> Callable[[F], F]:
    """Decorator for a function with ``**options``: they are those of ``functions``, and another is
    refused before it begins.

    Parameters
    ----------
    *functions
        To which it passes them on.
    fixed
        Names of arguments of these that the function fills in itself.

    Raises
    ------
    ValueError
        When called with an unknown option; the sentence names the near ones.
    """
    passed = tuple(name for f in functions for name in keyword_names(f) if name not in tuple(fixed))
    former = {
        old: new
        for f in functions
        for old, new in getattr(f, "renamed", {}).items()
        if new in passed
    }

    def note(function: F) -> F:
        renamed = {**former, **getattr(function, "renamed", {})}
        every = inspect.signature(function).parameters.values()
        known = (*(p.name for p in every if p.kind is not p.VAR_KEYWORD), *passed)

        @functools.wraps(function)
        def called(*arguments: Any, **named: Any) -> Any:
            for name in named:
                if name not in known and name not in renamed:
                    check.one_of(f"option of {function.__name__}", name, keyword_names(called))
            return function(*arguments, **named)

        noted: Any = called
        noted.takers, noted.passed_on, noted.renamed = functions, passed, renamed
        return cast(F, called)

    return note
