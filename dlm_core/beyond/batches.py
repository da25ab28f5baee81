"""Exact recovery of a whole batch through a ReLU layer: images, labels and learning rate, without a search over pixels.

SPEAR (Dimitrov et al., NeurIPS 2024). Where the first layer is z = W x + b with ReLU, a client that trains on r images changes

    Δ_W = Σ_i d_i x_iᵀ,   Δ_b = Σ_i d_i,   with d_i = 0 in every unit that image i leaves off.

Δ_W has rank r, so its singular vectors give U [m, r] with d_i ∝ U q_i for unknown q_i. Nearly every combination of columns of
U has no zeros at all; the r of them with the most zeros are the d_i. Δ_b fixes their lengths, and x follows by least squares.
SPEAR samples rows of U and takes null vectors, in time exponential in r, and is told gradients; here the zeros are found by
minimising Σ_units |u q|^½, which goes on where sampling stops, and what counts as zero is read off the noise of two snapshots.
"""

import copy
import math
import time
from dataclasses import dataclass
from enum import StrEnum

import torch
from torch import nn

from dlm_core import check, records
from dlm_core.beyond.exact import CHI2_RANGE
from dlm_core.beyond.recursion import WRAPPED
from dlm_core.federated import loss as training_loss
from dlm_core.observation import find_head
from dlm_core.results import ClientEstimate, Evidence, Explains, Reconstruction, Status

MOVED, RANK, ZERO = 3.0, 2.0, 10.0  # times the noise: a unit that moved, a direction that is there, an entry not zero
MARGIN = 0.05  # of a trace that its zeros settle; combinations have 0
STARTS = 200  # of the descent, in each round
WIDTHS = [0.1 * 0.7**i for i in range(14)] + [10.0**-i for i in range(4, 11)]  # its smoothing; from wider ones all end alike
MOVES = 4  # of the images by their errors, to see what these do to g
DEPENDENT = 1e-3  # length of a unit vector's part outside the others' span


class Reason(StrEnum):
    """Why a batch was recovered, or was not."""

    EXPLAINED = "explained"
    UNTRACED = "explained, others without a trace"
    NOT_ONE_STEP = "not one step"
    UNMOVED = "unmoved"
    TOO_FEW_UNITS = "too few units"
    UNSETTLED = "unsettled"


@dataclass(frozen=True, kw_only=True)
class Traces(Evidence):
    """The evidence of a batch: the units in which each image left a trace. ``losses`` is [chi2].

    Attributes
    ----------
    recovered
        [B] whether the image's own ReLU pattern agrees with the units in which it left a trace.
    agreement
        [B] the share of units in which it does; 0 for an image that was not found at all.
    image_error
        [B] standard error of a pixel, root mean square over the image.
    num_recovered
        How many images were.
    rank
        Of Δ_W: how many distinct images left a trace.
    units
        Of the first layer, that moved by more than rounding.
    chi2
        χ²/N of one SGD step on the recovered images against the noise, 1 where it holds; NaN where images are missing.
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
    reason: Reason

    @property
    def explains(self) -> Explains:
        """All of the update where every image was recovered."""
        if self.recovered.all():
            return Explains.FULLY
        return Explains.PARTLY if self.recovered.any() else Explains.LITTLE

    @property
    def verdict(self) -> str:
        """How many images were recovered, and why."""
        return f"{self.num_recovered} of {len(self.recovered)} images recovered: {self._why()}"

    def _why(self) -> str:
        explained = f"one SGD step on these images explains the update (chi2/N {self.chi2:.3g}, expected 1)"
        return {
            Reason.EXPLAINED: explained,
            Reason.UNTRACED: f"{explained}; the others left no trace",
            Reason.NOT_ONE_STEP: (
                "the first layer settles them, but it was not one SGD step "
                f"(chi2/N {self.chi2:.3g}): η and labels are open"
            ),
            Reason.UNMOVED: "no unit of the first layer moved by more than rounding",
            Reason.TOO_FEW_UNITS: (
                f"Δ has rank {self.rank}, {self.units} units moved; it takes more than twice as many units to tell images apart"
            ),
            Reason.UNSETTLED: (
                f"Δ has rank {self.rank}, and the zeros of {self.units} units do not settle which of its mixtures are images; "
                "those are shown that agree with their own pattern of zeros, without labels and learning rate"
            ),
        }[self.reason]


@records.attack(
    "exact_batch",
    title="exact, batch",
    colour=3,
    marker="H",
    client="several images, a network that begins with Linear and ReLU",
    audited=3,
)
def recover_batch(seen, *, num_images=None, max_rounds=50, seed=0):
    """Recover the images of one client's update, and labels and learning rate if it took one SGD step. Returns a
    Reconstruction whose evidence are ``Traces``.

    num_images  B where the observer knows it; None counts the images that left a trace. One that the model already classified
                without error leaves none, and η scales with B.
    max_rounds  of the descent, at least 1; it ends when every image is verified.
    seed        of its starts.

    Several local steps, momentum and mini-batches keep Δ_W of this form as long as units stay off, so images are recovered
    from them too. Raises ValueError, naming the layer, for a model that is not a stack that begins with nn.Linear (with bias)
    and nn.ReLU.
    """
    check.at_least("num_images", 1 if num_images is None else num_images, 1)
    check.at_least("max_rounds", max_rounds, 1)
    began = time.perf_counter()
    layer, update, bias, sigma, live = _first_update(seen)
    if not live.any():
        return _result(seen, num_images or 1, 0, 0, began, Reason.UNMOVED)
    left, values, right = torch.linalg.svd(update, full_matrices=False)
    computing = max(update.shape) * torch.finfo(values.dtype).eps * values[0]
    floor = RANK * sigma.amax() * sum(map(math.sqrt, update.shape)) + computing  # RANK times what noise alone would have
    rank = min(int((values > floor).sum()), num_images or len(values))
    if not 0 < 2 * rank < len(update):
        return _result(seen, num_images or max(rank, 1), rank, len(update), began, Reason.TOO_FEW_UNITS)
    rest = update - left[:, :rank] * values[:rank] @ right[:rank]
    sigma = torch.maximum(sigma, rest.square().mean(1).sqrt())  # more than rounding where a defence added noise
    basis, noise = left[:, :rank], torch.hypot(sigma, computing / math.sqrt(update.shape[1]))[:, None] / values[:rank]
    for directions in _sparse_directions(basis, noise, max_rounds, seed):
        traces = _traces(basis, directions, noise, bias)
        certain = (_margins(basis, traces, noise) > MARGIN).all()
        if certain:
            break
    x = torch.linalg.lstsq(traces, update).solution
    weight, offset = layer.weight.detach().double()[live], layer.bias.detach().double()[live]
    before, after = x @ weight.T + offset > 0, x @ (weight - update).T + (offset - bias) > 0
    left_trace = (traces != 0).T
    agreement = (before == left_trace).double().mean(1)
    silent = (before & after & ~left_trace).sum(1)  # on at both ends, and yet no trace
    if certain and (3 * silent <= (before & after).sum(1)).all():
        information = torch.linalg.inv(traces.T @ traces).diagonal()
        error = (sigma.square().mean() * information * (1 + x.square().mean(1))).sqrt()  # of Δ_W, and of the lengths by Δ_b
        return _explain(seen, num_images, x, agreement, error, rank, len(update), began)
    shown = agreement > 1 - 1 / len(update)
    found = (x.reshape(-1, *seen.image_shape), shown, agreement)
    return _result(seen, num_images or rank, rank, len(update), began, Reason.UNSETTLED, *found)


def _first_update(seen):
    """(layer, Δ_W, Δ_b, standard error of each row's entries, which rows these are) of the first layer's units that moved."""
    layer, name = _first_layer(seen.model)
    named = seen.delta_by_name
    update, bias = (named[f"{name}.{part}"] for part in ("weight", "bias"))
    variance = dict(zip(named, seen.rounding_variance))[f"{name}.weight"].mean(1)
    variance = variance + (torch.finfo(layer.weight.dtype).eps * update).square().mean(1) / 6
    live = update.norm(dim=1) > MOVED * (variance * update.shape[1]).sqrt()
    return layer, update[live], bias[live], variance[live].sqrt(), live


def _first_layer(model):
    """(layer, name) of the nn.Linear that the model begins with."""
    modules = [(n, m) for n, m in model.named_modules() if not isinstance(m, (nn.Sequential, nn.Flatten, nn.Identity))]
    if not isinstance(model, nn.Sequential) or len(modules) < 3:
        wanted = "an nn.Sequential that begins with Linear and ReLU"
        raise ValueError(f"the model is a {type(model).__name__}; it takes {wanted}; {WRAPPED}")
    for (name, module), wanted in zip(modules, (nn.Linear, nn.ReLU)):
        if not isinstance(module, wanted):
            raise ValueError(
                f"layer {name!r} is a {type(module).__name__}; a batch is recovered through {wanted.__name__} there"
            )
    if modules[0][1].bias is None:
        raise ValueError(f"layer {modules[0][0]!r} (Linear) has no bias; the bias fixes the scale of the images")
    return modules[0][1], modules[0][0]


def _sparse_directions(basis, noise, max_rounds, seed):
    """Yield, round by round, the r independent q [r, r], in columns, for which ``basis`` q has the most zeros so far.

    Descent of Σ |u q|^½ over the sphere by reweighting, with rows u of unit length. Each round starts orthogonal to some of
    those that it has, as the images' traces are nearly orthogonal to each other. A combination of images is zero only where
    all of them are off (and where it cancels): taking the most zeros first, and never what depends on those taken, ends with
    the images alone.

    noise  [m, r] standard error of the entries of ``basis``.
    """
    generator, rank = torch.Generator().manual_seed(seed), basis.shape[1]
    unit = basis / basis.norm(dim=1, keepdim=True)
    products = (unit[:, :, None] * unit[:, None, :]).flatten(1)
    pool = basis.new_zeros(rank, 0)
    for _ in range(max_rounds):
        q = torch.randn(STARTS, rank, generator=generator, dtype=torch.float64).to(basis)
        share = 0.5 + 0.5 * torch.rand(STARTS, 1, generator=generator)
        some = (
            pool * (torch.rand(STARTS, pool.shape[1], generator=generator) < share).to(pool)[:, None]
        )  # [STARTS, r, found]
        rest = q - (some @ (torch.linalg.pinv(some) @ q[:, :, None]))[:, :, 0]
        q = torch.where(rest.norm(dim=1, keepdim=True) > DEPENDENT, rest, q)  # nothing is left where all were taken
        for width in WIDTHS:
            q = q / q.norm(dim=1, keepdim=True)
            weights = ((q @ unit.T).square() + width**2) ** -0.75
            q = torch.linalg.eigh((weights @ products).view(-1, rank, rank))[1][:, :, 0]
        pool = torch.cat([pool, q.T], dim=1)
        zeros = _zeros(basis, pool, noise).sum(0)
        pool = pool[:, _independent(pool, zeros.argsort(descending=True, stable=True))]
        yield pool


def _zeros(basis, directions, noise):
    """Where [m, k] ``basis`` q vanishes within its error."""
    return (basis @ directions).square() <= ZERO**2 * noise.square() @ directions.square()


def _independent(vectors, order):
    """Indices of the first of the columns, in ``order``, of which none is a combination of those before it."""
    chosen, span = [], vectors[:, :0]
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


def _margins(basis, traces, noise):
    """[r] how well the zeros of each trace overdetermine it: 1 - the largest leverage of any single unit among them.

    A combination of images vanishes where all of them are off, and at one more unit for each coefficient it has free. Each of
    these alone holds it in place, with leverage 1; a true trace stays where it is without any one unit.
    """
    rank, margins = basis.shape[1], []
    for trace in traces.T:
        zero, margin = trace == 0, 0.0
        rows = (basis / noise[:, -1:])[zero]  # of noise at most 1
        if rank == 1:
            margin = 1.0
        elif trace.any() and len(rows) >= rank and torch.linalg.svdvals(rows)[-2] > ZERO * math.sqrt(len(rows)):
            left = torch.linalg.svd((basis / basis.norm(dim=1, keepdim=True))[zero], full_matrices=False)[0]
            margin = 1 - float(left[:, : rank - 1].square().sum(1).amax())
        margins.append(margin)
    return basis.new_tensor(margins)


def _traces(basis, directions, noise, bias):
    """Traces d [m, r] from the columns q of ``directions``: each fitted to its zeros anew, their lengths to Δ_b."""
    weighted = basis / noise[:, -1:]
    for _ in range(2):
        zero = _zeros(basis, directions, noise)
        fitted = [
            torch.linalg.svd(weighted[off])[2][-1] if off.sum() >= len(q) - 1 else q for off, q in zip(zero.T, directions.T)
        ]
        directions = torch.stack(fitted, dim=1)
    traces = basis @ directions * ~_zeros(basis, directions, noise)
    return traces * torch.linalg.lstsq(traces, bias[:, None]).solution[:, 0]


def _explain(seen, num_images, x, agreement, error, rank, units, began):
    """The result: with all images at hand, the last layer gives labels and η, and one SGD step is put to the test."""
    images = x.reshape(-1, *seen.image_shape)
    labels, counts = _labels_and_counts(seen, images)
    counts = counts if counts.sum() <= (num_images or 10 * rank) else torch.ones_like(counts)
    each = torch.repeat_interleave(torch.arange(rank, device=x.device), counts)
    total = num_images or len(each)
    learning_rate, chi2 = _one_step(seen, images[each], labels[each], error[each])
    learning_rate *= total / len(each)  # an image without a trace has its share in the mean that is the client's loss
    reason = Reason.UNTRACED if total > len(each) else Reason.EXPLAINED
    if chi2 > CHI2_RANGE[1]:
        reason, learning_rate = Reason.NOT_ONE_STEP, math.nan
    found = (images[each], torch.ones_like(each, dtype=torch.bool), agreement[each], error[each], labels[each])
    return _result(seen, total, rank, units, began, reason, *found, learning_rate, chi2)


def _labels_and_counts(seen, images):
    """Label and number of occurrences of each image: row i of the last layer's update, by its inputs, is η/B·count·(p - e_y)."""
    model = copy.deepcopy(seen.model).double()
    layer = model.get_submodule(find_head(model, seen.image_shape)[0])
    seen_inputs = []
    hook = layer.register_forward_pre_hook(lambda _, inputs: seen_inputs.append(inputs[0]))
    with torch.no_grad():
        p = model(images).softmax(1)
    hook.remove()
    d_weight, d_bias = seen.head.delta_weight, seen.head.delta_bias
    inputs = torch.cat([seen_inputs[0], torch.ones_like(p[:, :1])], dim=1)
    update = torch.cat([d_weight, d_bias[:, None]], dim=1)
    errors = torch.linalg.lstsq(inputs.T, update.T).solution
    labels = errors.argmin(1)
    expected = p - torch.nn.functional.one_hot(labels, p.shape[1])
    rates = (errors * expected).sum(1) / expected.square().sum(1).clamp(min=1e-300)
    return labels, (rates / rates.clamp(min=1e-300).min()).round().clamp(1, 100).long()


def _one_step(seen, images, labels, error):
    """(η, χ²/N) of one SGD step on the batch: Δ against η g by weighted least squares.

    To the noise of rounding W_{t+1} come, for each output unit, the client's arithmetic and what the images' own errors do to
    g; both are measured, by computing g in the client's precision and for images moved by their errors.
    """
    dtype, draws = next(seen.model.parameters()).dtype, torch.Generator().manual_seed(0)
    model, in_client = copy.deepcopy(seen.model).double(), copy.deepcopy(seen.model)

    def gradient(model, images):
        return [g.double() for g in torch.autograd.grad(training_loss(model(images), labels), list(model.parameters()))]

    g, others = gradient(model, images), [gradient(in_client, images.to(dtype))]
    for _ in range(MOVES):
        moves = torch.randn(images.shape, generator=draws, dtype=torch.float64).to(images) * error[:, None, None, None]
        others.append(gradient(model, images + moves))
    update = seen.delta
    rate = sum((d * p).sum() for d, p in zip(update, g)) / sum(p.square().sum() for p in g)
    weights = []
    for i, (d, rounding) in enumerate(zip(update, seen.rounding_variance)):
        spread = [(other[i] - g[i]).square() for other in others]
        squares = spread[0] + sum(spread[1:]) / MOVES
        squares = squares.mean(1, keepdim=True) if d.ndim > 1 else squares
        weights.append((d != 0) / (rounding + rate**2 * squares).clamp(min=1e-300))  # a weight that stayed is censored

    def dot(a, b):
        return sum(float((w * p * q).sum()) for w, p, q in zip(weights, a, b))

    rate = dot(update, g) / dot(g, g)
    rest = [d - rate * p for d, p in zip(update, g)]
    return rate, dot(rest, rest) / max(1, sum(int((d != 0).sum()) for d in update))


def _result(
    seen, total, rank, units, began, reason, images=(), shown=(), agreement=(), error=(), labels=(), rate=math.nan, chi2=math.nan
):
    """A Reconstruction of ``total`` images: those ``shown`` in their place, grey elsewhere."""

    def fill(value, given, *shape, dtype=torch.float64):
        tensor = torch.full((total, *shape), value, dtype=dtype, device=next(seen.model.parameters()).device)
        if len(given):
            tensor[: len(given)] = given[:total]
        return tensor

    recovered = fill(False, shown, dtype=torch.bool)
    canvas = fill(0.5, images, *seen.image_shape)
    canvas[~recovered] = 0.5
    number = int(recovered.sum())
    evidence = Traces(
        losses=[chi2],
        loss=chi2,
        recovered=recovered,
        agreement=fill(0.0, agreement),
        image_error=fill(math.inf, error),
        num_recovered=number,
        rank=rank,
        units=units,
        chi2=chi2,
        reason=reason,
    )
    return Reconstruction(
        images=canvas,
        labels=fill(-1, labels, dtype=torch.int64),
        status=Status.CONVERGED if number == total else Status.STALLED,
        vouched=recovered,
        evidence=evidence,
        client=ClientEstimate(learning_rate=rate if rate == rate else None),
        seconds=time.perf_counter() - began,
    )
