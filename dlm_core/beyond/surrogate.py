"""One point between the snapshots stands for all of a client's steps.

    g((1 - α) W_t + α W_{t+1}; x, y)  ∥  Δ,     α searched along with x

A client's update is a sum of gradients along its path, and the gradient at a point of the path has
nearly its direction, whatever the steps, their batches and their order were.

Surrogate model extension: Zhu, Yao and Blaschko, ICML 2023. The point lies on the segment; in the
curved variant (Xia et al., arXiv 2509.22082) on a quadratic Bézier curve, whose control point is
searched as well. ``surrogate_dlm`` is the first with DLM+'s distance and this artifact's search.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.func import functional_call

from dlm_core import check, objectives, records
from dlm_core.arrays import Labels
from dlm_core.coordinates import pixels
from dlm_core.observation import Observation
from dlm_core.optimizers import BoxedAdam, Variables
from dlm_core.results import Reconstruction
from dlm_core.search import in_lanes, known_labels, reconstruct

# Standard deviation of natural images' pixels in [0, 1]: SME's authors normalise by it, so that in
# their units a step is as much longer, and a difference of neighbours as much larger.
CONTRAST = 0.27
MANY_STEPS = 16  # for ``label_inference.infer``; it does not matter how many
MIDDLE = 0.5  # where α starts
CURVED = 1.0  # weight of the control point's distance from the segment
CONTROL = "control_{}"  # names of the control point's parts

Tensors = Sequence[torch.Tensor]
Alpha = torch.Tensor | float
Distance = Callable[..., torch.Tensor]


def on_segment(
    weights: Tensors, update: Tensors, alpha: torch.Tensor | float
) -> list[torch.Tensor]:
    """(1 - α) W_t + α W_{t+1}.

    Parameters
    ----------
    weights, update
        W_t and Δ = W_t - W_{t+1}, one tensor per parameter.
    alpha
        From 0, at W_t, to 1.
    """
    return [w - alpha * d for w, d in zip(weights, update)]


def on_curve(weights: Tensors, update: Tensors, bend: Tensors, alpha: Alpha) -> list[torch.Tensor]:
    """(1 - α)² W_t + 2α(1 - α) P + α² W_{t+1}: a quadratic Bézier curve.

    Parameters
    ----------
    weights, update
        As in ``on_segment``.
    bend
        P minus the middle of the segment; where it is zero the curve is the segment.
    alpha
        From 0, at W_t, to 1.
    """
    straight = on_segment(weights, update, alpha)
    return [w + 2 * alpha * (1 - alpha) * b for w, b in zip(straight, bend)]


def gradient_at(
    model: nn.Module,
    loss: Callable[..., torch.Tensor],
    images: torch.Tensor,
    labels: torch.Tensor,
    weights: Tensors,
) -> list[torch.Tensor]:
    """The gradient of ``loss`` at other weights than the model's own; differentiable in them too.

    It is zero for a parameter that is frozen or unused.

    Parameters
    ----------
    model
        Whose own weights are not used.
    loss, images, labels
        As in ``objectives.gradient``.
    weights
        One tensor per parameter.
    """
    names, parameters = zip(*model.named_parameters())
    value = loss(functional_call(model, dict(zip(names, weights)), images), labels)
    trained = [w for w, p in zip(weights, parameters) if p.requires_grad]
    found = iter(torch.autograd.grad(value, trained, create_graph=True, allow_unused=True))
    gradients = [next(found) if p.requires_grad else None for p in parameters]
    return [torch.zeros_like(w) if g is None else g for g, w in zip(gradients, weights)]


def with_penalties(distance: Distance) -> Distance:
    """The same distance plus whatever stands in ``g`` behind the layers of ``d``.

    Parameters
    ----------
    distance
        (g, d) -> scalar; an ``update_of`` appends its penalties, scalars, to its layers.
    """

    def penalised(g: Tensors, d: Tensors) -> torch.Tensor:
        penalties = g[len(d) :]
        return distance(g[: len(d)], d) + sum(penalties, torch.zeros_like(d[0].sum()))

    return penalised


class PublishedAdam(BoxedAdam):
    """The optimizer of SME's authors: Adam, 1 for images of variance 1, and 0.001 for the point.

    Parameters
    ----------
    variables
        What is optimised; the first are the images in pixels. They and α, the only scalar, are
        clamped to [0, 1] after each step.
    max_evaluations
        Budget; both rates fall tenfold after 3/8, 5/8 and 7/8 of it.
    """

    def __init__(self, variables: Variables, max_evaluations: int) -> None:
        images, *others = variables
        groups = [{"params": [images], "lr": CONTRAST}]
        if others:
            groups.append({"params": others, "lr": 1e-3})
        boxed = [images, *(each for each in others if each.dim() == 0)]
        super().__init__(groups, boxed, max_evaluations)
        self.clamp()


@records.attack(
    "sme",
    title="SME",
    colour=8,
    marker="v",
    assumes=("a total-variation weight",),
    client="many steps of SGD on batches in any order",
)
@records.passes_on_to(reconstruct, fixed=["distance", "update_of", "unknowns", "resume", "scale"])
@in_lanes
@check.arguments
def sme(
    seen: Observation,
    *,
    curved: bool = False,
    num_images: check.Count = 1,
    labels: str | Labels = "inferred",
    total_variation: check.NonNegative = 0.005 / CONTRAST,
    max_evaluations: check.Count = 1000,
    **options: Any,
) -> Reconstruction:
    """Surrogate model extension (Zhu et al. 2023), with its authors' optimizer and prior.

    1 - cos(g((1 - α) W_t + α W_{t+1}), Δ) plus total variation, over images and α.

    Parameters
    ----------
    seen
        What the observer sees.
    curved
        Whether the point lies on a Bézier curve (Xia et al. 2025) instead, whose control point is
        searched too and pays ``‖P - middle‖²/‖Δ‖²``. Their scaling of Δ is left out.
    num_images, labels
        Of ``search.reconstruct``; the authors' are told the labels.
    total_variation
        Weight of that prior; theirs is 0.01 on half of what counts here, of normalised pixels.
    max_evaluations
        As theirs, at least 1.
    **options
        Of ``search.reconstruct``.

    Notes
    -----
    The images themselves are not normalised here: rate and weight are converted instead.
    """
    published = {"coordinates": pixels, "optimizer": PublishedAdam, "whole_budget": True}
    return _search(
        seen,
        objectives.cosine_distance,
        curved,
        num_images=num_images,
        labels=labels,
        total_variation=total_variation,
        max_evaluations=max_evaluations,
        **{**published, **options},
    )


@records.attack(
    "surrogate_dlm",
    title="DLM+ between the snapshots",
    colour=6,
    marker="D",
    client="several steps of SGD on batches in any order",
)
@records.passes_on_to(reconstruct, fixed=["distance", "update_of", "unknowns", "resume", "scale"])
@in_lanes
@check.arguments
def surrogate_dlm(
    seen: Observation,
    *,
    curved: bool = False,
    num_images: check.Count = 1,
    labels: str | Labels = "inferred",
    **options: Any,
) -> Reconstruction:
    """DLM+ whose gradient is taken at a point between the snapshots, which is searched as well.

    Parameters
    ----------
    seen
        What the observer sees.
    curved, num_images, labels
        As in ``sme``.
    **options
        Of ``search.reconstruct``.
    """
    return _search(
        seen,
        objectives.normalised_distance,
        curved,
        num_images=num_images,
        labels=labels,
        **options,
    )


def _search(
    seen: Observation,
    distance: Distance,
    curved: bool,
    *,
    num_images: int,
    labels: str | torch.Tensor,
    dtype: torch.dtype = torch.float64,
    **options: Any,
) -> Reconstruction:
    known = known_labels(seen, labels, num_images, local_steps=MANY_STEPS)
    update = [layer.to(dtype) for layer in seen.delta]
    length = sum(layer.square().sum() for layer in update)
    bend = {CONTROL.format(i): torch.zeros_like(d) for i, d in enumerate(update) if curved}

    def update_of(model, loss, images, labels, alpha, **bend):
        weights = list(model.parameters())
        if not bend:
            return gradient_at(model, loss, images, labels, on_segment(weights, update, alpha))
        parts = list(bend.values())
        g = gradient_at(model, loss, images, labels, on_curve(weights, update, parts, alpha))
        return [*g, CURVED * sum(part.square().sum() for part in parts) / length]

    return reconstruct(
        seen,
        with_penalties(distance),
        update_of=update_of,
        unknowns={"alpha": MIDDLE, **dict.fromkeys(bend, 0.0)},
        resume=bend,
        num_images=num_images,
        labels=labels if known is None else known,
        dtype=dtype,
        **options,
    )
