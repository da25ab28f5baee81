"""Exact recovery of a batch through a ReLU layer: images, labels and learning rate.

No search over pixels is made. SPEAR (Dimitrov et al., NeurIPS 2024): where the first layer is
z = W x + b with ReLU, a client that trains on r images changes::

    Δ_W = Σ_i d_i x_iᵀ,   Δ_b = Σ_i d_i,   with d_i = 0 in every unit that image i leaves off.

d_i is the trace of image i. Δ_W has rank r where neither images nor traces combine others, so its
singular vectors give U [m, r] with d_i ∝ U q_i for unknown q_i. Nearly every combination of columns
of U has no zeros at all; the r of them with the most zeros are the traces. Δ_b fixes their lengths,
and x follows by least squares.

Rank counts directions, not images: an image and its darker copy, or an image and black, share one,
and what is found there is neither of them. One SGD step on what was found then does not explain the
rest of the update, which is what χ² tests; and Δ_b is not the sum of the traces, after any number
of steps.

SPEAR samples rows of U and takes null vectors, in time exponential in r, and is told gradients.
Here the zeros are found by minimising ``Σ_units |u q|^½``, which goes on where sampling stops, and
from the images at hand: what the model shows of which units they leave off says where their traces
vanish. What counts as zero is read off the noise of two snapshots.
"""

import copy
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from functools import partial
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from dlm_core import check, objectives, records
from dlm_core.beyond import preprocessing
from dlm_core.beyond.rounding import CHI2_RANGE, TINY, TWO_CLASSES
from dlm_core.beyond.stacks import REWRITE_HINT, check_walk
from dlm_core.federated import loss as training_loss
from dlm_core.observation import Observation
from dlm_core.results import ClientEstimate, Evidence, Explains, Reconstruction, Status
from dlm_core.threads import for_network

# Times the noise: a unit that moved, a direction that is there, an entry that is not zero.
MOVED, RANK, ZERO = 3.0, 2.0, 10.0
MARGIN = 0.05  # of a trace that its zeros settle; combinations of images have 0
STARTS = 200  # of the descent, in each round
# Smoothing of the descent's objective; from wider ones all starts end alike.
WIDTHS = [0.1 * 0.9**i for i in range(44)] + [10.0**-i for i in range(4, 11)]
NARROW = WIDTHS[-12:]  # they leave a start where it is
SHIFT = 1e-15  # of a matrix that is inverted, in its traces
AGREES = 0.8  # share of units, of images that no step confirms; mixtures have about two thirds
MOVES = 4  # of the images by their errors, to see what these do to g
EDGE = 4.0  # of an output's error by the images' own, within which a unit is on or off
DEPENDENT = 1e-3  # length of a unit vector's part outside the others' span
MOST_COPIES = 100  # of one image in a batch


class Reason(StrEnum):
    """Why a batch was recovered, or was not."""

    EXPLAINED = "explained"
    UNTRACED = "explained, others without a trace"
    UNTESTED = "untested"
    NOT_ONE_STEP = "not one step"
    SHARED = "shared directions"
    UNMOVED = "unmoved"
    TOO_FEW_UNITS = "too few units"
    UNSETTLED = "unsettled"


# Each image found is one of the client's; where it was no one step, by its assumptions.
VOUCHED_FOR = (Reason.EXPLAINED, Reason.UNTRACED, Reason.NOT_ONE_STEP)


@dataclass(frozen=True, kw_only=True)
class Traces(Evidence):
    """The evidence of a batch: the units in which each image left a trace. ``losses`` is [chi2].

    Attributes
    ----------
    recovered
        [B] whether the attack shows the image: the zeros of the traces settle it, and either one
        step explains the update or each image's own ReLU pattern agrees with the units in which it
        left a trace. Where they do not settle it, its own pattern agrees wholly.
    agreement
        [B] the share of units in which it does; 0 for an image that was not found at all.
    image_error
        [B] standard error of a pixel, root mean square over the image.
    num_recovered
        How many images were.
    rank
        Of Δ_W, at most ``num_images``: how many directions it has. Several images may share one.
    units
        Of the first layer, that moved by more than rounding.
    chi2
        χ²/N of one SGD step on the recovered images against the noise, 1 where it holds; NaN where
        images are missing.
    two_classes
        Whether the network tells two classes apart, where χ² tests less.
    reason
        Why.
    """

    recovered: torch.Tensor
    agreement: torch.Tensor
    image_error: torch.Tensor
    num_recovered: int
    rank: int
    units: int
    chi2: float
    two_classes: bool
    reason: Reason

    @property
    def explains(self) -> Explains:
        """All of the update where every image was recovered and shares its direction with none."""
        if self.recovered.all() and self.reason is not Reason.SHARED:
            return Explains.FULLY
        return Explains.PARTLY if self.recovered.any() else Explains.LITTLE

    @property
    def verdict(self) -> str:
        """How many images were recovered, or shown without a test that confirms them, and why."""
        sure = (Reason.EXPLAINED, Reason.UNTRACED)
        done = "recovered" if self.reason in sure else "shown"
        return f"{self.num_recovered} of {len(self.recovered)} images {done}: {self._why()}"

    def _why(self) -> str:
        found = f"chi2/N {self.chi2:.3g}, expected 1"
        explained = f"one SGD step on these images explains the update ({found})"
        if self.chi2 <= CHI2_RANGE[0]:
            explained += "; the noise was overstated, and with it the errors"
        if self.two_classes:
            explained += f"; {TWO_CLASSES}"
        return {
            Reason.EXPLAINED: explained,
            Reason.UNTRACED: f"{explained}; the others left no trace",
            Reason.UNTESTED: (
                "the noise that is assumed would explain the whole update, so nothing was tested "
                f"({found}): η is open, the labels are a guess"
            ),
            Reason.NOT_ONE_STEP: (
                f"it was not one SGD step on these images ({found}): η is open, the labels are a "
                "guess. The zeros of the first layer's update single them out as its directions; "
                "each is an image where no two images share one and no more images took part than "
                "directions; as bright as shown where weights and biases moved at one rate"
            ),
            Reason.SHARED: (
                f"it was not one SGD step on these images ({found}), and the first layer's bias "
                "moved otherwise than by their traces: by another rule, or a direction stands for "
                "several images, as for an image and its darker copy or black; none need be as "
                "shown"
            ),
            Reason.UNMOVED: "no unit of the first layer moved by more than rounding",
            Reason.TOO_FEW_UNITS: (
                f"Δ has rank {self.rank}, {self.units} units moved; "
                "it takes more than twice as many units to tell images apart"
            ),
            Reason.UNSETTLED: (
                f"Δ has rank {self.rank}, and the zeros of {self.units} units do not settle which "
                "of its mixtures are images; those are shown that agree with their own pattern of "
                "zeros, without labels and learning rate"
            ),
        }[self.reason]


@records.attack(
    "exact_batch",
    title="exact, batch",
    colour=3,
    marker="H",
    assumes=("the number of images, if some left no trace",),
    client="several images, a network that begins with Linear and ReLU",
    audited=3,
    scene={"network": "mlp"},
)
@check.arguments
def recover_batch(
    seen: Observation,
    *,
    num_images: check.Count | None = None,
    seed: check.Whole = 0,
    max_rounds: check.Count = 50,
) -> Reconstruction:
    """Recover the images of one client's update; and labels and learning rate, if it was one step.

    Parameters
    ----------
    seen
        What the observer sees.
    num_images
        B >= 1 where the observer knows it. None takes each direction of Δ_W for an image: one that
        the model already classified without error leaves no trace, and η scales with B.
    seed
        Of the starts.
    max_rounds
        Of the descent, at least 1; it ends when the zeros settle every trace.

    Returns
    -------
    Reconstruction
        Its evidence are ``Traces``. Images that were not found are grey, with label -1.

    Raises
    ------
    ValueError
        For counts below 1; and, naming the layer, for a model that is not a stack that begins with
        nn.Linear (with bias) and nn.ReLU.

    Notes
    -----
    Several local steps, momentum and mini-batches keep Δ_W of this form as long as units stay off,
    so images are recovered from them too.
    """
    began = time.perf_counter()
    network, told = preprocessing.bare(seen)
    with for_network(seen.model):
        outcome = _recover(network, num_images, max_rounds, seed)
        found = outcome.as_reconstruction(network, began)
    return found if told is None else _in_pixels(found, told)


def _in_pixels(found: Reconstruction, told: preprocessing.Normalisation) -> Reconstruction:
    """The same of images that the network saw normalised."""
    traces = found.evidence
    assert isinstance(traces, Traces)
    images = told.pixels(found.images)
    images[~traces.recovered] = 0.5
    evidence = replace(traces, image_error=traces.image_error * told.error)
    return replace(found, images=images, evidence=evidence)


def _recover(seen: Observation, num_images: int | None, max_rounds: int, seed: int) -> "_Outcome":
    moved = _moved_units(seen)
    units = len(moved.update)
    if units == 0:
        return _Outcome(reason=Reason.UNMOVED, num_images=num_images or 1)
    decomposed = _decompose(moved)
    rank = min(decomposed.rank, num_images or len(decomposed.values))
    if not 0 < 2 * rank < units:
        total = num_images or max(rank, 1)
        return _Outcome(reason=Reason.TOO_FEW_UNITS, num_images=total, rank=rank, units=units)
    mixture, sigma = _mixture(moved, decomposed, rank)
    traces, certain = _find_traces(mixture, moved, max_rounds, seed)
    x = torch.linalg.lstsq(traces, moved.update).solution
    agreement, silent_units_fit = _patterns(moved, x, traces)
    if certain and silent_units_fit:
        error = _image_error(x, traces, sigma)
        shared = _bias_left(mixture, traces, moved) > ZERO**2
        return _explain(seen, num_images, x, agreement, error, units, shared)
    images = x.reshape(-1, *seen.image_shape)
    found = _Found(images=images, shown=agreement > 1 - 1 / units, agreement=agreement)
    total = num_images or rank
    return _Outcome(reason=Reason.UNSETTLED, num_images=total, rank=rank, units=units, found=found)


@dataclass(frozen=True)
class _MovedUnits:
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


def _moved_units(seen: Observation) -> _MovedUnits:
    name, layer = _first_layer(seen.model, seen.image_shape)
    variances = dict(zip(seen.parameter_names, seen.rounding_variance))
    update = seen.delta_by_name[f"{name}.weight"]
    bias_update = seen.delta_by_name[f"{name}.bias"]
    variance = variances[f"{name}.weight"].mean(1)
    eps = torch.finfo(layer.weight.dtype).eps
    variance = variance + (eps * update).square().mean(1) / 6
    bias_variance = variances[f"{name}.bias"] + (eps * bias_update).square() / 6
    live = update.norm(dim=1) > MOVED * (variance * update.shape[1]).sqrt()
    return _MovedUnits(
        weight=layer.weight.detach().double()[live],
        bias=layer.bias.detach().double()[live],
        update=update[live],
        bias_update=bias_update[live],
        sigma=variance[live].sqrt(),
        bias_sigma=bias_variance[live].sqrt(),
    )


def _first_layer(model: nn.Module, image_shape: Sequence[int]) -> tuple[str, nn.Linear]:
    """(name, layer) of the nn.Linear that the model begins with; ValueError for other models."""
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
class _Decomposition:
    """Δ_W = left · diag(values) · right, and how many of its directions stand above the noise.

    ``computing`` is the error of the decomposition itself.
    """

    left: torch.Tensor
    values: torch.Tensor
    right: torch.Tensor
    computing: torch.Tensor
    rank: int


def _decompose(moved: _MovedUnits) -> _Decomposition:
    shape = moved.update.shape
    left, values, right = torch.linalg.svd(moved.update, full_matrices=False)
    computing = max(shape) * torch.finfo(values.dtype).eps * values[0]
    noise_alone = RANK * moved.sigma.amax() * sum(map(math.sqrt, shape))
    rank = int((values > noise_alone + computing).sum())
    return _Decomposition(left, values, right, computing, rank)


@dataclass(frozen=True)
class _Mixture:
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


def _mixture(
    moved: _MovedUnits, decomposed: _Decomposition, rank: int
) -> tuple[_Mixture, torch.Tensor]:
    """(the first ``rank`` directions, standard error [m] of the rows of Δ_W).

    The error is more than rounding where a defence added noise, which the other directions show.
    """
    left, values, right = decomposed.left, decomposed.values, decomposed.right
    rest = moved.update - left[:, :rank] * values[:rank] @ right[:rank]
    sigma = torch.maximum(moved.sigma, rest.square().mean(1).sqrt())
    error = torch.hypot(sigma, decomposed.computing / math.sqrt(moved.update.shape[1]))
    return _Mixture(basis=left[:, :rank], noise=error[:, None] / values[:rank]), sigma


def _find_traces(
    mixture: _Mixture, moved: _MovedUnits, max_rounds: int, seed: int
) -> tuple[torch.Tensor, bool]:
    """(traces [m, r], whether the zeros of every one of them settle it)."""
    for directions in _sparse_directions(mixture, moved, max_rounds, seed):
        traces = _traces(mixture, directions, moved.bias_update)
        settled = bool((_margins(mixture, traces) > MARGIN).all())
        certain = settled and _differ(traces)
        if certain:
            break
    return traces, certain


def _sparse_directions(
    mixture: _Mixture, moved: _MovedUnits, max_rounds: int, seed: int
) -> Iterator[torch.Tensor]:
    """Yield, round by round, the r independent q [r, r], in columns, with the most zeros so far.

    Each round descends Σ |u q|^½ over the sphere from many starts. A combination of images is zero
    only where all of them are off (and where it cancels): taking the most zeros first, and never
    what depends on those taken, ends with the images alone. What the images at hand ask for by
    their own ReLU patterns is tried in each round.
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
    mixture: _Mixture, pool: torch.Tensor, moved: _MovedUnits, products: torch.Tensor
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


def _traces(mixture: _Mixture, directions: torch.Tensor, bias_update: torch.Tensor) -> torch.Tensor:
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


def _margins(mixture: _Mixture, traces: torch.Tensor) -> torch.Tensor:
    """[r] how well the zeros of each trace overdetermine it: 1 - the largest leverage among them.

    A combination of images vanishes where all of them are off, and at one more unit for each
    coefficient it has free. Each of these units alone holds it in place, with leverage 1. A true
    trace stays where it is without any one unit.
    """
    return mixture.basis.new_tensor([_margin(mixture, trace) for trace in traces.T])


def _margin(mixture: _Mixture, trace: torch.Tensor) -> float:
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


def _bias_left(mixture: _Mixture, traces: torch.Tensor, moved: _MovedUnits) -> float:
    """Mean square of what the traces leave of Δ_b, in standard errors.

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


def _patterns(
    moved: _MovedUnits, x: torch.Tensor, traces: torch.Tensor
) -> tuple[torch.Tensor, bool]:
    """(agreement [r], whether few units are silent though on) of the images' ReLU patterns.

    ``agreement`` is the share of units in which an image is on at W_t where it left a trace, and
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


def _image_error(x: torch.Tensor, traces: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """[r] standard error of a pixel: that of Δ_W, and that of the lengths by Δ_b."""
    information = torch.linalg.inv(traces.T @ traces).diagonal()
    return (sigma.square().mean() * information * (1 + x.square().mean(1))).sqrt()


def _explain(
    seen: Observation,
    num_images: int | None,
    x: torch.Tensor,
    agreement: torch.Tensor,
    error: torch.Tensor,
    units: int,
    shared: bool,
) -> "_Outcome":
    """With all images at hand, read labels and η off the last layer and test one SGD step."""
    rank = len(x)
    images = x.reshape(-1, *seen.image_shape)
    labels, counts = _labels_and_counts(seen, images)
    once = torch.arange(rank, device=x.device)
    if counts.sum() > (num_images or 10 * rank):
        counts = torch.ones_like(counts)
    each = torch.repeat_interleave(once, counts)
    step = _one_step(seen, images[each], labels[each], error[each])
    most = CHI2_RANGE[1]
    one_step = step.rate > 0 and step.chi2 <= most
    tested = step.chi2_of_noise > most
    if not one_step and num_images is None:  # then nothing is known of copies either
        each = once
    total = num_images or len(each)
    if not tested:
        reason = Reason.UNTESTED
    elif one_step:
        reason = Reason.UNTRACED if total > len(each) else Reason.EXPLAINED
    else:
        reason = Reason.SHARED if shared else Reason.NOT_ONE_STEP
    # where one image is a mixture, the others may be
    trusted = (one_step and tested) or bool((agreement > AGREES).all())
    # an image without a trace has its share in the client's mean loss
    rate = step.rate * (total / len(each))
    return _Outcome(
        reason=reason,
        num_images=total,
        rank=rank,
        units=units,
        found=_Found(
            images=images[each],
            shown=torch.full_like(each, trusted, dtype=torch.bool),
            agreement=agreement[each],
            error=error[each],
            labels=labels[each],
        ),
        learning_rate=rate if one_step and tested else None,
        chi2=step.chi2,
    )


def _labels_and_counts(
    seen: Observation, images: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Label and number of occurrences [r] of each image.

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


class _Step(NamedTuple):
    """η of one SGD step on the batch, its χ²/N, and that of no step at all: of noise alone."""

    rate: float
    chi2: float
    chi2_of_noise: float


def _one_step(
    seen: Observation, images: torch.Tensor, labels: torch.Tensor, error: torch.Tensor
) -> _Step:
    """Δ against η g by weighted least squares.

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
    return _Step(rate, dot(rest, rest) / moved, dot(update, update) / moved)


def _on_the_edge(
    seen: Observation, images: torch.Tensor, error: torch.Tensor
) -> tuple[set[str], torch.Tensor]:
    """(names of the first layer's parameters, [m] whether a unit is so near zero for an image that
    this image's error may turn it on or off).
    """
    name, layer = _first_layer(seen.model, seen.image_shape)
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


@dataclass(frozen=True, kw_only=True)
class _Found:
    """The k images at hand, and what is known of each.

    Attributes
    ----------
    images
        [k, C, H, W].
    shown
        [k] whether the attack stands by it.
    agreement
        [k] of its ReLU pattern with its trace.
    error
        [k] standard error of a pixel; None where unknown.
    labels
        [k] class indices; None where unknown.
    """

    images: torch.Tensor
    shown: torch.Tensor
    agreement: torch.Tensor
    error: torch.Tensor | None = None
    labels: torch.Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class _Outcome:
    """How a recovery of ``num_images`` images ended; the other fields are those of ``Traces``."""

    reason: Reason
    num_images: int
    rank: int = 0
    units: int = 0
    found: _Found | None = None
    learning_rate: float | None = None
    chi2: float = math.nan

    def as_reconstruction(self, seen: Observation, began: float) -> Reconstruction:
        """Put the images that are shown in their place, and grey elsewhere."""
        each = partial(self._each, device=next(seen.model.parameters()).device)
        recovered = each("shown", False, torch.bool)
        canvas = each("images", 0.5, torch.float64, *seen.image_shape)
        canvas[~recovered] = 0.5
        number = int(recovered.sum())
        evidence = Traces(
            losses=[self.chi2],
            loss=self.chi2,
            recovered=recovered,
            agreement=each("agreement", 0.0, torch.float64),
            image_error=each("error", math.inf, torch.float64),
            num_recovered=number,
            rank=self.rank,
            units=self.units,
            chi2=self.chi2,
            two_classes=seen.num_classes == 2,
            reason=self.reason,
        )
        return Reconstruction(
            images=canvas,
            labels=each("labels", -1, torch.int64),
            status=Status.CONVERGED if number == self.num_images else Status.STALLED,
            vouched=recovered & (self.reason in VOUCHED_FOR),
            evidence=evidence,
            client=ClientEstimate(learning_rate=self.learning_rate),
            seconds=time.perf_counter() - began,
        )

    def _each(
        self, name: str, otherwise: float, dtype: torch.dtype, *shape: int, device: torch.device
    ) -> torch.Tensor:
        """[B, *shape] of one field of ``found``, ``otherwise`` where there is nothing."""
        tensor = torch.full((self.num_images, *shape), otherwise, dtype=dtype, device=device)
        given = None if self.found is None else getattr(self.found, name)
        if given is not None:
            tensor[: len(given)] = given[: self.num_images]
        return tensor
