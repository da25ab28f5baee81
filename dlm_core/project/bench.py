"""Seconds, memory and success of the attacks, ours beside the released settings and the peer's, in
one run on one machine.
"""

import contextlib
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import torch
from tqdm import tqdm

from dlm_core import attacks, check, data, federated, label_inference, metrics, models, objectives
from dlm_core.beyond import clients, exact
from dlm_core.harness import memory, sweeps
from dlm_core.harness.interrupts import ended_with_us, kept_from_workers
from dlm_core.harness.paths import REPOSITORY
from dlm_core.observation import Observation
from dlm_core.project import peer
from dlm_core.results import Reconstruction, SearchEvidence, Status

# Of the client, everywhere here.
LEARNING_RATE = 0.01
# What the others' seconds are compared with.
RELEASED = "DLM+, released settings"
Row = dict[str, float]


def _told(attack: Callable[..., Reconstruction], **told: Any) -> Callable[..., Reconstruction]:
    return lambda seen, seed: attack(seen, seed=seed, **told)


# {name: (network, attack)}
ATTEMPTS: dict[str, tuple[str, Callable[..., Reconstruction]]] = {
    "exact": ("lenet", lambda seen, seed: exact.recover(seen)),
    "exact, MLP": ("mlp", lambda seen, seed: exact.recover(seen)),
    "DLM+": ("lenet", _told(attacks.dlm_plus)),
    "DLM+, labels optimised": ("lenet", _told(attacks.dlm_plus, labels="optimised")),
    "DLM, k0 = 100": ("lenet", _told(attacks.dlm, k0=100)),
    "DLG, told η": ("lenet", _told(attacks.dlg, learning_rate=LEARNING_RATE)),
    "iDLG, told η": ("lenet", _told(attacks.idlg, learning_rate=LEARNING_RATE)),
    "IG": ("lenet", _told(attacks.inverting_gradients)),
    RELEASED: ("lenet", lambda seen, seed: released_dlm_plus(seen, seed)),
}
PEERS = {
    "breaching 0.1.2, DLG": "deepleakage",
    "breaching 0.1.2, IG, told the label": "invertinggradients",
}
# What sets the number of threads from outside.
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


@check.arguments
def run(num_images: check.Whole = 20, peer_images: check.Whole = 3) -> None:
    """Print Markdown tables: the attacks on CIFAR-100, what a simulated step costs, what threads
    do.

    Parameters
    ----------
    num_images
        Bundled CIFAR-100 images to attack, from the first on: LeNet, one step of 0.01, and exact
        recovery on the MLP as well. 0 prints the table of threads alone.
    peer_images
        How many of them the peer's attacks meet, which are far slower; 0 leaves them out.
    """
    if num_images:
        data.load("cifar100", n=num_images, source="bundled")  # says so now if there are too few
        _print_attempts(_measured(num_images, peer_images), num_images)
        print()
        cost_of_steps()
        print()
    threads()


def attempt(name: str, i: int) -> Row:
    """One attack on one image.

    Parameters
    ----------
    name
        A key of ATTEMPTS.
    i
        Index of the image.

    Returns
    -------
    dict
        "psnr" in dB, "seconds", "evaluations", and "peak", the process's peak memory in MiB.
    """
    network, attack = ATTEMPTS[name]
    truth, seen = _observed(network, i)
    began = time.perf_counter()
    found = attack(seen, i)
    seconds = time.perf_counter() - began
    psnr = float(metrics.psnr(found.images, truth.images, data_range=1.0))
    used = {"evaluations": found.evaluations, "peak": memory.peak()}
    return {"psnr": psnr, "seconds": seconds, **used}


def cost_of_steps(counts: Sequence[int] = (1, 2, 5, 10, 20, 50), repeats: int = 5) -> None:
    """Print what one evaluation of unrolled DLM's objective and its gradient costs.

    Parameters
    ----------
    counts
        Numbers of simulated steps E.
    repeats
        Evaluations of each, of which the median counts.
    """
    truth = data.load("cifar100", n=1, source="bundled")
    images = truth.images.double()
    model = models.build("lenet").double()
    seen = federated.train_locally(model, images, truth.labels, learning_rate=LEARNING_RATE)
    start = torch.rand(images.shape, generator=torch.Generator().manual_seed(0))
    dummy = start.double().requires_grad_()

    def evaluate(local_steps: int) -> None:
        simulated = clients.update(
            model,
            federated.loss,
            dummy,
            truth.labels,
            learning_rate=LEARNING_RATE,
            local_steps=local_steps,
        )
        torch.autograd.grad(objectives.normalised_distance(simulated, seen.delta), dummy)

    print("| simulated steps E | s/evaluation, median | relative to E = 1, per step |")
    print("|---|---|---|")
    first = None
    for count in counts:
        seconds = [_seconds(evaluate, count) for _ in range(repeats)]
        median = statistics.median(seconds)
        first = first or median
        print(f"| {count} | {median:.4f} | {median / first / count:.2f} |")


def threads(repeats: int = 3) -> dict[str, float]:
    """Print what plain Python costs DLM+ against ``export OMP_NUM_THREADS=1``, alone and beside one
    other busy process.

    Parameters
    ----------
    repeats
        Searches in each setting, by turns, each in a process of its own; the median counts.

    Returns
    -------
    dict of str to float
        {"alone": plain seconds over exported ones, "beside one busy process": …}.
    """
    plain = {n: v for n, v in os.environ.items() if n not in THREAD_VARIABLES}
    exported = {**plain, "OMP_NUM_THREADS": "1"}
    ratios = {}
    print("| DLM+, one image | s, plain Python | s, OMP_NUM_THREADS=1 | plain / exported |")
    print("|---|---|---|---|")
    for where, neighbour in (("alone", None), ("beside one busy process", _busy)):
        seconds: dict[str, list[float]] = {"plain": [], "exported": []}
        with neighbour() if neighbour else contextlib.nullcontext():
            for _ in range(repeats):
                seconds["plain"].append(_search_in_a_process(plain))
                seconds["exported"].append(_search_in_a_process(exported))
        medians = {name: statistics.median(each) for name, each in seconds.items()}
        ratios[where] = medians["plain"] / medians["exported"]
        row = f"{medians['plain']:.2f} | {medians['exported']:.2f} | {ratios[where]:.2f}"
        print(f"| {where} | {row} |", flush=True)
    return ratios


def released_dlm_plus(seen: Observation, seed: int, iterations: int = 200) -> Reconstruction:
    """DLM+ as the released code runs it: float32, N(0, 1) pixels, outer L-BFGS iterations without
    line search, one more evaluation after each to log the loss, and no stopping.

    Parameters
    ----------
    seen
        What the observer sees. The label is told to the released code; here it is inferred, equally
        right.
    seed
        Of the start.
    iterations
        Of L-BFGS, of up to 20 evaluations each.
    """
    update = [layer.float() for layer in seen.delta]
    label = label_inference.infer(seen)
    start = torch.randn(1, *seen.image_shape, generator=torch.Generator().manual_seed(seed))
    dummy = start.requires_grad_()
    optimizer = torch.optim.LBFGS([dummy], lr=1)
    losses: list[float] = []

    def closure() -> torch.Tensor:
        g = objectives.gradient(seen.model, federated.loss, dummy, label)
        loss = objectives.normalised_distance(g, update)
        (dummy.grad,) = torch.autograd.grad(loss, dummy)
        losses.append(float(loss.detach()))
        return loss.detach()

    for _ in range(iterations):
        optimizer.step(closure)
        closure()
    return Reconstruction(
        images=dummy.detach(),
        labels=label,
        status=Status.BUDGET,
        vouched=torch.zeros(1, dtype=torch.bool),
        evidence=SearchEvidence(losses=losses, loss=losses[-1]),
    )


def _observed(network: str, i: int) -> tuple[data.Dataset, Observation]:
    """(The image and its label, what an observer sees of a client that takes one step on it.)"""
    truth = data.load("cifar100", indices=[i], source="bundled")
    model = models.build(network, seed=i)
    seen = federated.train_locally(model, *truth[:2], learning_rate=LEARNING_RATE)
    return truth, seen


def _measured(num_images: int, peer_images: int) -> dict[str, list[Row]]:
    """{attack: what ``attempt`` returns of each image}.

    The attacks take turns on each image, so that whatever else the machine does meets all of them
    alike, each in a process of its own, whose peak memory is measured.
    """
    count = torch.get_num_threads()
    rows: dict[str, list[Row]] = {name: [] for name in ATTEMPTS}
    if peer_images:
        rows |= {name: [] for name in PEERS}
        python = peer.environment()
    spawn = multiprocessing.get_context("spawn")
    with contextlib.ExitStack() as stack:
        pools = {
            name: stack.enter_context(ProcessPoolExecutor(1, spawn, _begin, (count, os.getpid())))
            for name in ATTEMPTS
        }
        # Left before the pools are, which would wait for the attack that is under way.
        stack.enter_context(ended_with_us())
        for i in tqdm(range(num_images), unit="image"):
            for name, pool in pools.items():
                with kept_from_workers():
                    task = pool.submit(attempt, name, i)
                rows[name].append(task.result())
            for name, attack in PEERS.items() if i < peer_images else ():
                rows[name].append(peer.measure(python, attack, i, count))
    return rows


def _print_attempts(measured: Mapping[str, list[Row]], num_images: int) -> None:
    client = f"client SGD, learning rate {LEARNING_RATE}, one step"
    where = f"torch on {torch.get_num_threads()} threads, searches on one"
    print(f"{num_images} CIFAR-100 images, LeNet where not said, {client}; {where}\n")
    quality = "attack | ≥ 20 dB | ≥ 30 dB | median PSNR"
    effort = "s, median | s, mean | share of released | evaluations | peak MiB"
    print(f"| {quality} | {effort} |")
    print("|---|---|---|---|---|---|---|---|---|")
    released = statistics.mean(row["seconds"] for row in measured[RELEASED])
    for name, rows in measured.items():
        psnrs = [row["psnr"] for row in rows]
        seconds = [row["seconds"] for row in rows]
        mean = statistics.mean(seconds)
        shares = [f"{sum(psnr >= wanted for psnr in psnrs)}/{len(rows)}" for wanted in (20, 30)]
        cells = [name, *shares, f"{statistics.median(psnrs):.1f}"]
        cells += [f"{statistics.median(seconds):.2f}", f"{mean:.2f}", f"{mean / released:.2f}"]
        cells.append(f"{statistics.median(row['evaluations'] for row in rows):.0f}")
        cells.append(f"{max(row['peak'] for row in rows):.0f}")
        print(f"| {' | '.join(cells)} |")


def _begin(count: int, master: int) -> None:
    """How a worker starts: on as many threads as its master, whose end is its own."""
    torch.set_num_threads(count)
    sweeps.end_with(master)


def _seconds(work: Callable[..., Any], *arguments: Any) -> float:
    began = time.perf_counter()
    work(*arguments)
    return time.perf_counter() - began


def _search_in_a_process(environment: Mapping[str, str]) -> float:
    """Seconds of one DLM+ search, in a process of its own that has this environment."""
    command = [sys.executable, "-m", "dlm_core.project.bench"]
    done = subprocess.run(
        command, cwd=REPOSITORY, env=dict(environment), check=True, capture_output=True, text=True
    )
    return json.loads(done.stdout)


@contextlib.contextmanager
def _busy() -> Iterator[None]:
    """Within it, another process computes without end."""
    other = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        yield
    finally:
        other.kill()
        other.wait()


if __name__ == "__main__":
    _, _seen = _observed("lenet", 0)
    print(_seconds(attacks.dlm_plus, _seen))
