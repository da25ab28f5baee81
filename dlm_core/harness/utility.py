"""What a defence costs: the accuracy of a federated training in which every client defends all that
it sends.
"""

import copy
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import nn

from dlm_core import check, data, defenses, federated, models, records
from dlm_core.defenses import Setting
from dlm_core.harness.keys import result_key
from dlm_core.observation import Observation, Unchanged
from dlm_core.records import Options, Plain, typed
from dlm_core.threads import client_seed, one_thread, own_generator

HELD_OUT = 0.2  # of the images: for the accuracy
LAST = 5  # rounds over which the final accuracy is averaged


@dataclass(frozen=True, kw_only=True)
class Training:
    """How each client trains in a round: keyword arguments of ``federated.train_locally``, or by
    DP-SGD.

    Attributes
    ----------
    learning_rate, local_steps, batch_size
        As there.
    clip, noise_multiplier
        Of ``defenses.train_privately``; None for training without it.
    """

    learning_rate: check.Positive = 0.3
    local_steps: check.Count = 3
    batch_size: check.Count | None = None
    clip: check.Positive | None = None
    noise_multiplier: check.NonNegative | None = None

    def __post_init__(self) -> None:
        check.fields(self)
        if (self.clip is None) != (self.noise_multiplier is None):
            raise ValueError("clip and noise_multiplier go together: DP-SGD takes both")
        if self.private and self.batch_size is not None:
            raise ValueError(
                f"batch_size is {self.batch_size}; DP-SGD takes all images in each step: None"
            )

    @property
    def private(self) -> bool:
        """Whether it is DP-SGD."""
        return self.clip is not None

    def options(self) -> dict[str, Any]:
        """The keyword arguments that are given."""
        every = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: value for name, value in every.items() if value is not None}


@dataclass(frozen=True)
class Federation:
    """One federated training, plain data like a ``trials.Trial``, and run by the same
    ``sweeps.sweep``.

    Attributes
    ----------
    defence
        A ``defenses.Setting``, or a dict of its name and options, applied to what each client
        sends; None for no defence. Its observer is the server, who averages what is sent; what is
        seen on the channel beside it changes no accuracy.
    dataset
        Of ``data.load``; one of which only samples are bundled takes its full set.
    model
        Key of ``records.NETWORKS``, with ``model_options`` of ``models.build``.
    num_clients
        Who share the training images equally and at random; no more than there are.
    num_rounds
        Of FedAvg.
    client
        A ``Training``, or a dict of its fields.
    seed
        Of the weights, of the split of the images, and of the defence's noise.

    Raises
    ------
    ValueError
        For an unknown name or option, or a value out of range, when the value is made.
    FileNotFoundError, ValueError
        Where the data set cannot be loaded.
    """

    defence: Setting | None = None
    dataset: str = "digits"
    model: str = "lenet"
    model_options: Plain = Options(depth=2)
    num_clients: check.Count = 5
    num_rounds: check.Count = 30
    client: Training = field(default_factory=lambda: Training(batch_size=96))
    seed: check.Whole = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "client", typed("client", Training, self.client))
        if self.defence is not None:
            defence = replace(Setting.of(self.defence), observer="server")
            check.fitting("defence", defence.options, Plain)
            object.__setattr__(self, "defence", defence)
        check.fields(self)
        check.one_of("model", self.model, records.NETWORKS)
        check.one_of("dataset", self.dataset, records.DATA_SETS)
        about = records.DATA_SETS[self.dataset]
        self._build(about.image_shape, about.num_classes)
        count = _count(about, self._source)
        held_out = int(HELD_OUT * count)
        if held_out == 0:
            raise ValueError(
                f"dataset {self.dataset!r} has {count} images: too few to hold some out"
            )
        if self.num_clients > count - held_out:
            raise ValueError(
                f"num_clients is {self.num_clients}; {self.dataset} has {count - held_out} images "
                "to train on"
            )

    @property
    def key(self) -> str:
        """The name of the result."""
        named: list[records.Record] = [records.NETWORKS[self.model]]
        named += [self.defence.record] if self.defence else []
        return result_key(self, ["dlm_core.harness.utility"], named, self.dataset, self._source)

    @property
    def _source(self) -> str:
        """Of ``data.load``."""
        return "full" if self.dataset in data.FULL else "bundled"

    def run(self) -> dict[str, Any]:
        """The record: accuracy on held-out images after each round, and averaged over the last
        ``LAST``.

        A training that diverges stops there; its accuracy is that of guessing the most frequent
        class. So does one in which a client sends back the weights that it received: "stalled", at
        the accuracy of these.
        """
        with one_thread(), own_generator(self.seed):
            members, held_out, _ = self.split()
            networks = self.rounds(*members)
            accuracies, stop_reason, trained = [], "finished", next(networks)
            try:
                for trained in networks:
                    accuracies.append(_accuracy(trained, *held_out))
            except FloatingPointError:
                stop_reason = "diverged"
                accuracies.append(float(held_out[1].bincount().max() / len(held_out[1])))
            except Unchanged:
                stop_reason = "stalled"
                accuracies.append(_accuracy(trained, *held_out))
            last = accuracies[-LAST:] if stop_reason == "finished" else accuracies[-1:]
            accuracy = sum(last) / len(last)
            return {
                "accuracy": accuracy,
                "accuracies": accuracies,
                "stop_reason": stop_reason,
                "arrays": {},
            }

    def rounds(self, images: torch.Tensor, labels: torch.Tensor) -> Iterator[nn.Module]:
        """Yield the network at the start, and after each round of a training on these images, of
        which each client has an equal share.

        Parameters
        ----------
        images, labels
            [N, C, H, W] and [N], of the data set.

        Raises
        ------
        FloatingPointError, Unchanged
            In a round that diverges, or in which a client sends back what it received.
        """
        about, count = records.DATA_SETS[self.dataset], self.num_clients
        model = self._build(about.image_shape, about.num_classes)
        parts = [(images[c::count], labels[c::count]) for c in range(count)]
        yield model
        for after, _ in federated.rounds(
            model,
            parts,
            num_rounds=self.num_rounds,
            train=self._train(),
            defend=self._defend,
            **self.client.options(),
        ):
            yield after

    def _build(self, image_shape: Sequence[int], num_classes: int) -> nn.Module:
        """The network at the start."""
        options = self.model_options
        return models.build(self.model, image_shape, num_classes, seed=self.seed, **options)

    def _train(self) -> Callable[..., Observation]:
        """How a client trains; by DP-SGD each training draws noise of its own."""
        if not self.client.private:
            return federated.train_locally
        draws = itertools.count()

        def privately(*given: Any, **options: Any) -> Observation:
            return defenses.train_privately(
                *given, seed=client_seed(self.seed, next(draws)), **options
            )

        return privately

    def split(self) -> tuple[tuple[Any, Any], tuple[Any, Any], Any]:
        """((images, labels) to train on, those held out, the whole set)."""
        everything = data.load(self.dataset, source=self._source)
        order = torch.randperm(
            len(everything.labels), generator=torch.Generator().manual_seed(self.seed)
        )
        cut = int(HELD_OUT * len(order))
        test, train = order[:cut], order[cut:]
        return (
            (everything.images[train], everything.labels[train]),
            (everything.images[test], everything.labels[test]),
            everything,
        )

    def _defend(self, seen: Observation, turn: int, client: int) -> Observation:
        setting = self.defence
        if setting is None:
            return seen
        return setting.defend(seen, client_seed(self.seed, turn, client))


@functools.lru_cache(maxsize=16)
def _count(record: records.DataSet, source: str) -> int:
    """How many images a set has."""
    return data.size(record.key, source)


def _accuracy(model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> float:
    """The share of images whose class the model finds, with dropout off and batch norm's running
    statistics, as a network is used.
    """
    tested = copy.deepcopy(model).eval()
    with torch.no_grad():
        right = tested(images).argmax(1) == labels
    return float(right.double().mean())
