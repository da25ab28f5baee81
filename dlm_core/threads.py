"""What belongs to the whole process: how many threads an attack computes on, and the global random
generator.

Networks as small as the paper's are slowed down by several threads, tenfold on a busy machine.
"""

import contextlib
import threading
from collections.abc import Iterator

import torch
from torch import nn

# Weights up to which one thread is the fastest: LeNet has 85,036, ResNet-18 eleven million.
SMALL = 1_000_000
_GENERATOR = threading.RLock()


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Compute on one thread, and restore the caller's number. Sums, and so bits, depend on the
    number of threads.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def for_network(model: nn.Module) -> contextlib.AbstractContextManager[None]:
    """``one_thread`` where the network is small, else no change."""
    small = sum(p.numel() for p in model.parameters()) <= SMALL
    return one_thread() if small else contextlib.nullcontext()


@contextlib.contextmanager
def own_generator(seed: int | None = None, device: torch.device | str = "cpu") -> Iterator[None]:
    """The global random generator for what takes no other, such as a layer's initial weights: one
    thread at a time, and left as it was.

    Parameters
    ----------
    seed
        Of the CPU's generator inside; None goes on from where it stands.
    device
        Whose generator is restored beside the CPU's.
    """
    others = [torch.device(device)] if torch.device(device).type != "cpu" else []
    kind = others[0].type if others else "cuda"
    with _GENERATOR, torch.random.fork_rng(devices=others, device_type=kind):
        if seed is not None:
            torch.default_generator.manual_seed(seed)
        yield
