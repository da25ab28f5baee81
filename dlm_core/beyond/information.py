"""The information that an update holds about the image: JᵀWJ, J the Jacobian of the update, W the weights of its entries.

Its inverse is the Cramér-Rao bound, and the step of a Gauss-Newton fit. Conventions as in ``recursion``.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch.func import vjp, vmap

from dlm_core.beyond.recursion import PRIOR_VARIANCE, add_by_channel, cholesky, signals, signals_after_first, times

LARGEST = 5000  # entries of a layer: beyond it a square matrix (0.2 GB at this size) is only applied, never formed
CHUNK = 64  # unit vectors sent through a network at once; more costs memory and gains no time


@dataclass(frozen=True)
class Curvature:
    """The information matrix N = JᵀWJ + ridge of an image in an update, J the update's Jacobian, W its weights.

    solve     [n, m] -> N⁻¹ times it.      variance  [n] diagonal of N⁻¹, None where n is too large.
    ridge     precision of the prior, or more where N would otherwise be singular in float64.
    """

    solve: Callable
    variance: torch.Tensor | None
    ridge: float = 1 / PRIOR_VARIANCE


def curvature(layers, label, weights, x, eta, error_variance):
    """The Curvature of the image ``x`` [n], learning rate ``eta``, with one matrix of ``weights`` [O, I] per layer.

    Where ``x`` is longer, as in ``signals``, its rest has prior variance ``error_variance``.
    """
    if layers[0].window is None:
        return _low_rank_curvature(layers, label, weights, x, eta, error_variance)
    (deltas, inputs), push, pull = _linearise(partial(signals, layers, label), x)

    def information(v):  # JᵀWJ v
        d_dot, u_dot = push(v)
        back = [_weigh(*each) for each in zip(layers, weights, deltas, inputs, d_dot, u_dot)]
        return eta**2 * pull(([d for d, _ in back], [u for _, u in back]))

    if len(x) > LARGEST:
        return Curvature(partial(_conjugate_gradients, information), None)
    if max(d.numel() for d in deltas) > LARGEST:
        matrix = vmap(information, chunk_size=CHUNK)(torch.eye(len(x)).to(x))
    else:
        matrix = _descend(layers, label, [eta**2 * w for w in weights], deltas, inputs)
    factor, ridge = cholesky(matrix)
    inverse = torch.cholesky_inverse(factor)
    # along a direction without data N⁻¹ is 1/ridge, the prior's variance is meant: the projector on these is (ridge N⁻¹)²
    variance = inverse.diagonal() + (PRIOR_VARIANCE - 1 / ridge) * ridge**2 * inverse.square().sum(1)
    return Curvature(lambda b: torch.cholesky_solve(b, factor), variance, ridge)


def _descend(layers, label, weights, deltas, inputs):
    """JᵀWJ, layer by layer from the last one down.

    ``above`` is the information in a layer's output z that the layers above it hold, B = dδ/dz [O·L, O·L], symmetric. The
    layer's own rows δ uᵀ add theirs, through δ and through u; its kernel and the activation below take both to the next z.
    A square matrix in the place of many vectors costs a few convolutions of it.
    """
    p = deltas[-1] + torch.nn.functional.one_hot(label, len(deltas[-1])).to(deltas[-1])[:, None]
    above, B = torch.zeros_like(p @ p.T), p.flatten().diag() - p @ p.T
    for depth in reversed(range(len(layers))):
        layer = layers[depth]
        below = _own(layer, weights[depth], deltas[depth], inputs[depth], above, B)
        if depth == 0:
            return below
        z = layers[depth - 1].output(inputs[depth - 1])
        slope, bend = _slopes(layers[depth - 1].act, z.flatten())
        back = layer.spread(times(layer.kernel.T, deltas[depth])).flatten()
        above = below.mul_(slope).mul_(slope[:, None])
        B = layer.back(layer.back(B).T).mul_(slope).mul_(slope[:, None])
        B.diagonal().add_(bend * back)


def _own(layer, weights, delta, u, above, B):
    """Information in a layer's input [n, n], from that ``above`` it in its output and that of its own gradient."""
    placed, entries = layer.placed(delta), len(u)  # [O, K, P], I
    if layer.has_bias:
        u = torch.cat([u, torch.ones_like(u[:1])])
    channels, places, pixels = layer.shape[0], *placed.shape[1:]
    if len(u) < u.shape[1]:  # fewer rows than entries of δ: form the rows
        J = u @ layer.back(B).reshape(*delta.shape, -1)
        direct = J[:, :entries].unflatten(1, (channels, places)).unflatten(-1, (channels, pixels))
        direct.diagonal(dim1=1, dim2=3).add_(placed[..., None])
        J = J.flatten(0, 1)
        return layer.back(layer.back(above).T).addmm_(J.T, weights.reshape(-1, 1) * J)
    through_delta = (u.T * weights[:, None]) @ u  # per output channel [O, L, L]
    above = above + B @ (through_delta @ B.reshape(*delta.shape, -1)).flatten(0, 1)
    weighted = layer.by_channel(weights)[..., None] * u[:entries].reshape(channels, places, -1)  # [O, C, K, L]
    mixed = (weighted.transpose(2, 3).flatten(1, 2) @ placed).reshape(len(delta), channels, -1, pixels).transpose(1, 2)
    half = layer.back(layer.back(above).T / 2 + mixed.reshape(len(B), -1).T @ B)
    matrix = half + half.T
    add_by_channel(matrix, layer, placed, weights)
    return matrix


def _slopes(act, z):
    """(act', act'') of an elementwise activation."""

    def slope(z):
        return vjp(act, z)[1](torch.ones_like(z))[0]

    first, pull = vjp(slope, z)
    return first, pull(torch.ones_like(z))[0]


def _low_rank_curvature(layers, label, weights, x, eta, error_variance):
    """The same for a first linear layer, where x enters the rest through z = Wx alone, with the errors e of its δ, if any.

    Its own rows are δ_o x_i. Per pixel the square Σ_o w_o (x_i δ̇_o + δ_o ẋ_i)² is completed in ẋ_i, with minimum at -Eδ̇.
    That leaves a diagonal D in t = ẋ + Eδ̇, the information ``left`` in δ̇ and ``above`` in ż, all sums of non-negative terms
    (a plain Woodbury identity would subtract large numbers here). With δ̇ = Bż + ė both are linear in y = (t, ė): ż = Zy,
    δ̇ = Uy, so N⁻¹ = A (D + Zᵀ above Z + Uᵀ left U)⁻¹ Aᵀ where A = 1 - (E, 0)ᵀU takes y to (ẋ, ė).
    """
    layer, ridge = layers[0], 1 / PRIOR_VARIANCE
    n = math.prod(layer.shape)
    x, errors = x[:n], x[n:]
    matrix, w = layer.kernel, weights[0][:, :n]
    z = layer.output(layer.patches(x))
    (deltas, inputs), push, pull = _linearise(partial(signals_after_first, layers, label), z)
    delta = eta * (deltas[0] + errors[:, None] if len(errors) else deltas[0])
    one = torch.eye(len(z)).to(x)

    def information(v):  # (JᵀWJ v for the layers above, the change of this layer's δ)
        d_dot, u_dot = push(v[:, None])
        back = [_weigh(*each) for each in zip(layers[1:], weights[1:], deltas[1:], inputs, d_dot[1:], u_dot)]
        above = pull(([torch.zeros_like(z), *(d for d, _ in back)], [u for _, u in back]))
        return eta**2 * above[:, 0], eta * d_dot[0][:, 0]

    above, d_dot = vmap(information)(one)
    D = (w.T @ delta.square())[:, 0] + ridge
    E = (w * delta * x).T / D[:, None]
    shared = ((w * x.square() / D) @ w.T).fill_diagonal_(0)
    own = shared @ delta.square() + w @ (ridge * x.square() / D)[:, None]
    left = torch.diag(own[:, 0]) - shared * (delta @ delta.T)
    if layer.has_bias:
        left = left + torch.diag(weights[0][:, n])

    Z = torch.linalg.solve(one + matrix @ E @ d_dot.T, torch.cat([matrix, -eta * matrix @ E], 1)[:, : n + len(errors)])
    U = d_dot.T @ Z
    U[:, n:] += eta * one[:, : len(errors)]
    spread = torch.cat([1 / D, torch.full_like(errors, error_variance)])
    root = torch.cat([_root(above) @ Z, _root(left) @ U])
    factor = torch.linalg.cholesky(torch.eye(len(root)).to(x) + root * spread @ root.T)
    H = torch.linalg.solve_triangular(factor, root * spread, upper=False)

    def solve(b):
        y = b - U.T @ (E.T @ b[:n])
        y = y * spread[:, None] - H.T @ (H @ y)
        return torch.cat([y[:n] - E @ (U @ y), y[n:]])

    U_spread, HA = U * spread, H[:, :n] - (H @ U.T) @ E.T
    squares = (E @ (U_spread @ U.T) * E).sum(1) - 2 * (E * U_spread[:, :n].T).sum(1)
    return Curvature(solve, 1 / D + squares - HA.square().sum(0))


def _root(matrix):
    """R with RᵀR = a positive semi-definite matrix."""
    values, vectors = torch.linalg.eigh(matrix)
    return values.clamp(min=0).sqrt()[:, None] * vectors.T


def _linearise(function, x):
    """(value, push, pull): what ``function`` gives at ``x``, its Jacobian times a vector and that one's transpose.

    ``push`` is the transpose of the transpose; torch's forward mode would do, but its import warns of deprecation.
    """
    value, pull = vjp(function, x)
    _, push = vjp(lambda cotangent: vjp(function, x)[1](cotangent)[0], value)
    return value, lambda v: push(v)[0], lambda cotangent: pull(cotangent)[0]


def _weigh(layer, weights, delta, u, d_dot, u_dot):
    """A change of (δ, u) -> the change of the gradient -> times the weights -> back to (δ, u)."""
    if delta.shape[1] == 1:  # one patch: the same without a matrix [O, I] per direction
        size = torch.cat([u.square(), torch.ones_like(u[:1])])[: weights.shape[1]]
        weights, size = weights[:, : len(u)], weights @ size
        mixed = weights * (delta @ u.T)
        to_u = times(mixed.T, d_dot) + weights.T @ delta.square() * u_dot
        return size * d_dot + times(mixed, u_dot), to_u
    change = d_dot @ u.T + delta @ u_dot.T
    if layer.has_bias:
        change = torch.cat([change, d_dot.sum(1, keepdim=True)], dim=1)
    return layer.gradient_transpose(weights * change, delta, u)


def _conjugate_gradients(information, right, steps=200):
    """N⁻¹ ``right`` [n, m] by so many steps of conjugate gradients: what the data determine best comes first."""
    columns = []
    for b in right.T:
        x, residual, direction = torch.zeros_like(b), b, b
        for _ in range(steps):
            image = information(direction) + direction / PRIOR_VARIANCE
            size = residual.square().sum()
            if size <= 1e-20 * b.square().sum():
                break
            length = size / (direction @ image)
            x, residual = x + length * direction, residual - length * image
            direction = residual + residual.square().sum() / size * direction
        columns.append(x)
    return torch.stack(columns, dim=1)
