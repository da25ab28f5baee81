"""A server that keeps all rounds of one client: the attack that a training's price has to be held
against.

The training is a ``utility.Federation``, the same whose accuracy is the price. One more client with
few images answers each round's W_t. Its part of the mean, one image in some 1,400, is left out, so
that one training serves for many attacked clients; and so are the first images of the data set, of
which these are.
"""

import copy
import functools
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from dlm_core import check, data, federated, records
from dlm_core.defenses import Setting
from dlm_core.harness.judge import arrays, judge
from dlm_core.harness.keys import result_key
from dlm_core.harness.utility import Federation
from dlm_core.observation import Observation, Unchanged
from dlm_core.records import Options, Plain
from dlm_core.results import Status
from dlm_core.threads import client_seed, one_thread, own_generator

RESERVED = 100  # images from the first on: attacked, and trained on by no other client


@dataclass(frozen=True, kw_only=True)
class Watched:
    """One client in all rounds of a training, and one attack: plain data like a ``trials.Trial``,
    and run by the same ``sweeps.sweep``.

    Attributes
    ----------
    training
        The Federation whose rounds are watched.
    shown
        What the client does with each answer; its observer is the server, who sent W_t.
    attack
        Key of ``records.ATTACKS``, with ``attack_options``. It is told the defence; "labels":
        "given" tells it the true labels.
    averaged
        The attack gets one Observation, the mean of all answers over the mean W_t. The quotient of
        a first layer's update survives that: all rounds have the same input. Else it gets a list.
    index, num_images
        The client's images: so many from that index on, among the first ``RESERVED``.
    local_steps
        Of the client, each on all its images.
    every
        Only each so many-th round is kept.

    Raises
    ------
    ValueError
        For an unknown name or option, or a value of its own out of range, when the value is made;
        values of options are refused when it runs.
    """

    training: Federation
    shown: Setting
    attack: str
    attack_options: Plain = field(default_factory=Options)
    averaged: bool = False
    index: check.Whole = 0
    num_images: check.Count = 1
    local_steps: check.Count = 1
    every: check.Count = 1

    def __post_init__(self) -> None:
        try:
            shown = replace(Setting.of(self.shown), observer="server")
        except ValueError as why:
            raise ValueError(f"shown: {why}") from why
        object.__setattr__(self, "shown", shown)
        check.fields(self)
        if self.index + self.num_images > RESERVED:
            raise ValueError(
                f"index is {self.index} with num_images {self.num_images}; a watched client has "
                f"images among the first {RESERVED}"
            )
        check.one_of("attack", self.attack, records.ATTACKS)
        record = records.ATTACKS[self.attack]
        record.check_options("attack_options", self.attack_options)
        record.check_told([*self.attack_options, "defence"])

    @property
    def key(self) -> str:
        """The name of the result."""
        training = self.training
        named: list[records.Record] = [records.NETWORKS[training.model]]
        named += [records.ATTACKS[self.attack], self.shown.record]
        named += [training.defence.record] if training.defence else []
        source = data.served(training.dataset)
        modules = ["dlm_core.harness.all_rounds"]
        return result_key(self, modules, named, training.dataset, source)

    def run(self) -> dict[str, Any]:
        """The record: ``judge``'s numbers, the number of ``rounds`` seen, and the images."""
        with one_thread(), own_generator(self.training.seed):
            everything = data.load(self.training.dataset)
            chosen = slice(self.index, self.index + self.num_images)
            images, labels = everything.images[chosen], everything.labels[chosen]
            with own_generator(client_seed(self.training.seed, self._number)):
                rounds = self._rounds(images, labels)
            if not rounds:
                return {"stop_reason": str(Status.CLIENT_UNCHANGED), "arrays": {}, "rounds": 0}
            try:
                found = self._attack(rounds, labels)
            except torch.linalg.LinAlgError:
                return {"stop_reason": str(Status.SINGULAR), "arrays": {}, "rounds": len(rounds)}
            judged = judge(found, images, labels)
            return {**judged, "rounds": len(rounds), "arrays": arrays(found)}

    def _rounds(self, images: torch.Tensor, labels: torch.Tensor) -> list[Observation]:
        """What the server sees of the client: its answers to the W_t of the training."""
        rounds = []
        rate = self.training.client.learning_rate
        for turn, model in enumerate(_sent(self.training, self.training.key)):
            if turn % self.every:
                continue
            how: dict[str, Any] = {"learning_rate": rate, "local_steps": self.local_steps}
            try:
                seen = federated.train_locally(model, images, labels, **how)
                rounds.append(self.shown.defend(seen, self._noise(turn)))
            except Unchanged:
                continue  # nothing came of this round
            except FloatingPointError:
                break  # the training has diverged
        return rounds

    @property
    def _number(self) -> int:
        """Of the client, after those of the training."""
        return self.training.num_clients + self.index

    def _noise(self, turn: int) -> int:
        return client_seed(self.training.seed, turn, self._number)

    def _attack(self, rounds: list[Observation], labels: torch.Tensor) -> Any:
        options: dict[str, Any] = dict(self.attack_options)
        if options.get("labels") == "given":
            options["labels"] = labels
        told = self.shown
        seen: Any = rounds
        if self.averaged:
            seen, told = averaged(rounds), replace(told, repeats=len(rounds))
        record, seed = records.ATTACKS[self.attack], self.training.seed
        return record(seen, defence=told, num_images=self.num_images, seed=seed, **options)


@check.arguments
def averaged(rounds: Sequence[Observation]) -> Observation:
    """The mean of several rounds as one Observation: mean W_t, mean answer.

    Parameters
    ----------
    rounds
        Of one architecture, at least one.
    """
    check.at_least("number of rounds", len(rounds), 1)
    model, alike = copy.deepcopy(rounds[0].model), [1] * len(rounds)
    model.load_state_dict(federated.average([each.model.state_dict() for each in rounds], alike))
    after = federated.average([each.weights_after for each in rounds], alike)
    return Observation(model, after, rounds[0].image_shape, rounds[0].num_classes)


@functools.lru_cache(maxsize=4)
def _sent(training: Federation, key: str) -> list[nn.Module]:
    """W_t of each round, of a training like that of ``Federation.run``.

    Parameters
    ----------
    training
        The training.
    key
        Its own, which names the code and the images behind it: a user's may have changed.
    """
    with own_generator(training.seed):
        return _received(training)


def _received(training: Federation) -> list[nn.Module]:
    (images, labels), _, everything = training.split()
    reserved = everything.images[:RESERVED].flatten(1)
    others = torch.cdist(images.flatten(1), reserved).min(1).values > 0
    sent = []
    try:
        for model in training.rounds(images[others], labels[others]):
            sent.append(model)
    except (FloatingPointError, Unchanged):
        return sent
    return sent[:-1]
