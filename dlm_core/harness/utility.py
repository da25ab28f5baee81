"""What a defence costs: the accuracy of a federated training in which every client defends all that it sends."""

import itertools
from dataclasses import dataclass, field

import torch

from dlm_core import check, data, defenses, federated, models
from dlm_core.harness.trials import DEFENCES, one_thread, result_key

HELD_OUT = 0.2  # of the images: for the accuracy
LAST = 5  # rounds over which the final accuracy is averaged


@dataclass(frozen=True)
class Federation:
    """One federated training, plain data like a ``trials.Trial``, and run by the same ``sweeps.sweep``.

    dataset, model, model_options   as there; a data set of which only samples are bundled takes its full set.
    clients   number of clients, who share the training images equally and at random.      rounds  of FedAvg.
    client    keyword arguments of ``federated.train_locally``, or with "noise_multiplier" of ``defenses.train_privately``.
    defence   {} or {"name": a key of ``trials.DEFENCES``, …}, applied to what each client sends.
    seed      of the weights, of the split of the images, and of the defence's noise.
    """

    defence: dict = field(default_factory=dict)
    dataset: str = "digits"
    model: str = "lenet"
    model_options: dict = field(default_factory=lambda: {"depth": 2})
    clients: int = 5
    rounds: int = 30
    client: dict = field(default_factory=lambda: {"lr": 0.3, "steps": 3, "batch_size": 96})
    seed: int = 0

    def __post_init__(self):
        for name in ("clients", "rounds"):
            check.at_least(name, getattr(self, name), 1)
        check.at_least("seed", self.seed, 0)
        if self.defence:
            check.one_of("defence", self.defence.get("name"), DEFENCES)

    @property
    def key(self):
        """Names the result."""
        return result_key(self, "utility")

    def __hash__(self):
        return hash(self.key)

    def run(self):
        """The record: accuracy on held-out images after each round, and averaged over the last ``LAST``.

        A training that diverges stops there; its accuracy is that of guessing the most frequent class.
        """
        with one_thread():
            (images, labels), held_out, everything = self._split()
            model = models.build(
                self.model, everything.images.shape[1:], everything.num_classes, seed=self.seed, **self.model_options
            )
            parts = [(images[c :: self.clients], labels[c :: self.clients]) for c in range(self.clients)]
            draws = itertools.count(self.seed * self.rounds * self.clients)

            def privately(*given, **options):
                return defenses.train_privately(*given, seed=next(draws), **options)

            train = privately if "noise_multiplier" in self.client else federated.train_locally
            accuracies, stop_reason = [], "finished"
            training = {"number": self.rounds, "defend": self._defend, "train": train, **self.client}
            try:
                for trained, _ in federated.rounds(model, parts, **training):
                    with torch.no_grad():
                        accuracies.append(float((trained(held_out[0]).argmax(1) == held_out[1]).double().mean()))
            except (FloatingPointError, ValueError):
                stop_reason = "diverged"
                accuracies.append(float(held_out[1].bincount().max() / len(held_out[1])))
            last = accuracies[-LAST:] if stop_reason == "finished" else accuracies[-1:]
            return {"accuracy": sum(last) / len(last), "accuracies": accuracies, "stop_reason": stop_reason, "arrays": {}}

    def _split(self):
        everything = data.load(self.dataset, source="full" if self.dataset in data.FULL else "bundled")
        order = torch.randperm(len(everything.labels), generator=torch.Generator().manual_seed(self.seed))
        cut = int(HELD_OUT * len(order))
        test, train = order[:cut], order[cut:]
        return (
            (everything.images[train], everything.labels[train]),
            (everything.images[test], everything.labels[test]),
            everything,
        )

    def _defend(self, seen, number, client):
        if not self.defence:
            return seen
        options = dict(self.defence)
        seed = (self.seed * self.rounds + number) * self.clients + client
        return defenses.defend(seen, DEFENCES[options.pop("name")], **{"observer": "server", "seed": seed, **options})
