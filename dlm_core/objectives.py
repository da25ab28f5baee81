"""How far a dummy update is from the observed one: pure functions of two lists of tensors, one tensor per layer.

``g`` is the gradient of the loss at W_t for dummy data, ``d`` the observed Δ = W_t - W_{t+1} (DLG: Δ/η). Each returns a
scalar, zero where the two agree (up to positive scale, where it says so), differentiable in ``g`` and, for DLM, in ``k``.
"""

import torch


def gradient(model, loss, images, labels):
    """g(x, y): the gradient of ``loss`` in the model's parameters, one tensor per parameter, itself differentiable.

    images [B, C, H, W]; labels [B] class indices or [B, K] distributions.
    """
    return torch.autograd.grad(loss(model(images), labels), list(model.parameters()), create_graph=True)


def squared_distance(g, d):
    """Σ_layers ‖g - d‖²: DLG (Zhu et al. 2019), with d = Δ/η."""
    return sum(_dot(a - b, a - b) for a, b in zip(g, d))


def scaled_distance(g, d, k):
    """Σ_layers ‖g - kΔ‖²: DLM (Zhao et al. 2024), k ≈ 1/η a variable of the attack."""
    return sum(_dot(a - k * b, a - k * b) for a, b in zip(g, d))


def normalised_distance(g, d):
    """Σ_layers ‖g/n(g) - Δ/n(Δ)‖²: DLM+ (Zhao et al. 2024). Invariant to positive scale of either argument."""
    n_g, n_d = mean_norm(g), mean_norm(d)
    return squared_distance(g, [n_g / n_d * layer for layer in d]) / n_g.square()


def cosine_distance(g, d):
    """1 - cos(g, Δ), all layers as one vector: Inverting Gradients (Geiping et al. 2020). Invariant to positive scale."""
    dot, g_squared, d_squared = (sum(_dot(a, b) for a, b in zip(*pair)) for pair in ((g, d), (g, g), (d, d)))
    return 1 - dot / (g_squared * d_squared).sqrt()


def weighted(distance, weights):
    """The same ``distance`` with every coordinate of g and d multiplied by its weight, one tensor or number per layer.

    0 leaves a coordinate out, 1/σ counts it by its noise.
    """

    def between(g, d, *k):
        return distance([w * layer for w, layer in zip(weights, g)], [w * layer for w, layer in zip(weights, d)], *k)

    return between


def mean_norm(tensors):
    """n(·): the mean over layers of the layers' Euclidean norms."""
    return torch.stack([tensor.norm() for tensor in tensors]).mean()


def total_variation(images):
    """Mean absolute difference of vertical and of horizontal neighbours, summed; ``images`` [B, C, H, W]."""
    return images.diff(dim=-2).abs().mean() + images.diff(dim=-1).abs().mean()


def _dot(a, b):
    """Inner product of two tensors; unlike (a * b).sum() it stores no product, which halves the time of a large layer."""
    return torch.dot(a.flatten(), b.flatten())
