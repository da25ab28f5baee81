"""Epochs simulated on images of their own, which a prior holds together.

    D(Δ(X_1, …, X_E), Δ) + λ/E² Σ_{e, e'} mean (a(X_e) - a(X_e'))²

Which images a client took together is not known, but that it took the same ones in each epoch is:
an aggregate ``a`` over an epoch's images, their mean or maximum, does not hang on their order.

Data leakage in federated averaging: Dimitrov, Balunović, Konstantinov and Vechev, TMLR 2022. The
attacker is told the learning rate, the number of epochs and the size of a batch.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch

from dlm_core import check, metrics, objectives, records
from dlm_core.arrays import Labels
from dlm_core.beyond import clients
from dlm_core.beyond.chance import draws_from_seed
from dlm_core.beyond.epochs import steps
from dlm_core.beyond.surrogate import with_penalties
from dlm_core.federated import loss as training_loss
from dlm_core.observation import Observation
from dlm_core.results import ClientEstimate, Reconstruction
from dlm_core.search import known_labels, reconstruct
from dlm_core.threads import client_seed

Tensors = Sequence[torch.Tensor]
Over = Literal["mean", "max"]
AGGREGATES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "mean": lambda images: images.mean(1),
    "max": lambda images: images.amax(1),
}


def epoch_prior(images: torch.Tensor, over: Over = "max") -> torch.Tensor:
    """How far the epochs are from showing the same images, whatever their order in each.

    Parameters
    ----------
    images
        [E, N, C, H, W], N images for each of E epochs.
    over
        The aggregate over the N images of an epoch, pixel by pixel.

    Returns
    -------
    torch.Tensor
        Mean over all pairs of epochs and over pixels of the squared difference, a scalar.
    """
    each = AGGREGATES[over](images)
    return (each[:, None] - each[None]).square().mean()


def averaged(images: torch.Tensor) -> torch.Tensor:
    """Each epoch's images matched to the first epoch's, and the mean of those that belong together.

    Parameters
    ----------
    images
        [E, N, C, H, W] in [0, 1].

    Returns
    -------
    torch.Tensor
        [N, C, H, W].
    """
    first, *others = images
    matched = [each[metrics.match(each, first).to(each.device)] for each in others]
    return torch.stack([first, *matched]).mean(0)


@records.attack(
    "order_invariant",
    title="order-invariant prior",
    colour=1,
    marker="s",
    assumes=("that the client took plain SGD steps",),
    client="epochs of mini-batches in any order",
    example={"num_epochs": 2, "batch_size": 1},
)
@records.passes_on_to(reconstruct, fixed=["distance", "update_of", "unknowns", "resume", "scale"])
@check.arguments
@draws_from_seed
def order_invariant(
    seen: Observation,
    *,
    learning_rate: check.Positive,
    num_epochs: check.Count,
    batch_size: check.Count,
    num_images: check.Count = 1,
    labels: str | Labels = "inferred",
    seed: check.Whole = 0,
    over: Over = "max",
    weight: check.NonNegative = 1.0,
    **options: Any,
) -> Reconstruction:
    """Epochs of mini-batches, simulated with images of their own for each (Dimitrov et al. 2022).

    Parameters
    ----------
    seen
        What the observer sees.
    learning_rate
        η > 0, told.
    num_epochs, batch_size
        E and B, told; B divides ``num_images``.
    num_images, labels
        Of ``search.reconstruct``: N images. Which label stands where is drawn once from the seed,
        the same for all epochs, as its authors do.
    seed
        Of the start and of the labels' places.
    over
        The prior's aggregate.
    weight
        λ of that prior, where the distance is ``‖Δ(X) - Δ‖²`` over the squared mean norm of Δ.
    **options
        Of ``search.reconstruct``.

    Returns
    -------
    Reconstruction
        Its images are the means over the epochs, and its loss is that of them in each epoch.

    Raises
    ------
    ValueError
        Where ``labels`` is "optimised", and as ``search.reconstruct``.
    """
    known = known_labels(seen, labels, num_images, local_steps=2)
    local_steps = steps(num_images, num_epochs, batch_size)
    many = num_epochs * num_images
    if known is None:
        raise ValueError("labels is 'optimised'; epochs have labels in common: infer or give them")
    # not by the seed itself, from which a client's order may follow as well
    draws = torch.Generator().manual_seed(client_seed(seed))
    places = torch.randperm(num_images, generator=draws)
    placed = known[places.to(known.device)]

    def simulate(model, loss, images, labels):
        return clients.simulate(
            model,
            loss,
            images,
            labels,
            learning_rate=learning_rate,
            local_steps=local_steps,
            batch_size=batch_size,
        )

    def update_of(model, loss, images, labels):
        epochs = images.unflatten(0, (num_epochs, num_images))
        prior = weight * epoch_prior(epochs, over)
        return [*simulate(model, loss, images, labels), prior]

    found = reconstruct(
        seen,
        with_penalties(_relative_distance),
        update_of=update_of,
        num_images=many,
        labels=placed.repeat(num_epochs),
        seed=seed,
        **options,
    )
    images = averaged(found.images.clamp(0, 1).unflatten(0, (num_epochs, num_images)))
    model = copy.deepcopy(seen.model).to(images.dtype)
    repeated = images.repeat(num_epochs, 1, 1, 1), placed.repeat(num_epochs)
    loss = _relative_distance(simulate(model, training_loss, *repeated), seen.delta)
    return replace(
        found,
        images=images,
        labels=placed,
        vouched=found.vouched[:num_images],
        evidence=replace(found.evidence, loss=float(loss.detach())),
        client=ClientEstimate(learning_rate=learning_rate, local_steps=local_steps),
    )


def _relative_distance(simulated: Tensors, update: Tensors) -> torch.Tensor:
    return objectives.squared_distance(simulated, update) / objectives.mean_norm(update) ** 2
