"""What an audit reads of two snapshots: the network with the weights before, the weights after, and
how both were rounded.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from dlm_core.beyond import preprocessing
from dlm_core.harness import clues, files, levels, networks
from dlm_core.weights import StateDict, check_finite


class Received(NamedTuple):
    """What was read of two snapshots.

    Attributes
    ----------
    network
        With the weights W_t.
    after
        W_{t+1}.
    coarse
        {name: half precision that a tensor of these is rounded to}.
    lost
        Variance of what W_t may have lost to rounding, one tensor for each parameter; empty where
        it was not rounded.
    where
        What to add to an error of the network's.
    notes
        What was done to the files, in sentences.
    beside
        Where no weight moved: places of other numbers that came with W_{t+1} and not with W_t.
    """

    network: nn.Module
    after: StateDict
    coarse: dict[str, torch.dtype]
    lost: list[torch.Tensor]
    where: str
    notes: list[str]
    beside: list[str]


def receive(
    before: Any,
    after: Any,
    model: str | nn.Module,
    image_shape: Sequence[int],
    num_classes: int | None,
    normalise: preprocessing.Normalisation | None,
    device: torch.device | None,
) -> Received:
    """Read two snapshots, and put W_t into the network.

    Parameters
    ----------
    before, after, model, image_shape, num_classes
        As ``audit`` takes them.
    normalise, device
        What the client makes of pixels, and where attacks compute; None: nothing, and where the
        network lies.

    Raises
    ------
    ValueError
        Where they cannot be read, do not fit the network, or hold numbers that are not finite.
    """
    given = before, after
    model, before, after, notes, where = networks.fitted(*given, model, image_shape, num_classes)
    for argument, state in (("before", before), ("after", after)):
        check_finite(argument, state)
    names = {name for name, _ in model.named_parameters()}
    sent = {name: w for name, w in after.items() if name in names}
    moved = {
        name: w for name, w in sent.items() if not torch.equal(w.double(), before[name].double())
    }
    halves = {name: levels.half_of(w) for name, w in moved.items()}
    coarse = {name: half for name, half in halves.items() if half is not None}
    # All in one, as networks compute; float32 held in float64 has the rounding of float32.
    single = all(torch.equal(w.float().double(), w.double()) for w in sent.values())
    dtype = torch.float32 if single else torch.float64
    before, after = (
        {n: w.to(device=device, dtype=dtype if w.is_floating_point() else None) for n, w in each}
        for each in (before.items(), after.items())
    )
    network = model.to(device=device, dtype=dtype)
    network.load_state_dict(before)
    for name, w in network.named_parameters():  # searches leave out what did not move
        w.requires_grad_(w.requires_grad and name in moved)
    if coarse:
        which = ", ".join(sorted({str(dtype) for dtype in coarse.values()}))
        many = "the" if len(coarse) == len(moved) else f"{len(coarse)} of {len(moved)} tensors of"
        notes.append(f"{many} weights that came back are rounded to {which}")
    lost, said = levels.lost(network)
    notes += said
    notes += clues.of_network(network, image_shape)
    network.register_forward_hook(lambda _, __, returned: clues.alone(returned))
    if normalise is not None:
        network = preprocessing.normalised(network, normalise)
        notes.append(f"images are looked for in [0, 1], as they were before {normalise}")
    beside = [] if moved else files.beside(*given, model.state_dict(keep_vars=True))
    return Received(network, after, coarse, lost, where, notes, beside)
