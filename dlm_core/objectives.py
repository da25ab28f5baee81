"""How far a dummy update is from the observed one: pure functions of two lists of tensors.

Both have one tensor per layer: ``g`` is the gradient of the loss at W_t for dummy data, ``d``
the observed Δ = W_t - W_{t+1} (DLG: Δ/η). Each returns a scalar, zero where the two agree (up
to positive scale, where it says so), differentiable in ``g`` and, for DLM, in ``k``, and raises
ValueError for lists of different lengths.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import nn

Tensors = Sequence[torch.Tensor]


def gradient(
    model: nn.Module,
    loss: Callable[..., torch.Tensor],
    images: torch.Tensor,
    labels: torch.Tensor,
) -> tuple[torch.Tensor, ...]:
    """g(x, y): the gradient of ``loss`` in the model's parameters.

    Parameters
    ----------
    model
        With the weights W_t.
    loss
        (logits [B, K], labels) -> scalar.
    images
        x, [B, C, H, W].
    labels
        y, [B] class indices or [B, K] distributions.

    Returns
    -------
    tuple of torch.Tensor
        One tensor per parameter, itself differentiable in images and labels; zeros for one that is
        frozen or unused.
    """
    value = loss(model(images), labels)
    parameters = list(model.parameters())
    gradients = gradients_of(value, parameters)
    return tuple(torch.zeros_like(p) if g is None else g for g, p in zip(gradients, parameters))


def gradients_of(value: torch.Tensor, parameters: Tensors) -> list[torch.Tensor | None]:
    """The gradient of a loss in each parameter, itself differentiable; None for a frozen or an
    unused one.
    """
    trained = [p for p in parameters if p.requires_grad]
    found = iter(torch.autograd.grad(value, trained, create_graph=True, allow_unused=True))
    return [next(found) if p.requires_grad else None for p in parameters]


def squared_distance(g: Tensors, d: Tensors) -> torch.Tensor:
    """Σ_layers ‖g - d‖²: DLG (Zhu et al. 2019), with d = Δ/η."""
    return _total(_dot(a - b, a - b) for a, b in _each(g, d))


def scaled_distance(g: Tensors, d: Tensors, k: torch.Tensor | float) -> torch.Tensor:
    """Σ_layers ‖g - kΔ‖²: DLM (Zhao et al. 2024).

    Parameters
    ----------
    g, d
        The dummy gradient and Δ.
    k
        A scalar, about 1/η; DLM optimises it too.
    """
    return _total(_dot(a - k * b, a - k * b) for a, b in _each(g, d))


def normalised_distance(g: Tensors, d: Tensors) -> torch.Tensor:
    """Σ_layers ‖g/n(g) - Δ/n(Δ)‖²: DLM+ (Zhao et al. 2024).

    Invariant to positive scale of either argument.

    Notes
    -----
    Computed as Σ‖g - (n(g)/n(Δ)) Δ‖²/n(g)², which is the same and divides once instead of once
    a layer: dividing each layer of g would keep a copy of all of it for the way back.
    """
    n_g, n_d = mean_norm(g), mean_norm(d)
    return squared_distance(g, [n_g / n_d * layer for layer in d]) / n_g.square()


def cosine_distance(g: Tensors, d: Tensors) -> torch.Tensor:
    """1 - cos(g, Δ), all layers as one vector: Inverting Gradients (Geiping et al. 2020).

    Invariant to positive scale of either argument.
    """
    dot, g_squared, d_squared = _inner(g, d), _inner(g, g), _inner(d, d)
    return 1 - dot / (g_squared * d_squared).sqrt()


def weighted(
    distance: Callable[..., torch.Tensor], weights: Sequence[torch.Tensor | float]
) -> Callable[..., torch.Tensor]:
    """The same distance with every coordinate of g and d multiplied by its weight.

    Parameters
    ----------
    distance
        Of this module: (g, d) -> scalar, or (g, d, k) -> scalar.
    weights
        One tensor or number per layer. 0 leaves a coordinate out, 1/σ counts it by its noise.
    """

    def between(g: Tensors, d: Tensors, *k: torch.Tensor) -> torch.Tensor:
        g, d = ([w * layer for w, layer in _each(weights, each)] for each in (g, d))
        return distance(g, d, *k)

    return between


def mean_norm(tensors: Tensors) -> torch.Tensor:
    """n(·): the mean over layers of the layers' Euclidean norms."""
    return torch.stack([tensor.norm() for tensor in tensors]).mean()


def total_variation(images: torch.Tensor) -> torch.Tensor:
    """Mean absolute difference of vertical and of horizontal neighbours, summed.

    Parameters
    ----------
    images
        [B, C, H, W]; one that is a single pixel high or wide has no such neighbours, which count 0.
    """
    each = (images.diff(dim=dim).abs() for dim in (-2, -1))
    return _total(d.mean() if d.numel() else d.sum() for d in each)


def _total(numbers: Iterable[torch.Tensor]) -> torch.Tensor:
    # typeshed: of nothing it would be 0
    return sum(numbers)  # type: ignore[return-value]


def _inner(a: Tensors, b: Tensors) -> torch.Tensor:
    """Inner product of two lists of tensors."""
    return _total(_dot(one, other) for one, other in _each(a, b))


def _each(a: Sequence[Any], b: Sequence[Any]) -> Iterable[tuple[Any, Any]]:
    """Layer by layer; ValueError where one has more of them, which would be left out unseen."""
    if len(a) != len(b):
        raise ValueError(f"one list has {len(a)} layers and the other {len(b)}; both take as many")
    return zip(a, b)


def _dot(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Inner product of two tensors; unlike (a * b).sum() it stores no product: half the time."""
    return torch.dot(a.flatten(), b.flatten())
