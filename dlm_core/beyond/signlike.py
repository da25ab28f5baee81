"""Attacks on one step of Adam, AdamW or RMSprop, whose update looks like the gradient's sign.

``reading`` has what the update says of the gradient without a search: bounds of every coordinate.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from dlm_core import check, objectives, records
from dlm_core.beyond.reading import Reading, read
from dlm_core.observation import Observation
from dlm_core.results import Reconstruction
from dlm_core.search import in_lanes, reconstruct

__all__ = ["Reading", "distance_outside", "interval_dlm", "read", "sign_distance", "sign_dlm"]

Tensors = Sequence[torch.Tensor]


@records.attack(
    "interval_dlm",
    title="DLM on bounds",
    colour=2,
    marker="^",
    assumes=("that a sign-like optimizer took one step on one image",),
    client="one step of Adam, AdamW or RMSprop on one image",
    several=False,
    audited=1,
    scene={"dataset": "fashion_mnist", "client_optimizer": "adam", "learning_rate": 1e-3},
)
@records.passes_on_to(reconstruct)
@in_lanes
@check.arguments
def interval_dlm(seen: Observation, **options: Any) -> Reconstruction:
    """DLM on bounds: an image whose gradient lies where ``read`` says it does.

    Parameters
    ----------
    seen
        What the observer sees. Told: that a sign-like optimizer took one step on one image.
    **options
        Of ``search.reconstruct``.

    Raises
    ------
    ValueError
        As ``read`` does.
    """
    reading = read(seen)
    outside = distance_outside(reading.low, reading.high)
    settings: dict[str, Any] = {"labels": reading.label, "tolerance": 1e-8, **options}
    return reconstruct(seen, outside, **settings)


@records.attack(
    "sign_dlm",
    title="signs alone",
    colour=8,
    marker="<",
    assumes=(
        "that a sign-like optimizer took one step",
        "a total-variation weight that suits the data",
    ),
    client="one step of Adam, AdamW or RMSprop",
    scene={"dataset": "fashion_mnist", "client_optimizer": "adam", "learning_rate": 1e-3},
)
@records.passes_on_to(reconstruct)
@in_lanes
@check.arguments
def sign_dlm(
    seen: Observation, *, total_variation: check.NonNegative = 0.1, **options: Any
) -> Reconstruction:
    """What the signs of Δ below the last layer say alone: the attack without ``read``.

    Parameters
    ----------
    seen
        What the observer sees. The last layer's signs say the label, and nothing else is taken
        from it.
    total_variation
        Weight of that prior.
    **options
        Of ``search.reconstruct``.

    Raises
    ------
    ValueError
        Where no layer below the last one moved.
    """
    named = zip(seen.parameter_names, seen.delta)
    below = [name not in seen.head.names and bool(layer.any()) for name, layer in named]
    if not any(below):
        raise ValueError("no layer below the last one moved, so that there are no signs to match")
    distance = partial(_signs_of, below)
    return reconstruct(seen, distance, total_variation=total_variation, **options)


def _signs_of(below: Sequence[bool], g: Tensors, d: Tensors) -> torch.Tensor:
    g_below = [layer for layer, counts in zip(g, below) if counts]
    d_below = [layer for layer, counts in zip(d, below) if counts]
    return sign_distance(g_below, d_below)


def distance_outside(low: Tensors, high: Tensors) -> Callable[[Tensors, Any], torch.Tensor]:
    """The distance Σ_layers ‖g - [low, high]‖², relative to that of g = 0.

    Parameters
    ----------
    low, high
        One tensor per layer; -inf and inf leave a side open.

    Returns
    -------
    Callable
        (g, d) -> scalar, zero where every coordinate is within its bounds. The update d is what
        the bounds were read from, and not looked at.
    """
    nearest = [torch.zeros_like(lo).clamp(lo, hi) for lo, hi in zip(low, high)]
    size = sum((layer.square().sum() for layer in nearest), nearest[0].new_zeros(()))
    return partial(_outside, list(low), list(high), size)


def _outside(low: Tensors, high: Tensors, size: torch.Tensor, g: Tensors, d: Any) -> torch.Tensor:
    within = [layer.clamp(lo, hi).detach() for layer, lo, hi in zip(g, low, high)]
    return objectives.squared_distance(g, within) / size


def sign_distance(g: Tensors, d: Tensors, softness: float = 0.1) -> torch.Tensor:
    """1 - cos(tanh(g/s), sign Δ), mean over layers: signs and nothing else.

    Parameters
    ----------
    g, d
        The gradient of dummy data, and Δ: one tensor per layer.
    softness
        > 0: s is so many times the layer's root mean square of g.

    Notes
    -----
    Not zero at the truth, for the coordinates smaller than s. Invariant to positive scale.
    """
    each = []
    for layer, observed in zip(g, d):
        scale = softness * layer.square().mean().sqrt() + torch.finfo(layer.dtype).tiny
        each.append(objectives.cosine_distance([torch.tanh(layer / scale)], [observed.sign()]))
    return torch.stack(each).mean()
