"""Other ways to learn together, run for real, and what a curious party of each holds: Observations, which every attack takes.

A client is (images [N, C, H, W], labels [N]); a list of clients begins with the one that is looked at, and where the observer
takes part it is the last. It sees the sum of what it knows and what it wants to know, and subtracts the former.
"""

import copy
import math
import os
import socket
import subprocess
import sys
import tempfile
import time
from datetime import timedelta
from pathlib import Path

import torch
from torch import distributed
from torch.nn.parallel import DistributedDataParallel

from dlm_core import check, federated, records


@records.protocol("fedsgd", title="FedSGD")
@check.renamed(lr="learning_rate", number="num_rounds")
def fedsgd(model, clients, *, learning_rate, num_rounds=1):
    """FedSGD (McMahan et al. 2017): clients send their gradients g, the server steps by ``learning_rate`` times their mean, ``num_rounds`` times.

    Returns what the server sees of the first client in the last round, the Observation (W_t, W_t - g): of rate 1, known.
    """
    check.at_least("num_rounds", num_rounds, 1)
    check.in_range("learning_rate", learning_rate, 0, math.inf, open_low=True)
    for _ in range(num_rounds):
        seen = [federated.train_locally(model, *client, learning_rate=1.0) for client in clients]
        sent = [each.delta for each in seen]
        mean = [torch.stack(layers).mean(0) for layers in zip(*sent)]
        model = copy.deepcopy(model)
        model.load_state_dict(_stepped(model, [learning_rate * layer for layer in mean]))
    return seen[0]


@records.protocol("aggregate", title="aggregate", defended=True)
@records.passes_on_to(federated.train_locally)
def aggregate(model, clients, *, curious=False, **training):
    """One round of FedAvg of which only the mean of the clients' weights is seen: secure aggregation, or a global model.

    With equal sizes, one step and one η that is a step on the joint batch. The Observation of it, or with ``curious`` that of
    the last client, who subtracts its own part. ``training``: keyword arguments of ``federated.train_locally``.
    """
    ((after, seen),) = federated.rounds(model, clients, num_rounds=1, **training)
    everyone = federated.observe(model, model.state_dict(), after.state_dict(), seen[0].image_shape)
    if not curious:
        return everyone
    return _moved(model, others(everyone.delta, seen[-1].delta, len(clients)), seen[0].image_shape)


def others(mean, own, number):
    """The mean update of the others, where ``mean`` is that of ``number`` >= 2 parties, ``own`` among them; lists of tensors."""
    check.at_least("number", number, 2)
    return [(number * a.double() - b.double()) / (number - 1) for a, b in zip(mean, own)]


@records.protocol("rounds", title="several rounds", defended=True)
@records.passes_on_to(federated.train_locally)
@check.renamed(number="num_rounds")
def rounds(model, clients, *, num_rounds, defend=None, **training):
    """``num_rounds`` rounds of FedAvg as its server sees the first client: a list of Observations, each from another W_t.

    defend  as in ``federated.rounds``; ``training`` as in ``aggregate``.
    """
    return [seen[0] for _, seen in federated.rounds(model, clients, num_rounds=num_rounds, defend=defend, **training)]


@records.protocol("data_parallel", title="data-parallel")
@check.renamed(lr="learning_rate", number="num_rounds")
def data_parallel(model, clients, *, learning_rate, curious=True, num_rounds=1, timeout=300):
    """Synchronous data-parallel SGD: a process for each client, gradients averaged by DistributedDataParallel over gloo.

    Every worker holds the mean gradient; a ``curious`` one, here the last, knows its own share and subtracts it. Returns its
    Observation (W_t, W_t - the others' mean gradient) of the last of ``num_rounds`` steps; that of the mean of all without
    ``curious``. Raises TimeoutError after ``timeout`` seconds, RuntimeError where a worker failed; no process outlives
    the call.
    """
    check.at_least("num_rounds", num_rounds, 1)
    check.at_least("number of clients", len(clients), 2)
    check.in_range("learning_rate", learning_rate, 0, math.inf, open_low=True)
    with tempfile.TemporaryDirectory() as folder:
        torch.save((model, clients, learning_rate, num_rounds, timeout), Path(folder) / "task")
        _run(len(clients), folder, timeout)
        weights, mean, own = torch.load(Path(folder) / "seen", weights_only=True)
    model = copy.deepcopy(model)
    model.load_state_dict(weights)
    return _moved(model, others(mean, own, len(clients)) if curious else mean, clients[0][0].shape[1:])


def _run(number, folder, timeout):
    """Run ``number`` workers to their end: plain processes of Python, which start alike from scripts, notebooks and workers."""
    script = f"import sys; sys.path.insert(0, {str(Path(__file__).parents[2])!r}); from dlm_core.beyond import protocols; protocols._work"
    log, end = Path(folder) / "errors", time.monotonic() + timeout
    with open(log, "w") as errors:
        quiet = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": errors}
        commands = [[sys.executable, "-c", f"{script}({rank}, {number}, {folder!r})"] for rank in range(number)]
        workers = [subprocess.Popen(command, **quiet) for command in commands]
        try:
            while None in (codes := [worker.poll() for worker in workers]) and not any(codes):
                if time.monotonic() > end:
                    raise TimeoutError(f"data-parallel training has not ended within {timeout} seconds")
                time.sleep(0.05)
        finally:
            for worker in workers:
                worker.kill()
                worker.wait()
    if any(codes):
        raise RuntimeError(f"a data-parallel worker failed: {log.read_text().strip().splitlines()[-1:]}")


def _work(rank, size, folder):
    """A worker of ``data_parallel``; the last writes down what it saw in the last step: W_t, mean gradient, its own gradient."""
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = next(name for _, name in socket.if_nameindex() if name.startswith("lo"))  # loopback
    model, clients, learning_rate, num_rounds, timeout = torch.load(Path(folder) / "task", weights_only=False)  # written by data_parallel
    limits = {"rank": rank, "world_size": size, "timeout": timedelta(seconds=timeout)}
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", **limits)
    images, labels = clients[rank]
    parallel = DistributedDataParallel(model)
    sgd = torch.optim.SGD(model.parameters(), lr=learning_rate)
    for _ in range(num_rounds):
        before = copy.deepcopy(model.state_dict())
        own = torch.autograd.grad(federated.loss(model(images), labels), list(model.parameters()))
        sgd.zero_grad()
        federated.loss(parallel(images), labels).backward()
        sgd.step()
    if rank == size - 1:
        torch.save((before, [p.grad for p in model.parameters()], list(own)), Path(folder) / "seen")
    distributed.destroy_process_group()


@records.protocol("gossip", title="gossip")
@check.renamed(lr="learning_rate")
def gossip(model, clients, *, learning_rate, turn=0, accomplice=False, private=False):
    """Decentralised SGD on a ring, as the last peer sees the first, its neighbour: the Observation of its step in round ``turn``.

    The listener knows its own messages and those of its two neighbours, with an ``accomplice`` also those of the first peer's
    other neighbour. Without it takes that one's for the mean of those it knows: right in round 0 from a common start, and
    where there are no more than three peers; a guess otherwise.

    private  each peer starts from weights of its own, the model's in another order, instead of from the model's.
    """
    size = len(clients)
    messages = exchange([_shuffled(model, i) if private else model for i in range(size)], clients, learning_rate=learning_rate, num_rounds=turn + 1)
    heard = {*ring(size - 1, size), *([1] if accomplice else [])}
    before, after = messages[turn][0], messages[turn + 1][0]
    mixed = _mean(messages[turn], [i for i in ring(0, size) if i in heard])
    step = {name: (w.double() + after[name].double() - mixed[name]).to(w) for name, w in before.items()}
    return federated.observe(model, before, step, clients[0][0].shape[1:])


@records.protocol("two_hops", title="two hops")
@check.renamed(lr="learning_rate")
def two_hops(model, clients, *, learning_rate):
    """The same ring, four peers or more from a common start, and a listener two hops from the first peer, whom it never hears.

    The peer between them gives its image away in round 0; in round 1 its own gradient can be computed and subtracted, and what
    remains of its message is what the first peer had sent it. Returns the Observation of the first peer's step in round 0.
    """
    from dlm_core.beyond import exact  # here, for the workers of data_parallel start faster without

    check.at_least("number of clients", len(clients), 4)
    messages, shape = exchange([model] * len(clients), clients, learning_rate=learning_rate, num_rounds=2), clients[0][0].shape[1:]
    found = exact.recover(federated.observe(model, messages[0][-1], messages[1][-1], shape))
    relay = copy.deepcopy(model).double()
    relay.load_state_dict(messages[1][-1])
    gradients = torch.autograd.grad(federated.loss(relay(found.images), found.labels), list(relay.parameters()))
    sent = dict(messages[1][-1])
    for (name, own), g in zip(relay.named_parameters(), gradients):
        mixed = messages[2][-1][name].double() + found.learning_rate * g
        sent[name] = (3 * mixed - own.detach() - messages[1][-2][name].double()).to(sent[name])
    return federated.observe(model, messages[0][0], sent, shape)


def exchange(starts, clients, *, learning_rate, num_rounds):
    """D-PSGD (Lian et al. 2017, algorithm 1): W_i ← mean of W over peer i and its neighbours - η g_i(W_i), ``num_rounds`` rounds.

    starts  one model per client.     Returns the messages [num_rounds + 1][peer]: state dicts, each sent to both neighbours.
    """
    check.at_least("num_rounds", num_rounds, 1)
    check.at_least("number of clients", len(clients), 2)
    messages = [[model.state_dict() for model in starts]]
    for _ in range(num_rounds):
        before, sent = messages[-1], []
        for i, client in enumerate(clients):
            peer = copy.deepcopy(starts[i])
            peer.load_state_dict(before[i])
            after = federated.train_locally(peer, *client, learning_rate=learning_rate).weights_after
            mixed = _mean(before, ring(i, len(clients)))
            sent.append({name: (mixed[name] + after[name].double() - w.double()).to(w) for name, w in before[i].items()})
        messages.append(sent)
    return messages


def ring(peer, size):
    """The peer and its neighbours, ascending."""
    return sorted({(peer + step) % size for step in (-1, 0, 1)})


def _mean(snapshots, members):
    return {name: torch.stack([snapshots[i][name].double() for i in members]).mean(0) for name in snapshots[0]}


def _shuffled(model, seed):
    """A copy with the entries of each parameter in another order."""
    model, draws = copy.deepcopy(model), torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.data = p.data.flatten()[torch.randperm(p.numel(), generator=draws).to(p.device)].reshape(p.shape)
    return model


def _moved(model, update, image_shape):
    """The Observation (W, W - ``update``)."""
    return federated.observe(model, model.state_dict(), _stepped(model, update), image_shape)


def _stepped(model, update):
    """W - ``update``, a state dict."""
    steps = {name: (p.detach().double() - u).to(p) for (name, p), u in zip(model.named_parameters(), update)}
    return {**model.state_dict(), **steps}
