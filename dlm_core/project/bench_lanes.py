"""DLM+ on many clients as one batch, against one after the other: on a GPU, or small on the CPU."""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from os import cpu_count
from typing import Any

import torch

from dlm_core import attacks, check, data, federated, models
from dlm_core.beyond import exact
from dlm_core.harness import devices, memory, released
from dlm_core.observation import Observation, observe
from dlm_core.threads import one_thread

LEARNING_RATE = 0.01
# {kind of device: (numbers of lanes, evaluations of each search, races, of which the least seconds
# count)}
SIZES = {"cpu": ((1, 16), 30, 3), "cuda": ((1, 16, 256, 1024), 200, 1)}
APART = 4  # searches that are run one after the other, at most: their mean stands for all
# What 16 lanes of LeNet are to gain on a CPU.
GAIN = 1.3
# Of the released experiment: (attacks, iterations), of which 50 are released.
RELEASED = {"cpu": (2, 2), "cuda": (100, 50)}


@check.arguments
def run(device: str = "cpu") -> None:
    """Print Markdown tables of one device.

    Parameters
    ----------
    device
        "cuda", or "cpu", where the same script runs small.

    Notes
    -----
    Times are of the processor on the CPU, which others may use as well, and of the clock on a GPU.
    Every search is in float32 and has the same budget, so that the ratio is one of equal work.
    """
    on = devices.named(device)
    assert on is not None
    print(f"{devices.description(on)}, torch {torch.__version__}, float32")
    if on.type == "cpu":
        print("\nA small run, on the CPU: it says nothing of a GPU.")
    counts, evaluations, races = SIZES[on.type]
    print(f"\nDLM+ on CIFAR-100 images, {evaluations} evaluations a search\n")
    print(
        "| network | lanes | s a search, one after the other | s a search, as lanes | ratio | MiB |"
    )
    print("|---|---|---|---|---|---|")
    for network in ("lenet", "mlp"):
        seen = _observed(network, max(counts), on)
        for count in counts:
            alone, together, used = race(seen[:count], evaluations, races, on)
            cells = f"{alone:.4f} | {together:.4f} | {alone / together:.2f} | {used:.0f}"
            print(f"| {network} | {count} | {cells} |", flush=True)
    if on.type == "cpu":
        print(f"\n16 lanes of LeNet are to be at least {GAIN} times one after the other.")
    else:
        for network in ("lenet", "mlp"):
            cores, seconds = on_all_cores(network, evaluations)
            print(f"\n{network}: {seconds:.4f} s a search on all {cores} cores of its CPU")
    seconds, _ = _measured(lambda: exact.recover(_observed("lenet", 1, on)[0]), on)
    print(f"\nexact recovery on LeNet, one image: {seconds:.2f} s")
    count, iterations = RELEASED[on.type]
    trials = released.trials("DLM_PLUS_EXAMPLE", n=count, iterations=iterations)
    seconds, _ = _measured(lambda: list(devices.play(trials, on)), on)
    print(
        f"\nthe released DLM_PLUS_EXAMPLE on LeNet, {len(trials)} attacks, {iterations} iterations "
        f"(50 are released): {seconds:.1f} s"
    )


def race(
    seen: Sequence[Observation], evaluations: int, races: int, on: torch.device
) -> tuple[float, float, float]:
    """(seconds a search one after the other, as lanes, MiB of a GPU that the lanes took).

    Parameters
    ----------
    seen
        One for each lane.
    evaluations
        Of each search.
    races
        How often each is measured, by turns; the least counts, since others use the machine too.
    on
        The device.
    """
    options: dict[str, Any] = {
        **{"dtype": torch.float32, "max_evaluations": evaluations},
        **{"tolerance": 0.0, "patience": evaluations},
    }
    few = list(enumerate(seen[:APART]))

    def apart() -> None:
        for i, one in few:
            attacks.dlm_plus(one, seed=i, **options)

    for seed in (0, [0]):  # what begins only once
        attacks.dlm_plus(seen[0], seed=seed, **{**options, "max_evaluations": 2})
    at_once = partial(attacks.dlm_plus, seen, seed=range(len(seen)), **options)
    alone, together = zip(*((_measured(apart, on), _measured(at_once, on)) for _ in range(races)))
    used = max(mebibytes for _, mebibytes in together)
    return min(alone)[0] / len(few), min(together)[0] / len(seen), used


def on_all_cores(network: str, evaluations: int) -> tuple[int, float]:
    """(cores, seconds a search where each core has one)."""
    cores = cpu_count() or 1
    with ProcessPoolExecutor(cores, mp_context=get_context("spawn")) as pool:
        list(pool.map(partial(_alone, network, 1), range(cores)))  # they have started
        began = time.perf_counter()
        list(pool.map(partial(_alone, network, evaluations), range(cores)))
    return cores, (time.perf_counter() - began) / cores


def _alone(network: str, evaluations: int, i: int) -> None:
    with one_thread():
        seen = _observed(network, 1, torch.device("cpu"))[0]
        options = {"tolerance": 0.0, "patience": evaluations, "dtype": torch.float32}
        attacks.dlm_plus(seen, seed=i, max_evaluations=evaluations, **options)


def _observed(network: str, count: int, on: torch.device) -> list[Observation]:
    """Clients on the bundled images in turn, each with a network of its own."""
    truth = data.load("cifar100", source="bundled")
    found = []
    for i in range(count):
        at = i % len(truth.labels)
        model = models.build(network, seed=i)
        pair = truth.images[at : at + 1], truth.labels[at : at + 1]
        seen = federated.train_locally(model, *pair, learning_rate=LEARNING_RATE)
        before, after = (
            {name: w.to(on) for name, w in each.items()}
            for each in (seen.model.state_dict(), seen.weights_after)
        )
        found.append(observe(seen.model.to(on), before, after, seen.image_shape))
    return found


def _measured(work: Callable[[], Any], on: torch.device) -> tuple[float, float]:
    """(seconds, MiB of the GPU, or of the process)."""
    if on.type == "cpu":
        before = memory.peak()
        began = time.process_time()
        work()
        return time.process_time() - began, memory.peak() - before
    torch.cuda.reset_peak_memory_stats()
    torch.cuda.synchronize()
    began = time.perf_counter()
    work()
    torch.cuda.synchronize()
    return time.perf_counter() - began, torch.cuda.max_memory_allocated() / 2**20
