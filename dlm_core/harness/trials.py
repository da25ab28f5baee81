"""A trial is a value, and running it is a pure function of it."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Annotated, Any

import torch

from dlm_core import check, data, federated, records
from dlm_core.beyond.learned import PUBLIC
from dlm_core.check import Count, Positive, Whole
from dlm_core.defenses import Setting
from dlm_core.harness import registry, scene
from dlm_core.harness.keys import result_key
from dlm_core.harness.scene import DTYPES, OPTION_PARTS, TOLD_LABELS, attack, observe
from dlm_core.records import Options, Plain, Record, typed, with_options

__all__ = ["Client", "Protocol", "Trial", "attack", "observe", "repeated", "run_trial"]

MODES = ("train", "eval")
LABELS = (*TOLD_LABELS, "inferred", "optimised")  # that an attack takes by name


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
    label
        The class that it takes all its images for; None for their own.

    Raises
    ------
    ValueError
        For a value out of range.
    """

    learning_rate: Positive = 0.01
    local_steps: Count = 1
    batch_size: Count | None = None
    client_optimizer: str = "sgd"
    optimizer_options: Plain = Options()
    clear_gradients: bool = True
    transmitted: str | None = None
    dtype: str = "float32"
    mode: str = "train"
    label: Whole | None = None

    def __post_init__(self) -> None:
        check.fields(self)
        check.one_of("client_optimizer", self.client_optimizer, records.CLIENT_OPTIMIZERS)
        check.one_of("dtype", self.dtype, DTYPES)
        check.one_of("mode", self.mode, MODES)
        if self.transmitted is not None:
            check.one_of("transmitted", self.transmitted, DTYPES)
        if self.optimizer_options:
            kind, options = records.CLIENT_OPTIMIZERS[self.client_optimizer], self.optimizer_options
            federated.optimizer_of(kind.function, [torch.zeros(1)], self.learning_rate, options)

    @classmethod
    def of(cls, given: Any) -> "Client":
        """The same, from a dict of its fields."""
        return typed("client", cls, given)

    def training(self, *, plainly: bool = False) -> dict[str, Any]:
        """The keyword arguments of ``federated.train_locally``; ``plainly``: only those that differ
        from its defaults.
        """
        return scene.training(self, plainly=plainly)


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
    others: Whole = 0
    options: Plain = Options()

    def __post_init__(self) -> None:
        check.fields(self)
        check.one_of("name of a protocol", self.name, records.PROTOCOLS)
        record = records.PROTOCOLS[self.name]
        record.check_options("options", self.options)
        _check_values(record, self.options)
        if "attack" in self.options:
            check.one_of("options: attack", self.options["attack"], records.ATTACKS)

    @property
    def named(self) -> list[Record]:
        """What it names by key: its own record, and that of an attack that runs within it."""
        own = records.PROTOCOLS[self.name]
        within = own.parameters.get("attack")
        if within is None:
            return [own]
        return [own, records.ATTACKS[self.options.get("attack", within.default)]]

    @classmethod
    def of(cls, given: Any) -> "Protocol":
        """The same, from {"name": …, "others": …} with the options beside them."""
        return with_options("protocol", cls, given, records.PROTOCOLS)


@dataclass(frozen=True)
class Trial:
    """One client, one observation, one attack: plain data, so that it can be compared, stored and
    sent to a worker.

    Attributes
    ----------
    attack
        Key of ``records.ATTACKS``, with ``attack_options``; "labels": "given" tells it the true
        labels, "last" that of the last image for all. An attack that demands the defence is told
        it, but not its noise.
    dataset, source
        Of ``data.load``; "auto" is the full set where it is present when the trial is made, else
        the bundled one, and the trial says which.
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
        Of the model's weights and the attack's start; what the client draws, such as its defence's
        noise, follows from it by ``threads.client_seed``.

    Raises
    ------
    ValueError
        For an unknown name or option, when the trial is made, and for a value that is out of range
        by what the signatures of ours say. What an attack, a network or a data set refuses by
        itself (labels of other kinds, an activation, an index), and values that a user's own
        function does not take, are refused when it runs.
    """

    attack: str = "dlm_plus"
    attack_options: Plain = Options()
    dataset: str = "cifar100"
    source: str = "bundled"
    index: Whole = 0
    num_images: Count = 1
    model: str = "lenet"
    model_options: Plain = Options()
    trained: Whole = 0
    client: Client = field(default_factory=Client)
    defence: Setting | None = None
    protocol: Protocol | None = None
    seed: Whole = 0

    def __post_init__(self) -> None:
        parts = {"client": Client.of, "defence": Setting.of, "protocol": Protocol.of}
        for name, of in parts.items():
            if getattr(self, name) is not None:
                object.__setattr__(self, name, of(getattr(self, name)))
        check.fields(self)
        if self.defence is not None:
            check.fitting("defence", self.defence.options, Plain)
        check.one_of("attack", self.attack, records.ATTACKS)
        check.one_of("model", self.model, records.NETWORKS)
        check.one_of("dataset", self.dataset, records.DATA_SETS)
        object.__setattr__(self, "source", data.served(self.dataset, self.source))
        if self.client.label is not None:
            classes = records.DATA_SETS[self.dataset].num_classes
            check.fitting("label", self.client.label, Annotated[int, check.Range(0, classes - 1)])
        self._check_attack()
        options = {name: value for name, value in self.model_options.items() if name != "init"}
        network = records.NETWORKS[self.model]
        network.check_options("model_options", options)
        _check_values(network, options)
        if self.protocol is not None:
            self._check_protocol(self.protocol.name)

    def _check_protocol(self, name: str) -> None:
        taken = scene.training(self.client, plainly=True)
        records.PROTOCOLS[name].check_options("option of a client", taken)
        if self.defence is not None:
            defended = [key for key, record in records.PROTOCOLS.items() if record.defended]
            check.one_of("protocol of defended clients", name, defended)

    def _check_attack(self) -> None:
        record = records.ATTACKS[self.attack]
        record.check_options("attack_options", self.attack_options)
        for name in OPTION_PARTS.keys() & self.attack_options.keys():
            check.one_of(name, self.attack_options[name], OPTION_PARTS[name])
        if registry.is_ours(record):
            self._check_own(record)
        record.check_told([*self.attack_options, *(["defence"] if self.defence else [])])
        last = self.index + self.num_images
        if self.attack == "learned_prior" and self.dataset == "digits" and last > PUBLIC.start:
            raise ValueError(
                f"index is {self.index} with num_images {self.num_images}; 'learned_prior' is "
                f"trained on digits from {PUBLIC.start} on, and attacks those before"
            )
        several = self.protocol is not None and self.protocol.name == "rounds"
        if several and getattr(record.function, "in_lanes", False):
            raise ValueError(
                f"protocol 'rounds' shows an Observation a round, and attack {self.attack!r} "
                "reconstructs from one: aware_combined takes several"
            )

    def _check_own(self, record: Record) -> None:
        """The values of options of an attack of ours."""
        given = {record.renamed.get(n, n): value for n, value in self.attack_options.items()}
        if isinstance(given.get("labels"), str):
            check.one_of("labels", given.pop("labels"), LABELS)
        given |= {n: OPTION_PARTS[n][given[n]] for n in OPTION_PARTS.keys() & given.keys()}
        record.check_values(given)

    @property
    def named(self) -> list[Record]:
        """The records of what the trial names by key, its data set aside."""
        named: list[Record] = [records.ATTACKS[self.attack], records.NETWORKS[self.model]]
        named.append(records.CLIENT_OPTIMIZERS[self.client.client_optimizer])
        if self.defence is not None:
            named.append(self.defence.record)
        if self.protocol is not None:
            named += self.protocol.named
        return named

    @property
    def key(self) -> str:
        """The name of the trial's result, by what the code and the images behind it are now."""
        modules = ["dlm_core.harness.scene"]
        return result_key(self, modules, self.named, self.dataset, self.source)

    def run(self) -> dict[str, Any]:
        """``run_trial`` of it: what a sweep calls."""
        return run_trial(self)


def _check_values(record: Record, options: Mapping[str, Any]) -> None:
    """Of a function of ours. A user's own may say in its annotations what plain data are not."""
    if registry.is_ours(record):
        record.check_values(options)


def run_trial(trial: Trial) -> dict[str, Any]:
    """The trial's record, as ``scene.play`` returns it."""
    return scene.play(trial)


@check.arguments
def repeated(trial: Trial, n: Whole, start: Whole = 0) -> list[Trial]:
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
