"""Seconds, memory and success of the attacks, ours beside the released settings and the peer's, in one run on one machine."""

import multiprocessing
import os
import resource
import statistics
import time
from concurrent.futures import ProcessPoolExecutor

import torch
from tqdm import tqdm

from dlm_core import attacks, check, data, federated, label_inference, metrics, models, objectives
from dlm_core.beyond import clients, exact
from dlm_core.harness import sweeps
from dlm_core.project import peer

ATTEMPTS = {  # name: (network, attack)
    "exact": ("lenet", lambda seen, seed: exact.recover(seen)),
    "exact, MLP": ("mlp", lambda seen, seed: exact.recover(seen)),
    "DLM+": ("lenet", lambda seen, seed: attacks.dlm_plus(seen, seed=seed)),
    "DLM+, labels optimised": ("lenet", lambda seen, seed: attacks.dlm_plus(seen, seed=seed, labels="optimised")),
    "DLM, k0 = 100": ("lenet", lambda seen, seed: attacks.dlm(seen, k0=100, seed=seed)),
    "DLG, told η": ("lenet", lambda seen, seed: attacks.dlg(seen, learning_rate=0.01, seed=seed)),
    "iDLG, told η": ("lenet", lambda seen, seed: attacks.idlg(seen, learning_rate=0.01, seed=seed)),
    "IG": ("lenet", lambda seen, seed: attacks.inverting_gradients(seen, seed=seed)),
    "DLM+, released settings": ("lenet", lambda seen, seed: released_dlm_plus(seen, seed)),
}
PEERS = {"breaching 0.1.2, DLG": "deepleakage", "breaching 0.1.2, IG, told the label": "invertinggradients"}


def run(images=20, peer_images=3):
    """Print Markdown tables over the first ``images`` bundled CIFAR-100 images: client lr 0.01, one step; LeNet, and exact
    recovery on the MLP as well. The peer's attacks, far slower, meet the first ``peer_images`` alone (0: none).

    The attacks take turns on each image, so that whatever else the machine does meets all of them alike, each in a process of its
    own, whose peak memory is measured.
    """
    data.load("cifar100", n=images, source="bundled")  # says so now if there are not as many
    check.at_least("peer_images", peer_images, 0)
    threads = torch.get_num_threads()
    measured = {name: [] for name in (*ATTEMPTS, *(PEERS if peer_images else ()))}
    python = peer.environment() if peer_images else None
    spawn = multiprocessing.get_context("spawn")
    pools = {name: ProcessPoolExecutor(1, spawn, _begin, (threads, os.getpid())) for name in ATTEMPTS}
    for i in tqdm(range(images), unit="image"):
        for name, pool in pools.items():
            measured[name].append(pool.submit(attempt, name, i).result())
        for name, attack in PEERS.items() if i < peer_images else ():
            measured[name].append(peer.measure(python, attack, i, threads))
    for pool in pools.values():
        pool.shutdown()
    print(f"{images} CIFAR-100 images, LeNet where not said, client SGD lr 0.01, one step; torch on {threads} threads\n")
    print("| attack | ≥ 20 dB | ≥ 30 dB | median PSNR | s, median | s, mean | share of released | evaluations | peak MiB |")
    print("|---|---|---|---|---|---|---|---|---|")
    released = statistics.mean(row["seconds"] for row in measured["DLM+, released settings"])
    for name, rows in measured.items():
        psnrs, seconds, evaluations, peaks = (
            [row[what] for row in rows] for what in ("psnr", "seconds", "evaluations", "peak")
        )
        shares = " | ".join(f"{sum(psnr >= threshold for psnr in psnrs)}/{len(rows)}" for threshold in (20, 30))
        mean = statistics.mean(seconds)
        timing = (
            f"{statistics.median(seconds):.2f} | {mean:.2f} | {mean / released:.2f} | {statistics.median(evaluations):.0f}"
        )
        print(f"| {name} | {shares} | {statistics.median(psnrs):.1f} | {timing} | {max(peaks):.0f} |")
    print()
    cost_of_steps()


def _begin(threads, master):
    torch.set_num_threads(threads)
    sweeps.end_with(master)


def attempt(name, i):
    """One attack on one image: {"psnr", "seconds", "evaluations", "peak"}, the last the process's peak memory in MiB."""
    network, attack = ATTEMPTS[name]
    truth = data.load("cifar100", indices=[i], source="bundled")
    seen = federated.train_locally(models.build(network, seed=i), truth.images, truth.labels, lr=0.01)
    began = time.perf_counter()
    found = attack(seen, i)
    seconds = time.perf_counter() - began
    psnr = float(metrics.psnr(found.images, truth.images, data_range=1.0))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"psnr": psnr, "seconds": seconds, "evaluations": found.evaluations, "peak": peak}


def cost_of_steps(counts=(1, 2, 5, 10, 20, 50), repeats=5):
    """Print what one evaluation of unrolled DLM's objective and its gradient costs, by the number of simulated steps E."""
    truth = data.load("cifar100", n=1, source="bundled")
    model = models.build("lenet").double()
    update = federated.weight_delta(federated.train_locally(model, truth.images.double(), truth.labels, lr=0.01))
    dummy = torch.rand(truth.images.shape, generator=torch.Generator().manual_seed(0)).double().requires_grad_()
    print("| simulated steps E | s/evaluation, median | relative to E = 1, per step |")
    print("|---|---|---|")
    first = None
    for steps in counts:
        seconds = []
        for _ in range(repeats):
            began = time.perf_counter()
            simulated = clients.update(model, federated.loss, dummy, truth.labels, rate=0.01, steps=steps)
            torch.autograd.grad(objectives.normalised_distance(simulated, update), dummy)
            seconds.append(time.perf_counter() - began)
        median = statistics.median(seconds)
        first = first or median
        print(f"| {steps} | {median:.4f} | {median / first / steps:.2f} |")


def released_dlm_plus(seen, seed, iterations=200):
    """DLM+ as the released code runs it: float32, N(0, 1) pixels, 200 outer L-BFGS iterations without line search,
    one more evaluation after each to log the loss, and no stopping. The label is told there; here it is inferred, equally right.
    """
    update = [layer.float() for layer in federated.weight_delta(seen)]
    label = label_inference.infer(seen)
    dummy = torch.randn(1, *seen.image_shape, generator=torch.Generator().manual_seed(seed)).requires_grad_()
    optimizer = torch.optim.LBFGS([dummy], lr=1)
    losses = []

    def closure():
        g = objectives.gradient(seen.model, federated.loss, dummy, label)
        loss = objectives.normalised_distance(g, update)
        (dummy.grad,) = torch.autograd.grad(loss, dummy)
        losses.append(float(loss.detach()))
        return loss.detach()

    for _ in range(iterations):
        optimizer.step(closure)
        closure()
    return attacks.Reconstruction(dummy.detach(), label, losses, losses[-1], "budget", None, 0.0)
