"""Seconds, memory and success of the attacks, ours beside the released settings, in one run on one machine."""

import resource
import statistics
import time

import torch
from tqdm import tqdm

from dlm_core import attacks, data, federated, labels, metrics, models, objectives

ATTEMPTS = {
    "DLM+": lambda seen, seed: attacks.dlm_plus(seen, seed=seed),
    "DLM+, labels optimised": lambda seen, seed: attacks.dlm_plus(seen, seed=seed, labels="optimised"),
    "DLM, k0 = 100": lambda seen, seed: attacks.dlm(seen, k0=100, seed=seed),
    "DLG, told η": lambda seen, seed: attacks.dlg(seen, learning_rate=0.01, seed=seed),
    "iDLG, told η": lambda seen, seed: attacks.idlg(seen, learning_rate=0.01, seed=seed),
    "IG": lambda seen, seed: attacks.inverting_gradients(seen, seed=seed),
    "DLM+, released settings": lambda seen, seed: released_dlm_plus(seen, seed),
}


def run(images=20):
    """Print a Markdown table over the first ``images`` bundled CIFAR-100 images: LeNet, client lr 0.01, one step.

    The attacks take turns on each image, so that whatever else the machine does meets all of them alike.
    """
    truth = data.load("cifar100", n=images, source="bundled")
    rows = {name: [] for name in ATTEMPTS}
    for i in tqdm(range(images), unit="image"):
        seen = federated.train_locally(
            models.build("lenet", seed=i), truth.images[i : i + 1], truth.labels[i : i + 1], lr=0.01
        )
        for name, attack in ATTEMPTS.items():
            began = time.perf_counter()
            found = attack(seen, i)
            seconds = time.perf_counter() - began
            rows[name].append(
                (metrics.psnr(found.images, truth.images[i : i + 1], data_range=1.0), seconds, found.evaluations)
            )
    print(f"LeNet, {images} CIFAR-100 images, client SGD lr 0.01, one step; torch on {torch.get_num_threads()} threads\n")
    print(
        "| attack | ≥ 20 dB | ≥ 30 dB | median PSNR | s/image, median | s/image, mean | share of released | evaluations, median |"
    )
    print("|---|---|---|---|---|---|---|---|")
    released = statistics.mean(seconds for _, seconds, _ in rows["DLM+, released settings"])
    for name, measured in rows.items():
        psnrs, seconds, evaluations = zip(*measured)
        shares = " | ".join(f"{sum(psnr >= threshold for psnr in psnrs)}/{images}" for threshold in (20, 30))
        timing = (
            f"{statistics.median(seconds):.2f} | {statistics.mean(seconds):.2f} | {statistics.mean(seconds) / released:.2f}"
        )
        print(f"| {name} | {shares} | {statistics.median(psnrs):.1f} | {timing} | {statistics.median(evaluations):.0f} |")
    print(f"\npeak memory of all: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MiB")


def released_dlm_plus(seen, seed, iterations=200):
    """DLM+ as the released code runs it: float32, N(0, 1) pixels, 200 outer L-BFGS iterations without line search,
    one more evaluation after each to log the loss, and no stopping. The label is told there; here it is inferred, equally right.
    """
    update = [layer.float() for layer in federated.weight_delta(seen)]
    label = labels.infer(seen)
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
