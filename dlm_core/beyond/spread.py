"""Mini-batches in an order that nobody tells: each image is spread over the simulated steps.

    w_0 = W_t,   w_{s+1} = w_s - ρ/N Σ_i a_{s,i} ∇ℓ(w_s; x_i, y_i),   Σ_s a_{s,i} = 1
    min over x, a, log ρ:  Σ_layers ‖(w_0 - w_S) - Δ‖²/n(Δ)²

A client of SGD is one such ``a``, whatever its batches, their order and the number of its epochs:
an image has its shares at the steps that took it. A step that no image takes changes nothing, so S
need only be as large as the client's; where it is smaller, neighbouring steps are taken for one.
All images begin in all steps alike, at a point between the snapshots (``surrogate``), and the
search finds images, order and length at once. Of the client's numbers it finds only ρ, which is η
times the number of its steps.
"""

import copy
import math
from dataclasses import replace
from typing import Any

import torch

from dlm_core import check, objectives, records
from dlm_core.arrays import Labels
from dlm_core.beyond.chance import draws_from_seed
from dlm_core.beyond.clients import Decay, sgd
from dlm_core.beyond.surrogate import MANY_STEPS, gradient_at, on_segment, surrogate_dlm
from dlm_core.federated import loss as training_loss
from dlm_core.observation import TINY, Observation
from dlm_core.results import ClientEstimate, Reconstruction
from dlm_core.search import known_labels, reconstruct

FIRST_PATIENCE = 20  # of the search between the snapshots, which is a start
FAINT = 0.1  # std of the first shares' logits, from which alike images part
TOLERANCE = 1e-8  # the order shows in the last digits of a fit

Tensors = list[torch.Tensor]


def simulate(
    model: torch.nn.Module,
    loss: Any,
    images: torch.Tensor,
    labels: torch.Tensor,
    length: torch.Tensor | float,
    shares: torch.Tensor,
    momentum: float = 0.0,
) -> Tensors:
    """Δ of a client whose steps take every image with a weight of its own.

    Parameters
    ----------
    model
        With the weights W_t.
    loss
        (logits [n, K], labels [n], reduction="none") -> [n].
    images, labels
        [N, C, H, W] and [N].
    length
        ρ: the learning rate times the number of steps.
    shares
        a, [S, N], each at least 0: of an image in a step. Over the steps an image has 1.
    momentum
        μ of its SGD, from 0 to below 1.

    Returns
    -------
    list of torch.Tensor
        One per parameter, differentiable in images, ``length`` and shares.
    """
    before = list(model.parameters())
    weights, states = before, [None] * len(before)
    for share in shares:

        def weighed(logits, labels, share=share):
            return share @ loss(logits, labels, reduction="none") / len(share)

        gradients = gradient_at(model, weighed, images, labels, weights)
        stepped = [
            sgd(w, g, state, length, momentum=momentum)
            for w, g, state in zip(weights, gradients, states)
        ]
        weights, states = map(list, zip(*stepped))
    return [a - b for a, b in zip(before, weights)]


@records.attack(
    "shuffled_dlm",
    title="DLM+ in any order",
    colour=4,
    marker="*",
    assumes=("that the client took SGD steps without momentum, or which momentum",),
    client="epochs of mini-batches in any order",
)
@records.passes_on_to(
    reconstruct, fixed=["distance", "update_of", "unknowns", "resume", "scale", "restarts"]
)
@check.arguments
@draws_from_seed
def shuffled_dlm(
    seen: Observation,
    *,
    local_steps: check.Count = 4,
    momentum: Decay = 0.0,
    num_images: check.Count = 1,
    labels: str | Labels = "inferred",
    seed: check.Whole = 0,
    max_evaluations: check.Count = 400,
    **options: Any,
) -> Reconstruction:
    """DLM+ on a client whose batches, order, epochs and learning rate are found with the images.

    Parameters
    ----------
    seen
        What the observer sees.
    local_steps
        S, the steps that are simulated, at their cost each: with as many as the client took, or
        more, there is an order that gives its update exactly.
    momentum
        μ of the client's SGD, told; 0 where it has none.
    num_images, labels
        Of ``search.reconstruct``; "optimised" is refused. Inferred are the classes' counts, as if
        the last layer's features were those of their mean: of many steps some may be wrong.
    seed
        Of the start.
    max_evaluations
        Of the search in which steps are simulated, and of the one before it, between the snapshots.
    **options
        Of ``search.reconstruct``.

    Returns
    -------
    Reconstruction
        Its ``point`` has ``log_length``, the logarithm of ρ, and ``order``, [S, N], whose softmax
        over the steps are the shares.

    Raises
    ------
    ValueError
        Where ``labels`` is "optimised", and as ``search.reconstruct``.
    """
    known = known_labels(seen, labels, num_images, local_steps=MANY_STEPS)
    if known is None:
        raise ValueError("labels is 'optimised'; the order is found for labels known or inferred")
    about: dict[str, Any] = {"num_images": num_images, "labels": known, "seed": seed}
    options = {"tolerance": TOLERANCE, **options}
    hurried = {**options, **about, "patience": FIRST_PATIENCE}
    first = surrogate_dlm(seen, max_evaluations=max_evaluations, **hurried)
    generator = torch.Generator().manual_seed(seed)
    order = FAINT * torch.randn(local_steps, num_images, generator=generator, dtype=torch.float64)

    def update_of(model, loss, images, labels, log_length, order):
        return simulate(model, loss, images, labels, log_length.exp(), order.softmax(0), momentum)

    length = _length(seen, first) / _lasting(momentum, local_steps)
    found = reconstruct(
        seen,
        _relative_distance,
        update_of=update_of,
        unknowns={"log_length": math.log(length), "order": 0.0},
        resume={"images": first.point["images"], "order": order.to(first.images)},
        max_evaluations=max_evaluations,
        **options,
        **about,
    )
    evidence = replace(found.evidence, losses=[*first.losses, *found.losses])
    seconds = first.seconds + found.seconds
    return replace(found, evidence=evidence, client=ClientEstimate(), seconds=seconds)


def _relative_distance(simulated: Tensors, update: Tensors) -> torch.Tensor:
    return objectives.squared_distance(simulated, update) / objectives.mean_norm(update) ** 2


def _length(seen: Observation, found: Reconstruction) -> float:
    """ρ with which one step from between the snapshots fits the update best."""
    model, images = copy.deepcopy(seen.model).double(), found.images.double()
    weights = on_segment(list(model.parameters()), seen.delta, found.point["alpha"].double())
    g = gradient_at(model, training_loss, images, found.labels, weights)
    along = sum(float((a.detach() * b).sum()) for a, b in zip(g, seen.delta))
    square = sum(float(a.detach().square().sum()) for a in g)
    return max(along / max(square, TINY), TINY)


def _lasting(momentum: float, local_steps: int) -> float:
    """How often a gradient is taken in all, by its own step and by those after it: the mean."""
    after = torch.arange(1, local_steps + 1, dtype=torch.float64)
    return float(sum(momentum**k * (after > k).double().mean() for k in range(local_steps)))
