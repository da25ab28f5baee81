"""What a defence costs: the accuracy of a federated training in which every client defends all that
it sends.
"""

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any

import torch

from dlm_core import check, data, defenses, federated, models, records
from dlm_core.defenses import Setting
from dlm_core.harness.keys import result_key
from dlm_core.observation import Observation
from dlm_core.records import Options, typed
from dlm_core.threads import one_thread

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

    learning_rate: float = 0.3
    local_steps: int = 3
    batch_size: int | None = None
    clip: float | None = None
    noise_multiplier: float | None = None

    def __post_init__(self) -> None:
        check.in_range("learning_rate", self.learning_rate, 0, math.inf, open_low=True)
        check.at_least("local_steps", self.local_steps, 1)
        check.at_least("batch_size", 1 if self.batch_size is None else self.batch_size, 1)
        if (self.clip is None) != (self.noise_multiplier is None):
            raise ValueError("clip and noise_multiplier go together: DP-SGD takes both")
        if self.clip is not None:
            check.in_range("clip", self.clip, 0, math.inf, open_low=True)
            check.in_range("noise_multiplier", self.noise_multiplier, 0, math.inf)
            if self.batch_size is not None:
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
        sends; None for no defence. Its observer is the server unless it says otherwise.
    dataset
        Of ``data.load``; one of which only samples are bundled takes its full set.
    model
        Key of ``records.NETWORKS``, with ``model_options`` of ``models.build``.
    num_clients
        Who share the training images equally and at random.
    num_rounds
        Of FedAvg.
    client
        A ``Training``, or a dict of its fields.
    seed
        Of the weights, of the split of the images, and of the defence's noise.

    Raises
    ------
    ValueError
        For an unknown name or option, or a number out of range, when the value is made.
    """

    defence: Setting | None = None
    dataset: str = "digits"
    model: str = "lenet"
    model_options: Options = Options(depth=2)
    num_clients: int = 5
    num_rounds: int = 30
    client: Training = field(default_factory=lambda: Training(batch_size=96))
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("num_clients", "num_rounds"):
            check.at_least(name, getattr(self, name), 1)
        check.at_least("seed", self.seed, 0)
        check.one_of("model", self.model, records.NETWORKS)
        check.one_of("data set", self.dataset, records.DATA_SETS)
        object.__setattr__(self, "model_options", Options(self.model_options))
        defence = self.defence
        if defence and not isinstance(defence, Setting):
            defence = Setting.of({"observer": "server", **defence})
        object.__setattr__(self, "defence", defence or None)
        object.__setattr__(self, "client", typed("client", Training, self.client))

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
        class.
        """
        with one_thread():
            (images, labels), held_out, everything = self._split()
            shape, options = everything.images.shape[1:], self.model_options
            model = models.build(
                self.model, shape, everything.num_classes, seed=self.seed, **options
            )
            parts = [
                (images[c :: self.num_clients], labels[c :: self.num_clients])
                for c in range(self.num_clients)
            ]
            training = {
                "num_rounds": self.num_rounds,
                "defend": self._defend,
                **self.client.options(),
            }
            accuracies, stop_reason = [], "finished"
            try:
                for trained, _ in federated.rounds(model, parts, train=self._train(), **training):
                    with torch.no_grad():
                        right = trained(held_out[0]).argmax(1) == held_out[1]
                    accuracies.append(float(right.double().mean()))
            except (FloatingPointError, ValueError):
                stop_reason = "diverged"
                accuracies.append(float(held_out[1].bincount().max() / len(held_out[1])))
            last = accuracies[-LAST:] if stop_reason == "finished" else accuracies[-1:]
            accuracy = sum(last) / len(last)
            return {
                "accuracy": accuracy,
                "accuracies": accuracies,
                "stop_reason": stop_reason,
                "arrays": {},
            }

    def _train(self) -> Callable[..., Observation]:
        """How a client trains; by DP-SGD each training draws noise of its own."""
        if not self.client.private:
            return federated.train_locally
        draws = itertools.count(self.seed * self.num_rounds * self.num_clients)

        def privately(*given: Any, **options: Any) -> Observation:
            return defenses.train_privately(*given, seed=next(draws), **options)

        return privately

    def _split(self) -> tuple[tuple[Any, Any], tuple[Any, Any], Any]:
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
        seed = (self.seed * self.num_rounds + turn) * self.num_clients + client
        return setting.defend(seen, seed)
