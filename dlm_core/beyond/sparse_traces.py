"""The traces of a batch's images in the update of a ReLU layer: the combinations of its directions
with the most zeros.

The names are those of ``batches``: Δ_W = Σ_i d_i x_iᵀ, of rank r, and d_i is a combination U q_i of
its left singular vectors that is zero in every unit that image i leaves off.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from dlm_core.beyond.rounding import TINY
from dlm_core.beyond.stacks import REWRITE_HINT, check_walk
from dlm_core.observation import Observation

# Times the noise: a unit that moved, a direction that is there, an entry that is not zero.
MOVED, RANK, ZERO = 3.0, 2.0, 10.0
MARGIN = 0.05  # of a trace that its zeros settle; combinations of images have 0
STARTS = 200  # of the descent, in each round
# Smoothing of the descent's objective; from wider ones all starts end alike.
WIDTHS = [0.1 * 0.9**i for i in range(44)] + [10.0**-i for i in range(4, 11)]
NARROW = WIDTHS[-12:]  # they leave a start where it is
SHIFT = 1e-15  # of a matrix that is inverted, in its traces
DEPENDENT = 1e-3  # length of a unit vector's part outside the others' span


@dataclass(frozen=True)
class MovedUnits:
    """The m units of the first layer that moved by more than rounding.

    Attributes
    ----------
    weight, bias
        [m, n] and [m], at W_t.
    update, bias_update
        Δ_W [m, n] and Δ_b [m].
    sigma, bias_sigma
        [m] standard error of the entries of each row of Δ_W, and of Δ_b.
    """

    weight: torch.Tensor
    bias: torch.Tensor
    update: torch.Tensor
    bias_update: torch.Tensor
    sigma: torch.Tensor
    bias_sigma: torch.Tensor


def moved_units(seen: Observation) -> MovedUnits:
    """The units of the first layer that moved by more than rounding.

    Parameters
    ----------
    seen
        What the observer sees.

    Raises
    ------
    ValueError
        As ``first_layer`` does.
    """
    name, layer = first_layer(seen.model, seen.image_shape)
    variances = dict(zip(seen.parameter_names, seen.rounding_variance))
    update = seen.delta_by_name[f"{name}.weight"]
    bias_update = seen.delta_by_name[f"{name}.bias"]
    variance = variances[f"{name}.weight"].mean(1)
    eps = torch.finfo(layer.weight.dtype).eps
    variance = variance + (eps * update).square().mean(1) / 6
    bias_variance = variances[f"{name}.bias"] + (eps * bias_update).square() / 6
    live = update.norm(dim=1) > MOVED * (variance * update.shape[1]).sqrt()
    return MovedUnits(
        weight=layer.weight.detach().double()[live],
        bias=layer.bias.detach().double()[live],
        update=update[live],
        bias_update=bias_update[live],
        sigma=variance[live].sqrt(),
        bias_sigma=bias_variance[live].sqrt(),
    )


def first_layer(model: nn.Module, image_shape: Sequence[int]) -> tuple[str, nn.Linear]:
    """(name, layer) of the nn.Linear that the model begins with.

    Parameters
    ----------
    model, image_shape
        The network, and (C, H, W).

    Raises
    ------
    ValueError
        Where the model is no nn.Sequential that begins with nn.Linear (with bias) and nn.ReLU.
    """
    passed_over = (nn.Sequential, nn.Flatten, nn.Identity)
    modules = [(n, m) for n, m in model.named_modules() if not isinstance(m, passed_over)]
    if not isinstance(model, nn.Sequential) or len(modules) < 3:
        wanted = "an nn.Sequential that begins with Linear and ReLU"
        raise ValueError(
            f"the model is a {type(model).__name__}; it takes {wanted}; {REWRITE_HINT}"
        )
    for (name, module), kind in zip(modules, (nn.Linear, nn.ReLU)):
        if not isinstance(module, kind):
            raise ValueError(
                f"layer {name!r} is a {type(module).__name__}; "
                f"a batch is recovered through {kind.__name__} there"
            )
    name, layer = modules[0]
    if layer.bias is None:
        raise ValueError(
            f"layer {name!r} (Linear) has no bias; the bias fixes the scale of the images"
        )
    check_walk(model, image_shape)
    return name, layer


@dataclass(frozen=True)
class Decomposition:
    """Δ_W = left · diag(values) · right, and how many of its directions stand above the noise.

    ``computing`` is the error of the decomposition itself.
    """

    left: torch.Tensor
    values: torch.Tensor
    right: torch.Tensor
    computing: torch.Tensor
    rank: int


def decompose(moved: MovedUnits) -> Decomposition:
    """The singular values of Δ_W.

    Parameters
    ----------
    moved
        The units that moved.
    """
    shape = moved.update.shape
    left, values, right = torch.linalg.svd(moved.update, full_matrices=False)
    computing = max(shape) * torch.finfo(values.dtype).eps * values[0]
    noise_alone = RANK * moved.sigma.amax() * sum(map(math.sqrt, shape))
    rank = int((values > noise_alone + computing).sum())
    return Decomposition(left, values, right, computing, rank)


@dataclass(frozen=True)
class Mixture:
    """The r directions of Δ_W: each image's trace is a combination U q of the columns of U.

    Attributes
    ----------
    basis
        U [m, r].
    noise
        [m, r] standard error of its entries.
    """

    basis: torch.Tensor
    noise: torch.Tensor

    @property
    def rank(self) -> int:
        """r."""
        return self.basis.shape[1]

    @property
    def unit(self) -> torch.Tensor:
        """The rows of U at unit length."""
        return self.basis / self.basis.norm(dim=1, keepdim=True)

    @property
    def weighted(self) -> torch.Tensor:
        """The rows of U over their noise."""
        return self.basis / self.noise[:, -1:]

    def zeros(self, directions: torch.Tensor) -> torch.Tensor:
        """Where [m, k] U q vanishes within its error, for the columns q of ``directions``."""
        variance = self.noise.square() @ directions.square()
        return (self.basis @ directions).square() <= ZERO**2 * variance


def mixture_of(
    moved: MovedUnits, decomposed: Decomposition, rank: int
) -> tuple[Mixture, torch.Tensor]:
    """(the first ``rank`` directions, standard error [m] of the rows of Δ_W).

    Parameters
    ----------
    moved, decomposed
        The units that moved, and the decomposition of their Δ_W.
    rank
        r, at least 1.

    Notes
    -----
    The error is more than rounding where a defence added noise, which the other directions show.
    """
    left, values, right = decomposed.left, decomposed.values, decomposed.right
    rest = moved.update - left[:, :rank] * values[:rank] @ right[:rank]
    sigma = torch.maximum(moved.sigma, rest.square().mean(1).sqrt())
    error = torch.hypot(sigma, decomposed.computing / math.sqrt(moved.update.shape[1]))
    return Mixture(basis=left[:, :rank], noise=error[:, None] / values[:rank]), sigma


def find_traces(
    mixture: Mixture, moved: MovedUnits, max_rounds: int, seed: int
) -> tuple[torch.Tensor, bool]:
    """(traces [m, r], whether the zeros of every one of them settle it).

    Parameters
    ----------
    mixture, moved
        The directions of Δ_W, and the units that moved.
    max_rounds, seed
        Of the descent, and of its starts.
    """
    for directions in sparse_directions(mixture, moved, max_rounds, seed):
        traces = _traces(mixture, directions, moved.bias_update)
        settled = bool((_margins(mixture, traces) > MARGIN).all())
        certain = settled and _differ(traces)
        if certain:
            break
    return traces, certain


def sparse_directions(
    mixture: Mixture, moved: MovedUnits, max_rounds: int, seed: int
) -> Iterator[torch.Tensor]:
    """Yield, round by round, the r independent q [r, r], in columns, with the most zeros so far.

    Parameters
    ----------
    mixture, moved, max_rounds, seed
        As ``find_traces`` takes them.

    Notes
    -----
    Each round descends ``Σ |u q|^½`` over the sphere from many starts. A combination of images is
    zero only where all of them are off (and where it cancels): taking the most zeros first, and
    never what depends on those taken, ends with the images alone. What the images at hand ask for
    by their own ReLU patterns is tried in each round.
    """
    generator = torch.Generator().manual_seed(seed)
    unit = mixture.unit
    products = (unit[:, :, None] * unit[:, None, :]).flatten(1)
    pool = mixture.basis.new_zeros(mixture.rank, 0)
    axes = torch.eye(mixture.rank).to(pool)  # where the starts do not end in enough directions

    def best_of(*candidates: torch.Tensor) -> torch.Tensor:
        found = torch.cat([*candidates, axes], dim=1)
        zeros = mixture.zeros(found).sum(0)
        return found[:, _independent(found, zeros.argsort(descending=True, stable=True))]

    for _ in range(max_rounds):
        pool = best_of(pool, _descend(_starts(pool, generator), unit, products, WIDTHS).T)
        asked_for = _asked_for(mixture, pool, moved, products)
        pool = best_of(pool, _descend(asked_for, unit, products, NARROW).T)
        yield pool


def _starts(pool: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """q [STARTS, r], each orthogonal to some of the columns that the ``pool`` has.

    The images' traces are nearly orthogonal to each other.
    """
    rank, found = pool.shape
    q = torch.randn(STARTS, rank, generator=generator, dtype=torch.float64).to(pool)
    share = 0.5 + 0.5 * torch.rand(STARTS, 1, generator=generator)
    taken = torch.rand(STARTS, found, generator=generator) < share
    some = pool * taken.to(pool)[:, None]  # [STARTS, r, found]
    rest = q - (some @ (torch.linalg.pinv(some) @ q[:, :, None]))[:, :, 0]
    something_is_left = rest.norm(dim=1, keepdim=True) > DEPENDENT  # not where all were taken
    return torch.where(something_is_left, rest, q)


def _asked_for(
    mixture: Mixture, pool: torch.Tensor, moved: MovedUnits, products: torch.Tensor
) -> torch.Tensor:
    """q [r, r], in rows: what vanishes best in the units that each of the pool's images leaves off.

    An image is known as soon as all other traces are: its own need not be.
    """
    update = torch.cat([moved.update, moved.bias_update[:, None]], dim=1)
    images = torch.linalg.solve(pool, mixture.basis.T @ update)
    scale = images[:, -1:]  # an image's share of Δ_b is 1
    x = images[:, :-1] / torch.where(scale.abs() < TINY, TINY, scale)
    off = (x @ moved.weight.T + moved.bias <= 0).to(products)
    return torch.linalg.eigh((off @ products).view(-1, *pool.shape))[1][:, :, 0]


def _descend(
    q: torch.Tensor, unit: torch.Tensor, products: torch.Tensor, widths: list[float]
) -> torch.Tensor:
    """Lower Σ |u q|^½ over the sphere, by reweighting; ``unit`` [m, r] are rows u of unit length.

    ``products`` [m, r²] are those of their entries. Two steps of inverse iteration at each width
    leave a start in its own valley.
    """
    rank = unit.shape[1]
    for width in widths:
        q = q / q.norm(dim=1, keepdim=True)
        weights = ((q @ unit.T).square() + width**2) ** -0.75
        moments = (weights @ products).view(-1, rank, rank)
        diagonal = moments.diagonal(dim1=1, dim2=2)
        diagonal += SHIFT * diagonal.sum(1, keepdim=True)
        for _ in range(2):
            q = torch.linalg.solve(moments, q)
            q = q / q.norm(dim=1, keepdim=True)
    return q


def _independent(vectors: torch.Tensor, order: torch.Tensor) -> list[int]:
    """Indices of the first columns, in ``order``, of which none combines earlier ones."""
    chosen: list[int] = []
    span = vectors[:, :0]
    for index in order.tolist():
        rest = vectors[:, index]
        for _ in range(2):  # the second time for rounding
            rest = rest - span @ (span.T @ rest)
        if rest.norm() > DEPENDENT:
            chosen.append(index)
            span = torch.cat([span, rest[:, None] / rest.norm()], dim=1)
        if len(chosen) == len(vectors):
            break
    return chosen


def _traces(mixture: Mixture, directions: torch.Tensor, bias_update: torch.Tensor) -> torch.Tensor:
    """Traces d [m, r] from the columns q of ``directions``.

    Each q is fitted to its zeros anew, and the lengths of the traces to Δ_b.
    """
    weighted = mixture.weighted
    for _ in range(2):
        columns = zip(mixture.zeros(directions).T, directions.T)
        fitted = [_fitted_to_zeros(weighted, zero, q) for zero, q in columns]
        directions = torch.stack(fitted, dim=1)
    traces = mixture.basis @ directions * ~mixture.zeros(directions)
    lengths = torch.linalg.lstsq(traces, bias_update[:, None]).solution[:, 0]
    return traces * lengths


def _fitted_to_zeros(weighted: torch.Tensor, zero: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """The direction that vanishes best in the units ``zero``; q itself where they are too few."""
    if zero.sum() < len(q) - 1:
        return q
    return torch.linalg.svd(weighted[zero])[2][-1]


def _margins(mixture: Mixture, traces: torch.Tensor) -> torch.Tensor:
    """[r] how well the zeros of each trace overdetermine it: 1 - the largest leverage among them.

    A combination of images vanishes where all of them are off, and at one more unit for each
    coefficient it has free. Each of these units alone holds it in place, with leverage 1. A true
    trace stays where it is without any one unit.
    """
    return mixture.basis.new_tensor([_margin(mixture, trace) for trace in traces.T])


def _margin(mixture: Mixture, trace: torch.Tensor) -> float:
    rank = mixture.rank
    if rank == 1:
        return 1.0
    zero = trace == 0
    rows = mixture.weighted[zero]  # of noise at most 1
    if not trace.any() or len(rows) < rank:
        return 0.0
    if not torch.linalg.svdvals(rows)[-2] > ZERO * math.sqrt(len(rows)):
        return 0.0
    left = torch.linalg.svd(mixture.unit[zero], full_matrices=False)[0]
    leverages = left[:, : rank - 1].square().sum(1)
    return 1 - float(leverages.amax())


def bias_left(mixture: Mixture, traces: torch.Tensor, moved: MovedUnits) -> float:
    """Mean square of what the traces leave of Δ_b, in standard errors.

    Parameters
    ----------
    mixture, moved
        The directions of Δ_W, and the units that moved.
    traces
        [m, r].

    Notes
    -----
    Measured: 1 to 10 of images each with a direction of its own (65 in bfloat16), 1e9 where two
    share one.
    """
    rest = moved.bias_update - traces.sum(1)
    mixed = mixture.basis.T @ traces.sum(1)
    variance = mixture.noise.square() @ mixed.square() + moved.bias_sigma.square()
    return float((rest.square() / variance).mean())


def _differ(traces: torch.Tensor) -> bool:
    """Whether no trace combines others: two that were fitted to the same zeros are one."""
    unit = traces / traces.norm(dim=0).clamp(min=TINY)
    return bool(torch.linalg.svdvals(unit)[-1] > DEPENDENT)


def patterns(moved: MovedUnits, x: torch.Tensor, traces: torch.Tensor) -> tuple[torch.Tensor, bool]:
    """(agreement [r], whether few units are silent though on) of the images' ReLU patterns.

    Parameters
    ----------
    moved
        The units that moved.
    x, traces
        The images [r, n], and their traces [m, r].

    Notes
    -----
    The agreement is the share of units in which an image is on at W_t where it left a trace, and
    off elsewhere. A unit that is on at both ends should have left one.
    """
    weight_after = moved.weight - moved.update
    bias_after = moved.bias - moved.bias_update
    before = x @ moved.weight.T + moved.bias > 0
    after = x @ weight_after.T + bias_after > 0
    left_trace = (traces != 0).T
    agreement = (before == left_trace).double().mean(1)
    always_on = before & after
    silent = (always_on & ~left_trace).sum(1)
    return agreement, bool((3 * silent <= always_on.sum(1)).all())


def image_error(
    x: torch.Tensor, traces: torch.Tensor, sigma: torch.Tensor, bias_sigma: torch.Tensor
) -> torch.Tensor:
    """[r] standard error of a pixel: that of Δ_W, and that of the lengths by Δ_b.

    Parameters
    ----------
    x, traces
        The images [r, n], and their traces [m, r].
    sigma, bias_sigma
        [m] standard errors of the entries of each row of Δ_W, and of Δ_b.
    """
    information = torch.linalg.inv(traces.T @ traces).diagonal()
    of_lengths = bias_sigma.square().mean() * x.square().mean(1)
    return (information * (sigma.square().mean() + of_lengths)).sqrt()
