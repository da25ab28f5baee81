"""The information that an update holds about the image: its inverse is the Cramér-Rao bound.

It gives the step of a Gauss-Newton fit as well. The code cites the equations below by number.
Symbols are those of ``stacks``: per layer the kernel K, the patches u of its input, z = K u + b,
and δ = dloss/dz. A dot marks a small change: ẋ of the image, u̇ and δ̇ what follows from it.

What is computed
----------------
The client's update is η G, with G = δ uᵀ in each layer. Entry (o, i) of the update is known with
inverse variance w_oi. A change ẋ of the image changes G by the product rule:

    (1)  Ġ = δ̇ uᵀ + δ u̇ᵀ.

How well the update tells x from x + ẋ is the quadratic form

    (2)  ẋᵀ N ẋ = η² Σ_layers Σ_oi w_oi Ġ_oi² + r ẋᵀẋ,

with r the precision of a prior. N is the information matrix. N⁻¹ is the Cramér-Rao bound on the
covariance of any estimate of x, and its diagonal bounds the variance of each pixel. With J the
update's Jacobian in x, and W = diag(w), N = Jᵀ W J + r. The transpose of (1), which Jᵀ needs,
takes a matrix Q of G's shape to

    (3)  Q u in the place of δ̇,    Qᵀ δ in the place of u̇.

A bias counts as one more entry of each patch, of value 1, that no change of the input moves.

Where N is singular in float64, r is raised to r'. Along a direction without data N⁻¹ then says
1/r', where the prior's 1/r is meant. With the raised N's eigenvalues λ and eigenvectors v,

    (4)  variance = diag( Σ v vᵀ / (λ - r' + r) ),    λ - r' taken as 0 where it is below r'.

A stack that begins with convolutions: layer by layer, from the last one down
-----------------------------------------------------------------------------
The layers above a layer see its z alone. Two square matrices [O·L, O·L] sum them up: A, their
information in z, and B, the change of δ with z:

    (5)  żᵀ A ż = their part of (2),    δ̇ = B ż.

B is the loss's second derivative in z, so Bᵀ = B. The last layer has δ = p - e_y, with p the
softmax and e_y the label's unit vector. No layer is above it:

    (6)  A = 0,    B = dp/dz = diag(p) - p pᵀ.

Each layer's z is linear in its input a: ż = C ȧ, with C the kernel as a matrix (``Layer.back``
multiplies by it). So δ̇ = B C ȧ. In the other term of (1), δ u̇ᵀ, entry i of a patch is place k of
channel c, i = (c, k), and sees one pixel p of that channel:

    (7)  P_okp = Σ_l δ_ol [place k of patch l is pixel p],    (δ u̇ᵀ)_o(ck) = Σ_p P_okp ȧ_cp.

M, the information in the layer's input, is that of the layers above and that of the layer's own
gradient, whose rows j_oi = dG_oi/da follow from (1) and (7). From here to (10), w includes η².

    (8)  M = Cᵀ A C + Σ_oi w_oi j_oi j_oiᵀ,
         j_o(ck) = Σ_l u_(ck)l (B C)_ol + P_ok, the latter in the pixels of channel c.

Where a patch has fewer entries than there are patches, (8) is computed as it stands. Otherwise
the square is expanded, and no row is formed:

    (9)  M = Cᵀ (A + B U B) C + Cᵀ B Y + (Cᵀ B Y)ᵀ + D,
         U_(ol)(ol') = Σ_i w_oi u_il u_il', which is 0 between different o,
         Y_(ol)(cp) = Σ_k w_o(ck) u_(ck)l P_okp,
         D_(cp)(cp') = Σ_ok w_o(ck) P_okp P_okp', which is 0 between different c.

The input is a = act(z) with z of the layer below, whose δ is act'(z) dloss/da, and dloss/da = Cᵀ δ.
The chain rule gives A of the layer below, and with the product rule B:

    (10)  A = S M S,    B = S Cᵀ B C S + diag(act''(z) Cᵀ δ),    S = diag(act'(z)).

At the first layer M is the information in the image, and N = M + r.

A first linear layer: low rank
------------------------------
Here z = W x + b has far fewer entries than x, and the layers above see x through z alone. The
client computes its δ in float32. The error e of that is shared by a whole row of G, so it is an
unknown of its own, of variance σ². With d = η (δ + e) the layer's update is d_o x_i, and by (5)

    (11)  ḋ = η B ż + η ė.

The layer's own part of (2) is, for pixel i and with its prior, a square in ẋ_i to be completed:

    (12)  Σ_o w_oi (x_i ḋ_o + d_o ẋ_i)² + r ẋ_i² = D_i (ẋ_i + Σ_o E_io ḋ_o)² + rest_i(ḋ),
          D_i = Σ_o w_oi d_o² + r,    E_io = w_oi x_i d_o / D_i.

The rests, summed over pixels, and the bias's own w_ob ḋ_o² are ḋᵀ L ḋ with

    (13)  L_oo' = -S_oo' d_o d_o' where o ≠ o',    S_oo' = Σ_i w_oi w_o'i x_i² / D_i,
          L_oo = Σ_o'≠o S_oo' d_o'² + Σ_i w_oi r x_i² / D_i + w_ob.

All terms of D and of L's diagonal are non-negative: nothing large is subtracted, as a plain
Woodbury identity would. With t = ẋ + E ḋ, all of (2) and the prior of e become

    (14)  Σ_i D_i t_i² + ėᵀė / σ² + ḋᵀ L ḋ + żᵀ A ż.

Both ż and ḋ are linear in y = (t, ė), by ż = W ẋ = W (t - E ḋ) and (11):

    (15)  ż = Z y,    Z = (1 + W E η B)⁻¹ [W, -η W E],
    (16)  ḋ = V y,    V = η B Z + [0, η].

So (14) is yᵀ (Σ⁻¹ + RᵀR) y, with Σ = diag(1/D, σ²) and few rows in R:

    (17)  R = [A^½ Z; L^½ V].

The matrix inversion lemma inverts it, by way of a matrix as small as R is short:

    (18)  (Σ⁻¹ + RᵀR)⁻¹ = Σ - HᵀH,    H = F⁻¹ R Σ,    F Fᵀ = 1 + R Σ Rᵀ.

From y back to the unknowns, by ẋ = t - E ḋ:

    (19)  (ẋ, ė) = T y,    T = 1 - [E V; 0],    N⁻¹ = T (Σ - HᵀH) Tᵀ.

T's upper rows, those of ẋ, are [1, 0] - E V. The diagonal of N⁻¹ there is

    (20)  variance_i = 1/D_i + (E V Σ Vᵀ Eᵀ)_ii - 2 (E V Σ)_ii - Σ_j (H Tᵀ)_ji².
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch.func import vmap

from dlm_core.beyond.at_once import at_once
from dlm_core.beyond.recursion import (
    PRIOR_VARIANCE,
    Tensors,
    add_by_channel,
    cholesky,
    pull_back,
    signals,
    signals_after_first,
)
from dlm_core.beyond.stacks import Layer, times

LARGEST = 5000  # entries of a layer: a square matrix of more (0.2 GB) is applied, never formed
CHUNK = 64  # unit vectors sent through a network at once on a CPU; more gains no time
TENSORS = 16  # of the size of all layers' δ and u, that each of them takes on a GPU
CG_STEPS = 200  # of conjugate gradients, where the matrix is not formed
CG_ENOUGH = 1e-20  # squared residual, relative to the right-hand side's
NEGLIGIBLE = 0.01  # of a direction, that a raised ridge may seem to determine


@dataclass(frozen=True)
class Curvature:
    """The information matrix N of (2).

    Attributes
    ----------
    solve
        [n, m] -> N⁻¹ times it.
    variance
        [n] diagonal of N⁻¹ for the image, by (4) or (20); None where n is too large.
    ridge
        r' of (4), which is in the N that ``solve`` inverts.
    """

    solve: Callable[[torch.Tensor], torch.Tensor]
    variance: torch.Tensor | None
    ridge: float = 1 / PRIOR_VARIANCE


def curvature(
    layers: Sequence[Layer],
    label: torch.Tensor,
    weights: Sequence[torch.Tensor],
    x: torch.Tensor,
    eta: float,
    error_variance: float,
    prior_variance: float = PRIOR_VARIANCE,
) -> Curvature:
    """Return the information about an image in an update.

    Parameters
    ----------
    layers
        The network.
    label
        Class index, a scalar.
    weights
        Per layer w [O, I] or [O, I + 1], the inverse variances of the update's entries; 0 for those
        not to be used.
    x
        [n] the image. Behind a first linear layer it may be longer: its rest is e, as in
        ``recursion.signals``.
    eta
        η > 0.
    error_variance
        σ², the prior variance of e.
    prior_variance
        1/r, of the image's entries.
    """
    precision = 1 / prior_variance
    if not layers[0].convolves:
        return _low_rank_curvature(layers, label, weights, x, eta, error_variance, precision)
    (deltas, inputs), push, pull = _linearise(partial(signals, layers, label), x)

    def information(v: torch.Tensor) -> torch.Tensor:
        """JᵀWJ v."""
        d_dot, u_dot = push(v)
        back = [_weigh(*each) for each in zip(layers, weights, deltas, inputs, d_dot, u_dot)]
        return eta**2 * pull(([d for d, _ in back], [u for _, u in back]))

    if len(x) > LARGEST:
        solve = partial(_conjugate_gradients, information, precision)
        return Curvature(solve, None, precision)
    if max(d.numel() for d in deltas) > LARGEST:
        size = TENSORS * x.element_size() * sum(each.numel() for each in (*deltas, *inputs))
        chunk = at_once(size, x.device, CHUNK)
        matrix = vmap(information, chunk_size=chunk)(torch.eye(len(x)).to(x))
    else:
        matrix = _descend(layers, label, [eta**2 * w for w in weights], deltas, inputs)
    factor, ridge = cholesky(matrix, precision)
    variance = torch.cholesky_inverse(factor).diagonal()
    if ridge > precision and ridge * float(variance.sum()) > NEGLIGIBLE:
        variance = _without_the_raise(matrix, ridge, precision)
    return Curvature(lambda b: torch.cholesky_solve(b, factor), variance, ridge)


def _without_the_raise(raised: torch.Tensor, ridge: float, precision: float) -> torch.Tensor:
    """(4): variances [n] from a matrix [n, n] whose ridge is larger than the prior's."""
    values, vectors = torch.linalg.eigh(raised)
    told = (values - ridge).where(values >= 2 * ridge, 0)
    return vectors.square() @ (1 / (told + precision))


def _descend(
    layers: Sequence[Layer],
    label: torch.Tensor,
    weights: Tensors,
    deltas: Tensors,
    inputs: Tensors,
) -> torch.Tensor:
    """M of (8) at the first layer, from the last one down; ``weights`` are η² w.

    Square matrices take the place of many vectors: one of them costs a few convolutions.
    """
    A, B = _of_the_last(label, deltas[-1])
    for depth in reversed(range(1, len(layers))):
        layer, delta = layers[depth], deltas[depth]
        M = _own(layer, weights[depth], delta, inputs[depth], A, B)
        below = layers[depth - 1]
        z = below.output(inputs[depth - 1])
        slope, bend = _slopes(below.activation.function, z.flatten())
        delta_a = layer.spread(times(layer.kernel.T, delta)).flatten()
        A = M.mul_(slope).mul_(slope[:, None])  # (10)
        B = layer.back(layer.back(B).T).mul_(slope).mul_(slope[:, None])  # (10)
        B.diagonal().add_(bend * delta_a)
    return _own(layers[0], weights[0], deltas[0], inputs[0], A, B)


def _of_the_last(label: torch.Tensor, delta: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(A, B) of (6) from the last layer's δ [K, 1]."""
    unit = torch.nn.functional.one_hot(label, len(delta)).to(delta)
    p = delta + unit[:, None]
    B = p.flatten().diag() - p @ p.T
    return torch.zeros_like(B), B


def _own(
    layer: Layer,
    weights: torch.Tensor,
    delta: torch.Tensor,
    u: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
) -> torch.Tensor:
    """M [n, n], the information in a layer's input, from A and B [O·L, O·L] of its output."""
    bias_entry = torch.ones_like(u[:1])
    u_and_one = torch.cat([u, bias_entry]) if layer.has_bias else u
    if len(u_and_one) < u.shape[1]:
        return _own_by_rows(layer, weights, delta, u_and_one, A, B)
    return _own_expanded(layer, weights, delta, u, u_and_one, A, B)


def _own_by_rows(
    layer: Layer,
    weights: torch.Tensor,
    delta: torch.Tensor,
    u: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
) -> torch.Tensor:
    """(8) as it stands; ``u`` includes the bias's row of ones."""
    P = layer.placed(delta)  # (7), [O, K, P]
    channels, places, pixels = layer.shape[0], *P.shape[1:]
    entries = channels * places
    BC = layer.back(B).reshape(*delta.shape, -1)  # [O, L, n]
    J = u @ BC  # [O, I, n], the first term of j
    by_place = J[:, :entries].unflatten(1, (channels, places)).unflatten(-1, (channels, pixels))
    of_equal_channels = by_place.diagonal(dim1=1, dim2=3)
    of_equal_channels.add_(P[..., None])  # the second term, in place
    J = J.flatten(0, 1)
    CAC = layer.back(layer.back(A).T)
    return CAC.addmm_(J.T, weights.reshape(-1, 1) * J)


def _own_expanded(
    layer: Layer,
    weights: torch.Tensor,
    delta: torch.Tensor,
    u: torch.Tensor,
    u_and_one: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
) -> torch.Tensor:
    """(9), which needs no rows; ``u_and_one`` includes the bias's row of ones, ``u`` does not."""
    P = layer.placed(delta)  # (7), [O, K, P]
    outputs, channels, places = len(delta), layer.shape[0], P.shape[1]
    U = (u_and_one.T * weights[:, None]) @ u_and_one  # its blocks [O, L, L]
    UB = (U @ B.reshape(*delta.shape, -1)).flatten(0, 1)
    A = A + B @ UB
    by_channel = layer.by_channel(weights)[..., None]  # [O, C, K, 1]
    weighted = by_channel * u.reshape(channels, places, -1)  # [O, C, K, L]
    Y = (weighted.transpose(2, 3).flatten(1, 2) @ P).reshape(outputs, channels, -1, P.shape[2])
    Y = Y.transpose(1, 2).reshape(len(B), -1)  # [O·L, C·P]
    # the first term of (9) is halved, as it comes twice
    half = layer.back(layer.back(A).T / 2 + Y.T @ B)
    M = half + half.T
    add_by_channel(M, layer, P, weights)  # D
    return M


def _slopes(act: Callable, z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(act', act'') of an elementwise activation."""

    def slope(z: torch.Tensor) -> torch.Tensor:
        _, pull = pull_back(act, z)
        return pull(torch.ones_like(z))[0]

    first, pull = pull_back(slope, z)
    return first, pull(torch.ones_like(z))[0]


def _low_rank_curvature(
    layers: Sequence[Layer],
    label: torch.Tensor,
    weights: Sequence[torch.Tensor],
    x: torch.Tensor,
    eta: float,
    error_variance: float,
    precision: float,
) -> Curvature:
    """The same for a first linear layer, by (11) to (20); ``precision`` is the prior's."""
    layer = layers[0]
    n = layer.size
    x, e = x[:n], x[n:]
    W, w = layer.kernel, weights[0][:, :n]
    z = layer.output(layer.patches(x))
    one = torch.eye(len(z)).to(x)

    d, A, eta_B = _seen_through_z(layers, label, weights, z, e, eta)
    D, E, L = _completed_square(w, x, d, precision)
    if layer.has_bias:
        L = L + torch.diag(weights[0][:, n])

    right = torch.cat([W, -eta * W @ E], 1)[:, : n + len(e)]
    Z = torch.linalg.solve(one + W @ E @ eta_B, right)  # (15)
    V = eta_B @ Z  # (16)
    V[:, n:] += eta * one[:, : len(e)]
    spread = torch.cat([1 / D, torch.full_like(e, error_variance)])  # the diagonal of Σ
    R = torch.cat([_root(A) @ Z, _root(L) @ V])  # (17)
    F = torch.linalg.cholesky(torch.eye(len(R)).to(x) + R * spread @ R.T)  # (18)
    H = torch.linalg.solve_triangular(F, R * spread, upper=False)

    def solve(b: torch.Tensor) -> torch.Tensor:
        """(19)."""
        y = b - V.T @ (E.T @ b[:n])  # Tᵀ b
        y = y * spread[:, None] - H.T @ (H @ y)
        return torch.cat([y[:n] - E @ (V @ y), y[n:]])

    V_spread = V * spread
    HT = H[:, :n] - (H @ V.T) @ E.T
    squares = (E @ (V_spread @ V.T) * E).sum(1) - 2 * (E * V_spread[:, :n].T).sum(1)
    variance = 1 / D + squares - HT.square().sum(0)  # (20)
    return Curvature(solve, variance, precision)


def _seen_through_z(
    layers: Sequence[Layer],
    label: torch.Tensor,
    weights: Sequence[torch.Tensor],
    z: torch.Tensor,
    e: torch.Tensor,
    eta: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(d [O, 1] of (11), A [O, O], η B [O, O] of (5)) at the first layer's output z [O, 1]."""
    function = partial(signals_after_first, layers, label)
    (deltas, inputs), push, pull = _linearise(function, z)
    d = eta * (deltas[0] + e[:, None] if len(e) else deltas[0])

    def columns(v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(A v, η B v)."""
        d_dot, u_dot = push(v[:, None])
        above = zip(layers[1:], weights[1:], deltas[1:], inputs, d_dot[1:], u_dot)
        back = [_weigh(*each) for each in above]
        of_deltas = [torch.zeros_like(z), *(d for d, _ in back)]
        of_inputs = [u for _, u in back]
        return eta**2 * pull((of_deltas, of_inputs))[:, 0], eta * d_dot[0][:, 0]

    A, eta_B = vmap(columns)(torch.eye(len(z)).to(z))  # each column in a row
    return d, A, eta_B.T


def _completed_square(
    w: torch.Tensor, x: torch.Tensor, d: torch.Tensor, ridge: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(D [n], E [n, O], L [O, O]) of (12) and (13), L without the bias's term.

    From w [O, n], x [n], d [O, 1] and r.
    """
    D = (w.T @ d.square())[:, 0] + ridge
    E = (w * d * x).T / D[:, None]
    S = ((w * x.square() / D) @ w.T).fill_diagonal_(0)
    on_diagonal = S @ d.square() + w @ (ridge * x.square() / D)[:, None]
    return D, E, torch.diag(on_diagonal[:, 0]) - S * (d @ d.T)


def _root(matrix: torch.Tensor) -> torch.Tensor:
    """R with RᵀR = a positive semi-definite matrix."""
    values, vectors = torch.linalg.eigh(matrix)
    return values.clamp(min=0).sqrt()[:, None] * vectors.T


def _linearise(function: Callable, x: torch.Tensor) -> tuple:
    """(value, push, pull) of ``function`` at ``x``.

    ``push`` is the Jacobian times a vector, ``pull`` its transpose. ``push`` is the transpose of
    the transpose; torch's forward mode would do, but its import warns of deprecation.
    """
    value, pull = pull_back(function, x)
    _, push = pull_back(lambda cotangent: pull_back(function, x)[1](cotangent)[0], value)
    return value, lambda v: push(v)[0], lambda cotangent: pull(cotangent)[0]


def _weigh(
    layer: Layer,
    weights: torch.Tensor,
    delta: torch.Tensor,
    u: torch.Tensor,
    d_dot: torch.Tensor,
    u_dot: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(1), times the weights, and back by (3)."""
    if delta.shape[1] == 1:
        return _weigh_one_patch(weights, delta, u, d_dot, u_dot)
    change = d_dot @ u.T + delta @ u_dot.T
    if layer.has_bias:
        change = torch.cat([change, d_dot.sum(1, keepdim=True)], dim=1)
    return layer.gradient_transpose(weights * change, delta, u)


def _weigh_one_patch(
    weights: torch.Tensor,
    delta: torch.Tensor,
    u: torch.Tensor,
    d_dot: torch.Tensor,
    u_dot: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same where L = 1, without a matrix [O, I] per direction."""
    squares = torch.cat([u.square(), torch.ones_like(u[:1])])[: weights.shape[1]]
    of_delta = weights @ squares  # [O, 1]
    weights = weights[:, : len(u)]
    mixed = weights * (delta @ u.T)  # [O, I]
    to_u = times(mixed.T, d_dot) + weights.T @ delta.square() * u_dot
    return of_delta * d_dot + times(mixed, u_dot), to_u


def _conjugate_gradients(
    information: Callable, precision: float, right: torch.Tensor, steps: int = CG_STEPS
) -> torch.Tensor:
    """N⁻¹ ``right`` [n, m] by conjugate gradients: what the data determine best comes first."""
    columns = []
    for b in right.T:
        x, residual, direction = torch.zeros_like(b), b, b
        for _ in range(steps):
            image = information(direction) + precision * direction
            size = residual.square().sum()
            if size <= CG_ENOUGH * b.square().sum():
                break
            length = size / (direction @ image)
            x = x + length * direction
            residual = residual - length * image
            direction = residual + residual.square().sum() / size * direction
        columns.append(x)
    return torch.stack(columns, dim=1)
