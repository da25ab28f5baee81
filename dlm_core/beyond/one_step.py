"""One SGD step on a batch that was found, against the update: labels, learning rate and χ²."""

import copy
from typing import NamedTuple

import torch
from torch.nn import functional as F

from dlm_core import objectives
from dlm_core.beyond.rounding import TINY
from dlm_core.beyond.sparse_traces import first_layer
from dlm_core.federated import loss as training_loss
from dlm_core.observation import Observation

MOVES = 4  # of the images by their errors, to see what these do to g
EDGE = 4.0  # of an output's error by the images' own, within which a unit is on or off
MOST_COPIES = 100  # of one image in a batch


def labels_and_counts(seen: Observation, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Label and number of occurrences [r] of each image.

    Parameters
    ----------
    seen
        What the observer sees.
    images
        [r, C, H, W] in float64.

    Notes
    -----
    In terms of the images' features, the last layer's update has one row each: η/B·count·(p - e_y).
    """
    features, p = _features_and_outputs(seen, images)
    inputs = torch.cat([features, torch.ones_like(p[:, :1])], dim=1)
    update = torch.cat([seen.head.delta_weight, seen.head.delta_bias[:, None]], dim=1)
    errors = torch.linalg.lstsq(inputs.T, update.T).solution
    labels = errors.argmin(1)
    expected = p - F.one_hot(labels, p.shape[1])
    rates = (errors * expected).sum(1) / expected.square().sum(1).clamp(min=TINY)
    counts = (rates / rates.clamp(min=TINY).min()).round().clamp(1, MOST_COPIES)
    return labels, counts.long()


def _features_and_outputs(
    seen: Observation, images: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(the last layer's input [r, n], the class probabilities [r, K]) of images."""
    model = copy.deepcopy(seen.model).double()
    last = model.get_submodule(seen.head.names[0].rpartition(".")[0])
    entered: list[torch.Tensor] = []
    hook = last.register_forward_pre_hook(lambda _, inputs: entered.append(inputs[0]))
    with torch.no_grad():
        p = model(images).softmax(1)
    hook.remove()
    return entered[0], p


class Step(NamedTuple):
    """η of one SGD step on the batch, its χ²/N, and that of no step at all: of noise alone."""

    rate: float
    chi2: float
    chi2_of_noise: float


def fitted(
    seen: Observation, images: torch.Tensor, labels: torch.Tensor, error: torch.Tensor
) -> Step:
    """Δ against η g by weighted least squares.

    Parameters
    ----------
    seen
        What the observer sees.
    images, labels
        [B, C, H, W] in float64, and [B] class indices.
    error
        [B] standard error of a pixel.

    Notes
    -----
    A weight that stayed where it was is censored, and left out; so are a unit's of the first layer
    that the images' errors leave open whether one of them turned it on.
    """
    g, others = _gradients(seen, images, labels, error)
    update = seen.delta
    length = sum(p.square().sum() for p in g)
    rate = sum((d * p).sum() for d, p in zip(update, g)) / length
    first, on_the_edge = _on_the_edge(seen, images, error)
    weights = []
    for i, (name, d) in enumerate(seen.delta_by_name.items()):
        variance = seen.rounding_variance[i]
        variance = variance + rate**2 * _spread(g[i], [other[i] for other in others])
        weight = (d != 0) / variance.clamp(min=TINY)
        if name in first:
            weight[on_the_edge] = 0
        weights.append(weight)

    def dot(a, b):
        return sum(float((w * p * q).sum()) for w, p, q in zip(weights, a, b))

    rate = dot(update, g) / dot(g, g)
    rest = [d - rate * p for d, p in zip(update, g)]
    moved = max(1, sum(int((weight != 0).sum()) for weight in weights))
    return Step(rate, dot(rest, rest) / moved, dot(update, update) / moved)


def _on_the_edge(
    seen: Observation, images: torch.Tensor, error: torch.Tensor
) -> tuple[set[str], torch.Tensor]:
    """(names of the first layer's parameters, [m] whether a unit is so near zero for an image that
    this image's error may turn it on or off).
    """
    name, layer = first_layer(seen.model, seen.image_shape)
    weight, bias = (each.detach().double() for each in (layer.weight, layer.bias))
    outputs = images.flatten(1).double() @ weight.T + bias
    near = outputs.abs() < EDGE * error[:, None] * weight.norm(dim=1)
    return {f"{name}.weight", f"{name}.bias"}, near.any(0)


def _gradients(
    seen: Observation, images: torch.Tensor, labels: torch.Tensor, error: torch.Tensor
) -> tuple[list[torch.Tensor], list[list[torch.Tensor]]]:
    """(g, others): the gradient in float64; in the client's precision, then for moved images.

    What these differ by is measured noise of g: of the client's arithmetic, and of the images' own
    errors.
    """
    dtype = next(seen.model.parameters()).dtype
    draws = torch.Generator().manual_seed(0)
    model = copy.deepcopy(seen.model).double()
    in_client = copy.deepcopy(seen.model)

    def gradient(model, images):
        found = objectives.gradient(model, training_loss, images, labels)
        return [g.detach().double() for g in found]

    g = gradient(model, images)
    others = [gradient(in_client, images.to(dtype))]
    for _ in range(MOVES):
        draw = torch.randn(images.shape, generator=draws, dtype=torch.float64).to(images)
        moves = draw * error[:, None, None, None]
        others.append(gradient(model, images + moves))
    return g, others


def _spread(g: torch.Tensor, others: list[torch.Tensor]) -> torch.Tensor:
    """Variance of one layer's g, by output unit, from what ``_gradients`` returns."""
    squares = [(other - g).square() for other in others]
    variance = squares[0] + sum(squares[1:]) / MOVES
    return variance.mean(1, keepdim=True) if g.ndim > 1 else variance
