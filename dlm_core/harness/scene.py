"""What a trial says, played: the client trains, the defence defends, the attack attacks, and the
result is judged.
"""

import copy
import dataclasses
import functools
from typing import Any

import torch
from torch import nn

from dlm_core import coordinates, data, defenses, federated, models, optimizers, records
from dlm_core.harness.judge import arrays, judge
from dlm_core.observation import Observation
from dlm_core.results import Reconstruction, Status
from dlm_core.threads import client_seed, one_thread, own_generator

# Names that stand for functions and dtypes among an attack's options, so that a trial stays plain
# data.
PARTS = {
    "pixels": coordinates.pixels,
    "cosines": coordinates.cosines,
    "lbfgs": optimizers.lbfgs,
    "released_lbfgs": optimizers.released_lbfgs,
    "adam": optimizers.adam,
    "slow_adam": optimizers.slow_adam,
    "signed_adam": optimizers.SignedAdam,
}
DTYPES = {name: getattr(torch, name) for name in ("float64", "float32", "bfloat16", "float16")}
OPTION_PARTS = {"optimizer": PARTS, "coordinates": PARTS, "transmitted": DTYPES, "dtype": DTYPES}
# What an attack is told of the true labels [B]; "last" is what the released script does on a batch.
TOLD_LABELS = {
    "given": lambda labels: labels,
    "last": lambda labels: labels[-1:].expand(len(labels)),
}


def play(trial: Any) -> dict[str, Any]:
    """Return the trial's record: plain numbers and strings, and under "arrays" tensors (images,
    losses, history).

    Bit-identical on one machine for any number of workers: it runs on one torch thread, and what
    takes no generator of its own, such as dropout, follows from the trial's seed. A client or an
    attack that diverges numerically is a result, not an error; so is a client whose weights do
    not change. Its ``Status`` says so.
    """
    with one_thread(), own_generator(trial.seed):
        try:
            seen, images, labels = observe(trial)
        except FloatingPointError:
            return _without_picture(Status.CLIENT_DIVERGED)
        except federated.Unchanged:
            return _without_picture(Status.CLIENT_UNCHANGED)
        try:
            found = attack(trial, seen, labels)
        except torch.linalg.LinAlgError:
            # a defence may leave too little for exact recovery's equations
            return _without_picture(Status.SINGULAR)
        return {**judge(found, images, labels), "arrays": arrays(found)}


def _without_picture(status: Status) -> dict[str, Any]:
    return {"stop_reason": str(status), "arrays": {}}


def observe(trial: Any) -> tuple[Any, torch.Tensor, torch.Tensor]:
    """The client's side of a trial.

    Returns
    -------
    seen
        The Observation after the defence; of the protocol "rounds" a list of them.
    images, labels
        The truth, [B, C, H, W], and what the client trained them with, [B].
    """
    images, labels = truth_of(trial, trial.num_images)
    with own_generator(client_seed(trial.seed)):
        model = received(trial)
        model.train(trial.client.mode == "train")
        model = model.to(DTYPES[trial.client.dtype])
        if trial.protocol is not None:
            return take_part(trial, model), images, labels
        in_client = images.to(DTYPES[trial.client.dtype])
        seen = federated.train_locally(model, in_client, labels, **training(trial.client))
        return defend(trial, seen), images, labels


def truth_of(trial: Any, num_images: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The trial's first images [B, C, H, W], and the labels [B] that clients train them with."""
    chosen = range(trial.index, trial.index + num_images)
    truth = data.load(trial.dataset, indices=chosen, source=trial.source)
    if trial.client.label is None:
        return truth.images, truth.labels
    return truth.images, torch.full_like(truth.labels, trial.client.label)


def defend(trial: Any, seen: Observation, turn: int = 0, client: int = 0) -> Observation:
    """What the trial's defence leaves of an Observation.

    Parameters
    ----------
    trial
        A ``trials.Trial``, here and below.
    seen
        What the client would send.
    turn, client
        Numbers of the round and of the client; each has noise of its own.
    """
    setting: defenses.Setting | None = trial.defence
    if setting is None:
        return seen
    return setting.defend(seen, client_seed(trial.seed, turn, client))


def take_part(trial: Any, model: nn.Module) -> Any:
    """What the trial's protocol leaves to its observer: an Observation, of "rounds" a list."""
    images, labels = truth_of(trial, trial.num_images + trial.protocol.others)
    images = images.to(next(model.parameters()))
    clients = list(zip(images.split(1), labels.split(1)))
    options = dict(trial.protocol.options)
    if trial.defence is not None:
        options["defend"] = functools.partial(defend, trial)
    protocol = records.PROTOCOLS[trial.protocol.name].function
    return protocol(model, clients, **options, **training(trial.client, plainly=True))


def training(client: Any, *, plainly: bool = False) -> dict[str, Any]:
    """The keyword arguments of ``federated.train_locally``.

    Parameters
    ----------
    client
        A ``trials.Client``.
    plainly
        Only those that differ from its defaults.
    """
    about = [f for f in dataclasses.fields(client) if f.name not in ("dtype", "mode", "label")]
    given = {f.name: getattr(client, f.name) for f in about}
    given["transmitted"] = None if client.transmitted is None else DTYPES[client.transmitted]
    given["optimizer_options"] = dict(client.optimizer_options) or None
    if not plainly:
        return given
    defaults = {f.name: f.default for f in about} | {"optimizer_options": None}
    return {n: v for n, v in given.items() if n == "learning_rate" or v != defaults[n]}


def received(trial: Any) -> nn.Module:
    """The model that the client receives, trained or not: a copy, to be changed at will."""
    same: dict[str, Any] = {"attack": "grey", "attack_options": {}, "client": {}}
    start = dataclasses.replace(trial, **same, defence=None, protocol=None)
    behind = (records.NETWORKS[trial.model], records.DATA_SETS[trial.dataset])
    if any(record.function.__module__.split(".")[0] != "dlm_core" for record in behind):
        return _made(start)  # a user's own, which may have changed since
    return copy.deepcopy(_shared(start))


def _made(trial: Any) -> nn.Module:
    of = records.DATA_SETS[trial.dataset]
    options = trial.model_options
    model = models.build(trial.model, of.image_shape, of.num_classes, seed=trial.seed, **options)
    return train(model, trial) if trial.trained else model


# Trials that differ in client, attack or defence share it.
_shared = functools.lru_cache(maxsize=4)(_made)


def train(model: nn.Module, trial: Any) -> nn.Module:
    """``model`` after ``trial.trained`` rounds of FedAvg: 5 clients, up to 1,000 images, 10 Adam
    steps of 32 images each.
    """
    everything = data.load(trial.dataset, source=trial.source)
    attacked = range(trial.index, trial.index + trial.num_images)
    available = range(min(len(everything.labels), 1000 + trial.num_images))
    others = [i for i in available if i not in attacked]
    clients = [(everything.images[others[c::5]], everything.labels[others[c::5]]) for c in range(5)]
    *_, (model, _) = federated.rounds(
        model,
        clients,
        num_rounds=trial.trained,
        learning_rate=0.01,
        local_steps=10,
        batch_size=32,
        client_optimizer="adam",
    )
    return model


def attack(trial: Any, seen: Any, labels: torch.Tensor) -> Reconstruction:
    """The observer's side of a trial.

    Parameters
    ----------
    trial
        It names the attack and its options.
    seen
        What ``observe`` returned.
    labels
        The true ones [B]; used only where the trial says that the attack is told them.
    """
    record = records.ATTACKS[trial.attack]
    options: dict[str, Any] = {}
    for name, value in trial.attack_options.items():
        known = OPTION_PARTS.get(name)
        options[name] = known[value] if known else value
    if options.get("labels") in TOLD_LABELS:
        options["labels"] = TOLD_LABELS[options["labels"]](labels)
    if "defence" in record.demands:
        options["defence"] = trial.defence
    return record(seen, num_images=trial.num_images, seed=trial.seed, **options)
