"""What belongs to the whole process: how an attack computes, and the global random generator.

Networks as small as the paper's are slowed down by several threads, tenfold on a busy machine.
"""

import contextlib
import hashlib
import threading
from collections.abc import Iterator

import torch
from torch import nn
from torch.backends import cudnn

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


@contextlib.contextmanager
def for_network(model: nn.Module) -> Iterator[None]:
    """What suits a network: ``one_thread`` where it is small; on a GPU float32 as it is on a CPU,
    where PyTorch would have convolutions round to TF32, ten bits, and sum in any order.
    """
    parameters = list(model.parameters())
    with contextlib.ExitStack() as stack:
        if sum(p.numel() for p in parameters) <= SMALL:
            stack.enter_context(one_thread())
        if any(p.is_cuda for p in parameters):
            kept = {"enabled": cudnn.enabled, "benchmark": cudnn.benchmark}
            stack.enter_context(cudnn.flags(**kept, deterministic=True, allow_tf32=False))
        yield


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


def client_seed(*numbers: int) -> int:
    """The seed of what a client draws by itself, such as a defence's noise or a dropout's mask.

    An attack is handed the first of ``numbers``. What the client draws follows from their digest,
    so that an attack that simulates the client with its own seed does not draw the same.

    Parameters
    ----------
    *numbers
        Seed of the trial or of the training, and what tells this client's draws from others.

    Returns
    -------
    int
        From 0 to 2³¹ - 1.
    """
    written = repr(tuple(map(int, numbers))).encode()
    return int.from_bytes(hashlib.sha256(written).digest()[:4], "big") >> 1
