"""How many threads an attack computes on. Networks as small as the paper's are slowed down by
several, tenfold on a busy machine.
"""

import contextlib
from collections.abc import Iterator

import torch
from torch import nn

# Weights up to which one thread is the fastest: LeNet has 85,036, ResNet-18 eleven million.
SMALL = 1_000_000


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Compute on one thread, and restore the caller's number. Sums, and so bits, depend on that
    number.
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
