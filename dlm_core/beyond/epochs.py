"""Epochs of mini-batches: a client that goes through its images several times, each time in an
order that it draws anew.

The order is the client's alone: neither the snapshots nor the protocol name it.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from dlm_core import check, federated, records
from dlm_core.federated import Client
from dlm_core.observation import Observation


@check.arguments
def orders(
    num_images: check.Count, num_epochs: check.Count, seed: check.Whole | None
) -> torch.Tensor:
    """The order of the images in each epoch.

    Parameters
    ----------
    num_images
        N, at least 1.
    num_epochs
        E, at least 1.
    seed
        Of the shuffling; None leaves every epoch in the order of the images.

    Returns
    -------
    torch.Tensor
        [E, N] positions, each row a permutation.
    """
    if seed is None:
        return torch.arange(num_images).expand(num_epochs, -1)
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randperm(num_images, generator=generator) for _ in range(num_epochs)])


def steps(num_images: int, num_epochs: int, batch_size: int) -> int:
    """The local steps of E epochs of N images, ``batch_size`` a step.

    Raises
    ------
    ValueError
        Where the epochs do not end with a whole batch.
    """
    if num_images % batch_size:
        raise ValueError(
            f"batch_size is {batch_size}; it takes a number that divides {num_images}, "
            "the client's images"
        )
    return num_epochs * num_images // batch_size


@records.protocol("epochs", title="shuffled epochs")
@records.passes_on_to(federated.train_locally, fixed=["local_steps"])
@check.arguments
def shuffled(
    model: nn.Module,
    clients: Sequence[Client],
    *,
    batch_size: check.Count | None = None,
    num_epochs: check.Count = 1,
    order: check.Whole | None = None,
    **training: Any,
) -> Observation:
    """Epochs of mini-batches, shuffled each epoch, as the server sees their client.

    Parameters
    ----------
    model
        With the weights that the client receives.
    clients
        (images, labels), at least one; together they are the images of the one client.
    batch_size
        B, a number that divides that of the images; None takes all of them in each step.
    num_epochs
        E, at least 1.
    order
        Seed of the shuffling, which no observer has; None leaves the images in order.
    **training
        Of ``federated.train_locally``.

    Returns
    -------
    Observation
        Of the two snapshots, as of any client.
    """
    check.at_least("number of clients", len(clients), 1)
    images, labels = (torch.cat(parts) for parts in zip(*clients))
    federated.head_for(model, images, labels)
    batch_size = len(images) if batch_size is None else batch_size
    local_steps = steps(len(images), num_epochs, batch_size)
    drawn = orders(len(images), num_epochs, order).flatten()
    # Epochs one after the other are one list of images in their order, taken once.
    return federated.train_locally(
        model,
        images[drawn],
        labels[drawn],
        batch_size=batch_size,
        local_steps=local_steps,
        **training,
    )
