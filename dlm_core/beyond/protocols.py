"""Other ways to learn together, run for real, and what a curious party of each holds.

What it holds is an Observation, which every attack takes. A client is (images [N, C, H, W],
labels [N]). A list of clients begins with the one that is looked at. Where the observer takes part,
it is the last: it sees the sum of what it knows and what it wants to know, and subtracts the
former.
"""

import copy
import importlib
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Any

import torch
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

from dlm_core import check, federated, objectives, records
from dlm_core.arrays import for_model
from dlm_core.federated import Client
from dlm_core.observation import Observation
from dlm_core.results import Reconstruction
from dlm_core.weights import StateDict, held_as, rounded

Tensors = Sequence[torch.Tensor]
Defend = Callable[[Observation, int, int], Observation]


@records.protocol("fedsgd", title="FedSGD")
@check.renamed(lr="learning_rate", number="num_rounds")
@check.arguments
def fedsgd(
    model: nn.Module,
    clients: Sequence[Client],
    *,
    learning_rate: check.Positive,
    num_rounds: check.Count = 1,
) -> Observation:
    """FedSGD (McMahan et al. 2017): clients send their gradients, and the server steps.

    Parameters
    ----------
    model
        With the weights of the start.
    clients
        (images, labels) of each, at least one.
    learning_rate
        η > 0 of the server, which steps by η times the mean of the gradients.
    num_rounds
        How many steps, at least 1.

    Returns
    -------
    Observation
        What the server sees of the first client in the last round: (W_t, W_t - g), a step of
        rate 1, known.
    """
    check.at_least("number of clients", len(clients), 1)
    for _ in range(num_rounds):
        seen = [federated.train_locally(model, *client, learning_rate=1.0) for client in clients]
        sent = [each.delta for each in seen]
        mean = [torch.stack(layers).mean(0) for layers in zip(*sent)]
        model = copy.deepcopy(model)
        model.load_state_dict(_stepped(model, [learning_rate * layer for layer in mean]))
    return seen[0]


@records.protocol("aggregate", title="aggregate", defended=True)
@records.passes_on_to(federated.train_locally)
@check.arguments
def aggregate(
    model: nn.Module,
    clients: Sequence[Client],
    *,
    curious: bool = False,
    defend: Defend | None = None,
    **training: Any,
) -> Observation:
    """One round of FedAvg of which only the mean of the clients' weights is seen.

    That is secure aggregation, or a global model: each client counts by its number of images. With
    one step and one η, it is a step on the joint batch.

    Parameters
    ----------
    model
        With the weights that all clients receive.
    clients
        (images, labels) of each.
    curious
        Whether the observer is the last client of two or more, who subtracts its own part.
    defend
        As in ``federated.rounds``.
    **training
        Of ``federated.train_locally``.

    Returns
    -------
    Observation
        Of the mean of all, or of the others' mean.
    """
    check.at_least("number of clients", len(clients), 2 if curious else 1)
    ((after, seen),) = federated.rounds(model, clients, num_rounds=1, defend=defend, **training)
    shape = seen[0].image_shape
    # what they received, whatever of it an observer is left by a defence
    received = rounded(model.state_dict(), training.get("transmitted"))
    everyone = federated.observe(model, received, after.state_dict(), shape)
    if not curious:
        return everyone
    sizes = [len(labels) for _, labels in clients]
    # by what it received itself, whatever others see of that
    own = federated.observe(model, received, seen[-1].weights_after, shape)
    update = others(everyone.delta, own.delta, sum(sizes) / sizes[-1])
    return _moved(everyone.model, update, shape)


@check.arguments
def others(
    mean: Tensors, own: Tensors, number: Annotated[float, check.Range(1, open_low=True)]
) -> list[torch.Tensor]:
    """The mean update of the others.

    Parameters
    ----------
    mean
        The mean update of all, one tensor per parameter.
    own
        That of the one among them who asks.
    number
        How many of its size they are, itself included: all images over its own.

    Raises
    ------
    ValueError
        Where the two updates are of networks of different architecture.
    """
    if [layer.shape for layer in mean] != [layer.shape for layer in own]:
        raise ValueError("mean and own are updates of networks of different architecture")
    return [(number * a.double() - b.double()) / (number - 1) for a, b in zip(mean, own)]


@records.protocol("rounds", title="several rounds", defended=True)
@records.passes_on_to(federated.train_locally)
@check.renamed(number="num_rounds")
@check.arguments
def rounds(
    model: nn.Module,
    clients: Sequence[Client],
    *,
    num_rounds: check.Count,
    defend: Defend | None = None,
    **training: Any,
) -> list[Observation]:
    """Several rounds of FedAvg, as its server sees the first client.

    Parameters
    ----------
    model
        With the weights of the start.
    clients
        (images, labels) of each, at least one.
    num_rounds
        How many, at least 1.
    defend
        As in ``federated.rounds``.
    **training
        Of ``federated.train_locally``.

    Returns
    -------
    list of Observation
        One a round, each from another W_t.
    """
    every = federated.rounds(model, clients, num_rounds=num_rounds, defend=defend, **training)
    return [seen[0] for _, seen in every]


@records.protocol("data_parallel", title="data-parallel")
@check.renamed(lr="learning_rate", number="num_rounds")
@check.arguments
def data_parallel(
    model: nn.Module,
    clients: Sequence[Client],
    *,
    learning_rate: check.Positive,
    curious: bool = True,
    num_rounds: check.Count = 1,
    timeout: check.Positive = 300,
) -> Observation:
    """Synchronous data-parallel SGD: a process for each client, gradients averaged over gloo.

    DistributedDataParallel leaves every worker with the mean gradient. One who knows its own share
    can subtract it.

    Parameters
    ----------
    model
        With the weights of the start.
    clients
        (images, labels) of each, at least two.
    learning_rate
        η > 0.
    curious
        Whether the observer is the last worker, and subtracts its share; else it sees the mean.
    num_rounds
        How many steps, at least 1.
    timeout
        Seconds.

    Returns
    -------
    Observation
        (W_t, W_t - the others' mean gradient) of the last step; that of the mean of all without
        ``curious``.

    Raises
    ------
    TimeoutError
        After ``timeout`` seconds.
    RuntimeError
        Where a worker failed. No process outlives the call.
    """
    check.at_least("number of clients", len(clients), 2)
    for images, labels in clients:
        federated.head_for(model, images, labels)
    clients = [(for_model(images, model), labels) for images, labels in clients]
    with tempfile.TemporaryDirectory() as folder:
        task = (model, clients, learning_rate, num_rounds, timeout, _has_unused(model, clients[0]))
        torch.save(task, Path(folder) / "task")
        _run(len(clients), folder, timeout)
        weights, mean, own = torch.load(Path(folder) / "seen", weights_only=True)
    model = copy.deepcopy(model)
    model.load_state_dict(weights)
    update = others(mean, own, len(clients)) if curious else mean
    return _moved(model, update, clients[0][0].shape[1:])


def _has_unused(model: nn.Module, client: Client) -> bool:
    """Whether a parameter is to be trained on which the scores do not hang."""
    model, (images, labels) = copy.deepcopy(model), client
    trained = [p for p in model.parameters() if p.requires_grad]
    loss = federated.loss(model(images), labels)
    return any(g is None for g in torch.autograd.grad(loss, trained, allow_unused=True))


def _run(number: int, folder: str, timeout: float) -> None:
    """Run ``number`` workers to their end.

    They are plain processes of Python, which start alike from scripts, notebooks and workers.
    """
    project = str(Path(__file__).parents[2])
    script = (
        f"import sys; sys.path.insert(0, {project!r}); "
        "from dlm_core.beyond import protocols; protocols._work"
    )
    log, end = Path(folder) / "errors", time.monotonic() + timeout
    with open(log, "w") as errors:
        quiet: dict[str, Any] = {
            "stdin": subprocess.DEVNULL,
            "stdout": subprocess.DEVNULL,
            "stderr": errors,
        }
        calls = [f"{script}({rank}, {number}, {folder!r})" for rank in range(number)]
        workers = [subprocess.Popen([sys.executable, "-c", call], **quiet) for call in calls]
        try:
            while None in (codes := [worker.poll() for worker in workers]) and not any(codes):
                if time.monotonic() > end:
                    raise TimeoutError(
                        f"data-parallel training has not ended within {timeout} seconds"
                    )
                time.sleep(0.05)
        finally:
            for worker in workers:
                worker.kill()
                worker.wait()
    if any(codes):
        last = log.read_text().strip().splitlines()[-1:]
        raise RuntimeError(f"a data-parallel worker failed: {last}")


def _work(rank: int, size: int, folder: str) -> None:
    """A worker of ``data_parallel``.

    The last writes down what it saw in the last step: W_t, mean gradient, its own gradient.
    """
    torch.set_num_threads(1)
    loopback = next(name for _, name in socket.if_nameindex() if name.startswith("lo"))
    os.environ["GLOO_SOCKET_IFNAME"] = loopback
    task = torch.load(Path(folder) / "task", weights_only=False)  # written by data_parallel
    model, clients, learning_rate, num_rounds, timeout, unused = task
    distributed.init_process_group(
        "gloo",
        init_method=f"file://{folder}/meeting",
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=timeout),
    )
    images, labels = clients[rank]
    parallel = DistributedDataParallel(model, find_unused_parameters=unused)
    sgd = torch.optim.SGD(model.parameters(), lr=learning_rate)
    for _ in range(num_rounds):
        before = copy.deepcopy(model.state_dict())
        own = [g.detach() for g in objectives.gradient(model, federated.loss, images, labels)]
        sgd.zero_grad()
        federated.loss(parallel(images), labels).backward()
        sgd.step()
    if rank == size - 1:
        mean = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]
        torch.save((before, mean, own), Path(folder) / "seen")
    distributed.destroy_process_group()


@records.protocol("gossip", title="gossip")
@check.renamed(lr="learning_rate")
@check.arguments
def gossip(
    model: nn.Module,
    clients: Sequence[Client],
    *,
    learning_rate: check.Positive,
    turn: check.Whole = 0,
    accomplice: bool = False,
    private: bool = False,
) -> Observation:
    """Decentralised SGD on a ring, as the last peer sees the first, its neighbour.

    Parameters
    ----------
    model
        With the weights that the peers start from.
    clients
        (images, labels) of each peer, at least two.
    learning_rate
        η > 0.
    turn
        The round that is looked at, from 0.
    accomplice
        Whether the listener also knows the messages of the first peer's other neighbour.
    private
        Whether each peer starts from weights of its own, the model's in another order.

    Returns
    -------
    Observation
        Of the first peer's step in round ``turn``.

    Notes
    -----
    The listener knows its own messages and those of its two neighbours. Without an accomplice it
    takes the message it lacks for the mean of those it knows. That is right in round 0 from a
    common start, and where there are no more than three peers; a guess otherwise.
    """
    size = len(clients)
    check.at_least("number of clients", size, 2)
    starts = [shuffled(model, peer) if private else model for peer in range(size)]
    messages = exchange(starts, clients, learning_rate=learning_rate, num_rounds=turn + 1)
    heard = {*ring(size - 1, size), *([1] if accomplice else [])}
    before, after = messages[turn][0], messages[turn + 1][0]
    mixed = _mean(messages[turn], [peer for peer in ring(0, size) if peer in heard])
    step = {
        name: held_as(w.double() + after[name].double() - mixed[name], w)
        for name, w in before.items()
    }
    return federated.observe(model, before, step, clients[0][0].shape[1:])


@records.protocol("two_hops", title="two hops")
@check.renamed(lr="learning_rate")
@check.arguments
def two_hops(
    model: nn.Module,
    clients: Sequence[Client],
    *,
    learning_rate: check.Positive,
    attack: str | Callable[[Observation], Reconstruction] = "exact",
) -> Observation:
    """The same ring, and a listener two hops from the first peer, whom it never hears.

    Parameters
    ----------
    model
        With the weights that all peers start from.
    clients
        (images, labels) of each peer, at least four.
    learning_rate
        η > 0.
    attack
        The listener's, on the peer between: a key of ``records.ATTACKS``, or a function of an
        Observation. It has to find image, label and learning rate.

    Returns
    -------
    Observation
        Of the first peer's step in round 0.

    Raises
    ------
    ValueError
        Where the attack finds no learning rate.

    Notes
    -----
    The peer between them gives its image away in round 0. In round 1 its own gradient can be
    computed and subtracted, and what remains of its message is what the first peer had sent it.
    """
    check.at_least("number of clients", len(clients), 4)
    if isinstance(attack, str):
        importlib.import_module("dlm_core.beyond.exact")  # the default; others as they are imported
        check.one_of("attack", attack, records.ATTACKS)
        attack = records.ATTACKS[attack]
    starts = [model] * len(clients)
    messages = exchange(starts, clients, learning_rate=learning_rate, num_rounds=2)
    between = [turn[-1] for turn in messages]
    listener = [turn[-2] for turn in messages]
    shape = clients[0][0].shape[1:]
    found = attack(federated.observe(model, between[0], between[1], shape))
    if found.learning_rate is None:
        raise ValueError("attack found no learning rate; two_hops takes one that finds it")
    sent = _unmixed(model, between, listener[1], found)
    return federated.observe(model, messages[0][0], sent, shape)


def _unmixed(
    model: nn.Module, between: Sequence[StateDict], listener: StateDict, found: Reconstruction
) -> StateDict:
    """What the first peer sent in round 1.

    It is what the peer ``between`` mixed then, less its own message, the listener's, and its own
    step on the image that was found.
    """
    assert found.learning_rate is not None  # ``two_hops`` refuses other attacks
    peer = copy.deepcopy(model).double()
    peer.load_state_dict(between[1])
    images = for_model(found.images, peer)
    gradients = objectives.gradient(peer, federated.loss, images, found.labels)
    sent = dict(between[1])
    for (name, own), g in zip(peer.named_parameters(), gradients):
        mixed = between[2][name].double() + found.learning_rate * g.detach()
        sent[name] = (3 * mixed - own.detach() - listener[name].double()).to(sent[name])
    return sent


@check.renamed(lr="learning_rate", number="num_rounds")
@check.arguments
def exchange(
    starts: Sequence[nn.Module],
    clients: Sequence[Client],
    *,
    learning_rate: check.Positive,
    num_rounds: check.Count,
) -> list[list[StateDict]]:
    """D-PSGD (Lian et al. 2017, algorithm 1) on a ring.

    In each round W_i ← mean of W over peer i and its neighbours - η g_i(W_i).

    Parameters
    ----------
    starts
        One model per client.
    clients
        (images, labels) of each peer, at least two.
    learning_rate
        η > 0.
    num_rounds
        At least 1.

    Returns
    -------
    list of list of state dict
        The messages [num_rounds + 1][peer], each sent to both neighbours.

    Raises
    ------
    ValueError
        Where ``starts`` has not one model for each client.
    """
    check.at_least("number of clients", len(clients), 2)
    if len(starts) != len(clients):
        raise ValueError(f"starts has {len(starts)} models; it takes one for each client")
    messages = [[model.state_dict() for model in starts]]
    for _ in range(num_rounds):
        before, sent = messages[-1], []
        for i, client in enumerate(clients):
            peer = copy.deepcopy(starts[i])
            peer.load_state_dict(before[i])
            after = federated.train_locally(peer, *client, learning_rate=learning_rate)
            mixed = _mean(before, ring(i, len(clients)))
            sent.append(_plus_step(mixed, before[i], after.weights_after))
        messages.append(sent)
    return messages


def _plus_step(mixed: StateDict, before: StateDict, after: StateDict) -> StateDict:
    """``mixed`` moved as ``before`` was to ``after``, in its precision."""
    return {
        name: held_as(mixed[name] + after[name].double() - w.double(), w)
        for name, w in before.items()
    }


@check.arguments
def ring(peer: check.Whole, size: Annotated[int, check.Range(2)]) -> list[int]:
    """The peer and its neighbours, ascending, on a ring of ``size`` >= 2.

    Raises
    ------
    ValueError
        Where ``peer`` is no peer of such a ring.
    """
    if peer >= size:
        raise ValueError(f"peer is {peer}; a ring of size {size} has peers 0 to {size - 1}")
    return sorted({(peer + step) % size for step in (-1, 0, 1)})


def _mean(snapshots: Sequence[StateDict], members: Sequence[int]) -> StateDict:
    """The mean over ``members``, in float64."""
    return {
        name: torch.stack([snapshots[i][name].double() for i in members]).mean(0)
        for name in snapshots[0]
    }


@check.arguments
def shuffled(model: nn.Module, seed: check.Whole) -> nn.Module:
    """A copy with the entries of each parameter in another order."""
    model, draws = copy.deepcopy(model), torch.Generator().manual_seed(seed)
    for p in model.parameters():
        order = torch.randperm(p.numel(), generator=draws).to(p.device)
        p.data = p.data.flatten()[order].reshape(p.shape)
    return model


def _moved(model: nn.Module, update: Tensors, image_shape: Sequence[int]) -> Observation:
    """The Observation (W, W - ``update``)."""
    return federated.observe(model, model.state_dict(), _stepped(model, update), image_shape)


def _stepped(model: nn.Module, update: Tensors) -> StateDict:
    """W - ``update``, a state dict."""
    named = zip(model.named_parameters(), update)
    steps = {name: (p.detach().double() - u).to(p) for (name, p), u in named}
    return {**model.state_dict(), **steps}
