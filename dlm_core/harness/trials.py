"""A trial is a value, and running it is a pure function of it."""

import math
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import Any

from dlm_core import check, data, records
from dlm_core.defenses import Setting
from dlm_core.harness import registry, scene  # noqa: F401, the registry fills the tables
from dlm_core.harness.keys import result_key
from dlm_core.harness.scene import DTYPES, OPTION_PARTS, attack, observe
from dlm_core.records import Options, typed

__all__ = ["Client", "Protocol", "Trial", "attack", "observe", "repeated", "run_trial"]

MODES = ("train", "eval")


@dataclass(frozen=True, kw_only=True)
class Client:
    """How the client trains: keyword arguments of ``federated.train_locally``, as plain data.

    Attributes
    ----------
    learning_rate, local_steps, batch_size, clear_gradients
        As there.
    client_optimizer
        Key of ``records.CLIENT_OPTIMIZERS``, with ``optimizer_options``.
    transmitted
        Name of the precision that the weights are sent in; None for their own.
    dtype
        Name of the precision that the client computes in.
    mode
        "eval" where it leaves batch norm's running statistics alone, else "train".

    Raises
    ------
    ValueError
        For a value out of range.
    """

    learning_rate: float = 0.01
    local_steps: int = 1
    batch_size: int | None = None
    client_optimizer: str = "sgd"
    optimizer_options: Options = Options()
    clear_gradients: bool = True
    transmitted: str | None = None
    dtype: str = "float32"
    mode: str = "train"

    def __post_init__(self) -> None:
        check.in_range("learning_rate", self.learning_rate, 0, math.inf, open_low=True)
        check.at_least("local_steps", self.local_steps, 1)
        check.at_least("batch_size", 1 if self.batch_size is None else self.batch_size, 1)
        check.one_of("client_optimizer", self.client_optimizer, records.CLIENT_OPTIMIZERS)
        check.one_of("dtype", self.dtype, DTYPES)
        check.one_of("mode", self.mode, MODES)
        if self.transmitted is not None:
            check.one_of("transmitted", self.transmitted, DTYPES)
        object.__setattr__(self, "optimizer_options", Options(self.optimizer_options))

    def training(self, *, plainly: bool = False) -> dict[str, Any]:
        """The keyword arguments of ``federated.train_locally``; ``plainly``: only those that differ
        from its defaults.
        """
        given = {
            f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("dtype", "mode")
        }
        given["transmitted"] = None if self.transmitted is None else DTYPES[self.transmitted]
        given["optimizer_options"] = dict(self.optimizer_options) or None
        if not plainly:
            return given
        defaults = {f.name: f.default for f in fields(self)} | {"optimizer_options": None}
        return {n: v for n, v in given.items() if n == "learning_rate" or v != defaults[n]}


@dataclass(frozen=True)
class Protocol:
    """Another way to learn together than FedAvg whose server sees one client.

    Attributes
    ----------
    name
        Key of ``records.PROTOCOLS``, with ``options``.
    others
        Number of clients that are not attacked; each has one image, after the attacked ones.
    """

    name: str
    others: int = 0
    options: Options = Options()

    def __post_init__(self) -> None:
        check.one_of("protocol", self.name, records.PROTOCOLS)
        check.at_least("others", self.others, 0)
        object.__setattr__(self, "options", Options(self.options))
        records.PROTOCOLS[self.name].check_options("option", self.options)

    @property
    def named(self) -> list[records.Record]:
        """What it names by key: its own record, and that of an attack that runs within it."""
        own = records.PROTOCOLS[self.name]
        within = own.parameters.get("attack")
        if within is None:
            return [own]
        return [own, records.ATTACKS[self.options.get("attack", within.default)]]

    @classmethod
    def of(cls, given: Any) -> "Protocol":
        """The same, from {"name": …, "others": …} with the options beside them."""
        if isinstance(given, Protocol):
            return given
        if "name" not in given:
            raise ValueError(
                f"protocol is {dict(given)!r}; it takes a name, "
                f"one of {', '.join(records.PROTOCOLS)}"
            )
        own = {name: given[name] for name in ("name", "others") if name in given}
        return cls(options=Options({n: v for n, v in given.items() if n not in own}), **own)


@dataclass(frozen=True)
class Trial:
    """One client, one observation, one attack: plain data, so that it can be compared, stored and
    sent to a worker.

    Attributes
    ----------
    attack
        Key of ``records.ATTACKS``, with ``attack_options``; "labels": "given" tells it the true
        labels. An attack that demands the defence is told it, but not its noise.
    dataset, source
        Of ``data.load``.
    index, num_images
        The client's images: so many from that index on.
    model
        Key of ``records.NETWORKS``, with ``model_options`` of ``models.build``.
    trained
        FedAvg rounds the model went through before, on images of the data set that are not
        attacked.
    client
        A ``Client``, or a dict of its fields.
    defence
        A ``defenses.Setting``, or a dict of its name, observer, repeats and options; None for no
        defence.
    protocol
        A ``Protocol``, or a dict; None for FedAvg, whose server sees one client.
    seed
        Of the model's weights, the attack's start and the defence's noise.

    Raises
    ------
    ValueError
        For an unknown name or option, or a number out of range, when the trial is made.
    """

    attack: str = "dlm_plus"
    attack_options: Options = Options()
    dataset: str = "cifar100"
    source: str = "bundled"
    index: int = 0
    num_images: int = 1
    model: str = "lenet"
    model_options: Options = Options()
    trained: int = 0
    client: Client = field(default_factory=Client)
    defence: Setting | None = None
    protocol: Protocol | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("attack_options", "model_options"):
            object.__setattr__(self, name, Options(getattr(self, name)))
        object.__setattr__(self, "client", typed("client", Client, self.client))
        for name, part in (("defence", Setting), ("protocol", Protocol)):
            given = getattr(self, name)
            object.__setattr__(self, name, part.of(given) if given else None)
        check.one_of("attack", self.attack, records.ATTACKS)
        check.one_of("model", self.model, records.NETWORKS)
        check.one_of("data set", self.dataset, records.DATA_SETS)
        check.at_least("num_images", self.num_images, 1)
        for name in ("index", "seed", "trained"):
            check.at_least(name, getattr(self, name), 0)
        self._check_attack()
        self._check_model()
        if self.protocol is not None and self.defence is not None:
            defended = [key for key, record in records.PROTOCOLS.items() if record.defended]
            check.one_of("protocol of defended clients", self.protocol.name, defended)

    def _check_attack(self) -> None:
        record = records.ATTACKS[self.attack]
        record.check_options("option", self.attack_options)
        for name in OPTION_PARTS.keys() & self.attack_options.keys():
            check.one_of(name, self.attack_options[name], OPTION_PARTS[name])
        record.check_told([*self.attack_options, *(["defence"] if self.defence else [])])

    def _check_model(self) -> None:
        options = {name: value for name, value in self.model_options.items() if name != "init"}
        records.NETWORKS[self.model].check_options("option", options)

    @property
    def functions(self) -> list[Any]:
        """The functions that the trial names by key."""
        named = [records.ATTACKS[self.attack], records.NETWORKS[self.model]]
        named.append(records.CLIENT_OPTIMIZERS[self.client.client_optimizer])
        if self.defence is not None:
            named.append(self.defence.record)
        if self.protocol is not None:
            named += self.protocol.named
        return [record.function for record in named]

    @cached_property
    def key(self) -> str:
        """The name of the trial's result."""
        return result_key(
            self, ["dlm_core.harness.scene"], self.functions, data.digest(self.dataset)
        )

    def __getstate__(self) -> dict[str, Any]:
        return {f.name: getattr(self, f.name) for f in fields(self)}

    def run(self) -> dict[str, Any]:
        """``run_trial`` of it: what a sweep calls."""
        return run_trial(self)


def run_trial(trial: Trial) -> dict[str, Any]:
    """The trial's record, as ``scene.play`` returns it."""
    return scene.play(trial)


def repeated(trial: Trial, n: int, start: int = 0) -> list[Trial]:
    """Trials like this one, each with images, a network and noise of its own.

    Parameters
    ----------
    trial
        Number 0 of them.
    n
        How many.
    start
        Number of the first that is wanted.
    """
    numbers = range(start, start + n)
    return [
        replace(trial, index=trial.index + i * trial.num_images, seed=trial.seed + i)
        for i in numbers
    ]
