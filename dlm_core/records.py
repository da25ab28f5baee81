"""What the artifact knows of each attack, defence, client optimizer, network, data set and
protocol: one record of each.

A record stands beside the function that it describes, as a decorator, and puts it into the table of
its kind when that module is imported (``harness.registry`` imports all of ours). Whatever names one
of them by key reads these tables: trials, figures, the audit, help texts, notebooks. A user's own
is registered the same way::

    @records.attack("mine", title="Mine", client="one step of SGD")
    def mine(seen, *, num_images=1, seed=0): ...
"""

import dataclasses
import inspect
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from dlm_core import check


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
    """A part of a trial as its type.

    Parameters
    ----------
    argument
        Name of the part, for the error.
    kind
        A dataclass.
    given
        One of it, which is returned as it is, or a dict of its fields.

    Raises
    ------
    ValueError
        For a field that it has not.
    """
    if isinstance(given, kind):
        return given
    for name in given:
        check.one_of(f"{argument} setting", name, [f.name for f in dataclasses.fields(kind)])
    return kind(**given)


class Options(Mapping):
    """Named options as a value: immutable, compared and hashed by content, written as JSON. Numbers
    keep their types.
    """

    def __init__(self, given: Mapping[str, Any] | None = None, /, **named: Any) -> None:
        self._content = dict(sorted({**(given or {}), **named}.items()))

    def __getitem__(self, name: str) -> Any:
        return self._content[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._content)

    def __len__(self) -> int:
        return len(self._content)

    def __hash__(self) -> int:
        return hash(json.dumps(plain(self._content), sort_keys=True, default=repr))

    def __repr__(self) -> str:
        return repr(self._content)


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
    """

    key: str
    function: Callable[..., Any]
    title: str

    @property
    def parameters(self) -> dict[str, inspect.Parameter]:
        """The function's own keyword arguments: those that it takes by name alone."""
        every = inspect.signature(self.function).parameters.values()
        return {p.name: p for p in every if p.kind is p.KEYWORD_ONLY}

    @property
    def required(self) -> set[str]:
        """Names of the options without a default."""
        return {name for name, p in self.parameters.items() if p.default is p.empty}

    @property
    def takes_any(self) -> bool:
        """Whether the function passes further keyword arguments on."""
        return any(
            p.kind is p.VAR_KEYWORD for p in inspect.signature(self.function).parameters.values()
        )

    @property
    def options(self) -> list[str]:
        """Names of the options that may be given, and those of the functions that it passes others
        on to.
        """
        return keyword_names(self.function)

    def check_options(self, argument: str, options: Mapping[str, Any]) -> None:
        """Raise ValueError for an option that the function does not take, naming the near ones."""
        open_ended = self.takes_any and not getattr(self.function, "passes_on_to", ())
        for name in () if open_ended else options:
            check.one_of(f"{argument} of {self.key}", name, self.options)


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
        Its place among the attacks that an audit tries in turn; None where an audit does not try
        it.
    """

    colour: int = 7
    marker: str = "o"
    assumes: tuple[str, ...] = ()
    client: str = ""
    several: bool = True
    seeded: bool = True
    audited: int | None = None

    @property
    def demands(self) -> list[str]:
        """The arguments without a default: it cannot be run without being told them."""
        _, *others = inspect.signature(self.function).parameters.values()
        named = (p for p in others if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD))
        return [
            p.name for p in named if p.default is p.empty and p.name not in ("num_images", "seed")
        ]

    @property
    def told(self) -> tuple[str, ...]:
        """All that it is told beside the Observation."""
        return (*(name.replace("_", " ") for name in self.demands), *self.assumes)

    def __call__(self, seen: Any, *, num_images: int = 1, seed: int = 0, **options: Any) -> Any:
        """Run it, with ``num_images`` and ``seed`` where it takes them."""
        check.at_least("num_images", num_images, 1)
        check.at_least("seed", seed, 0)
        if num_images > 1 and not self.several:
            raise ValueError(
                f"num_images is {num_images}; {self.key} takes one: "
                "exact_batch and dlm_plus take several"
            )
        self.check_options("option", options)
        missing = [name for name in self.demands if name not in options]
        if missing:
            raise ValueError(f"attack {self.key!r} has to be told {', '.join(missing)}")
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
    """

    colour: int = 7
    marker: str = "o"
    acts_on: str = "snapshot"
    random: bool = True
    variance: Callable[..., list[float]] | None = None
    leaves_out: bool = False


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


@dataclass(frozen=True, kw_only=True)
class Network(Record):
    """A network: a function ``(image_shape, num_classes, **options) -> nn.Module`` that ends in
    nn.Linear with bias.
    """


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

    image_shape: tuple[int, int, int] = field(default=(3, 32, 32))
    num_classes: int = 2
    full_set: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "image_shape", tuple(self.image_shape))


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
            add(kind(key=key, function=function, title=title or key, **about))
            return function

        return keep

    describe.__doc__ = (
        f"Decorator: register a function as a {kind.__name__}, with the fields of that record."
    )
    return describe


attack = _decorator(Attack)
defence = _decorator(Defence)
network = _decorator(Network)
data_set = _decorator(DataSet)
protocol = _decorator(Protocol)


def keyword_names(function: Callable[..., Any]) -> list[str]:
    """Names of the arguments that a function, and those that it ``passes_on_to``, take by name.

    An argument with a default counts as well as one that is taken by name alone.
    """
    names: dict[str, None] = {}
    for each in (function, *getattr(function, "passes_on_to", ())):
        for p in inspect.signature(each).parameters.values():
            has_default = p.kind is p.POSITIONAL_OR_KEYWORD and p.default is not p.empty
            if p.kind is p.KEYWORD_ONLY or has_default:
                names[p.name] = None
    return list(names)


def passes_on_to(*functions: Callable[..., Any]) -> Callable[[Callable[..., Any]], Any]:
    """Decorator for a function with ``**options``: they are those of ``functions``, so that a
    misspelt one is refused.
    """

    def note(function: Callable[..., Any]) -> Callable[..., Any]:
        function.passes_on_to = tuple(  # type: ignore[attr-defined]
            each for f in functions for each in (f, *getattr(f, "passes_on_to", ()))
        )
        return function

    return note
