"""The gradient of one step of Adam, AdamW or RMSprop, read back out of an update like a sign::

    Δ = η r + ηλ W,    r = g/(|g| + ε),    so |g| = ε |r|/(1 - |r|)

For RMSprop η/√(1-α) stands for η, and ε/√(1-α) for ε.

A coordinate falls short of the full step by the share ``ε/(|g| + ε)``, and rounding of the weights
hides only shares below ulp(W)/2η. So each coordinate bounds its gradient: from both sides where
``|g|`` is small, from below where it is large. The last layer tells the rest. Its readable rows
have the ratio of its features h, and softmax(W h + b) - e_y then is the gradient of its bias. From
that ε follows, and the magnitudes that were too large to be read.

Nothing here searches: ``signlike`` has the attack that does, on what is read.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch.nn import functional as F

from dlm_core import check, label_inference
from dlm_core.observation import Observation

NEAR = 0.9  # of the largest |Δ|: what the full step is first sought among; decay spreads it
NEAR_ROUNDS = 5  # of that
READABLE = 0.1  # relative uncertainty of a magnitude up to which it counts as read
ROUNDS = 3  # of bounds -> features -> learning rate, decay and ε -> bounds
ERROR = 1e-3  # relative, of the gradients that the features imply, as far as it matters for η and λ
DECAYS = 1e-5  # λ from which weights are rounded twice, as they shrink perhaps to a doubled ulp
ARITHMETIC = 6  # units in the last place that the client's own computation of r may be off

NO_SUCH_STEP = (
    "either it is not one step of Adam, AdamW or RMSprop at full precision, or gradients so far "
    "above ε that they show their signs alone. This does not mean that nothing leaks: unrolled_dlm "
    "with client_optimizer 'adam' assumes less"
)

Bounds = tuple[list[torch.Tensor], list[torch.Tensor]]


@dataclass(frozen=True)
class Reading:
    """What one step says about its gradient, and about the optimizer.

    Attributes
    ----------
    low, high
        One tensor per parameter: low <= g <= high. They are equal in the last layer, where its
        features were read.
    learning_rate
        Of a full step: η, for RMSprop η/√(1-α).
    eps
        ε, for RMSprop ε/√(1-α).
    weight_decay
        λ.
    readable
        Share of the coordinates whose magnitude is read to 10 %.
    misfit
        Median relative deviation of the last bias's gradient, as read, from what its features say:
        well below 0.01 where the update is one such step; with two classes it tests nothing.
    label
        [1], the class.
    """

    low: list[torch.Tensor]
    high: list[torch.Tensor]
    learning_rate: float
    eps: float
    weight_decay: float
    readable: float
    misfit: float
    label: torch.Tensor


@check.arguments
def read(seen: Observation) -> Reading:
    """Read one step of a sign-like optimizer on one image.

    Parameters
    ----------
    seen
        What the observer sees: nothing else is known of the client.

    Returns
    -------
    Reading
        Bounds of the gradient, and the optimizer's constants.

    Raises
    ------
    ValueError
        Where the last layer's features are not all readable, or no η and ε explain them: then it
        was no such step, or the weights were rounded too coarsely.
    """
    label = label_inference.infer(seen)
    update = _Update.of(seen)
    constants = update.full_step()
    for _ in range(ROUNDS):
        last = _last_layer(seen, label, update.bounds(constants), constants)
        constants = _possible(constants._replace(eps=last.eps))
        constants = _possible(update.refitted(seen, last, constants))
    low, high = update.bounds(constants)
    share = _share_read(low, high)
    weight, bias = (seen.parameter_names.index(name) for name in seen.head.names)
    low[weight] = high[weight] = last.weight_gradient
    low[bias] = high[bias] = last.bias_gradient
    return Reading(
        low=low,
        high=high,
        learning_rate=constants.rate,
        eps=constants.eps,
        weight_decay=constants.decay / constants.rate,
        readable=share,
        misfit=last.misfit,
        label=label,
    )


class _Constants(NamedTuple):
    """η, ηλ and ε as they are known so far."""

    rate: float
    decay: float
    eps: float


def _possible(constants: _Constants) -> _Constants:
    """The same; ValueError where an optimizer cannot have had them, as found where it was none."""
    rate, _, eps = constants
    if 0 < rate < math.inf and 0 < eps < math.inf:
        return constants
    raise ValueError(
        "weights_after lets no η and ε above 0 be read off the features of the last layer "
        f"(η {rate:.3g}, ε {eps:.3g}): {NO_SUCH_STEP}"
    )


@dataclass(frozen=True)
class _Update:
    """Δ, W_t and the unit in the last place of W_{t+1}, one tensor per parameter each."""

    deltas: tuple[torch.Tensor, ...]
    weights: list[torch.Tensor]
    ulps: list[torch.Tensor]

    @classmethod
    def of(cls, seen: Observation) -> "_Update":
        weights = [p.detach().double() for p in seen.model.parameters()]
        ulps = [(12 * variance).sqrt() for variance in seen.rounding_variance]
        return cls(seen.delta, weights, ulps)

    def full_step(self) -> _Constants:
        """η and ηλ from the coordinates that moved furthest: all moved by η beside the decay."""
        d, w = (torch.cat([t.flatten() for t in layers]) for layers in (self.deltas, self.weights))
        near = d.abs() > NEAR * d.abs().max()
        for _ in range(NEAR_ROUNDS):
            rate, decay = _regress(d[near], d[near].sign(), w[near], torch.ones_like(d[near]))
            off = ((d - decay * w).abs() - rate).abs()
            near = off <= 2 * off[near].median()
        return _Constants(rate, decay, eps=1.0)

    def bounds(self, constants: _Constants) -> Bounds:
        """(low, high) of g for each coordinate of each layer."""
        rate, decay, eps = constants
        roundings = 1 if abs(decay) < DECAYS * rate else 3
        low, high = [], []
        for d, w, ulp in zip(self.deltas, self.weights, self.ulps):
            r = (d - decay * w) / rate
            arithmetic = ARITHMETIC * torch.finfo(torch.float32).eps * r.abs()
            slack = 0.55 * roundings * ulp / rate + arithmetic
            r = r.clamp(slack - 1, 1 - slack)  # a full step is no more than that
            low.append(_gradient(r - slack, eps))
            high.append(_gradient(r + slack, eps))
        return low, high

    def refitted(self, seen: Observation, last: "_LastLayer", constants: _Constants) -> _Constants:
        """η and ηλ anew, from the last layer's weight and what its gradient is now known to be."""
        at = seen.parameter_names.index(seen.head.names[0])
        r = last.weight_gradient / (last.weight_gradient.abs() + last.eps)
        noise = self.ulps[at] / constants.rate + ERROR * r.abs() * (1 - r.abs())
        rate, decay = _regress(self.deltas[at], r, self.weights[at], 1 / noise)
        return _Constants(rate, decay, last.eps)


def _gradient(r: torch.Tensor, eps: float) -> torch.Tensor:
    """g of r = g/(|g| + ε); infinite for a full step."""
    return torch.where(r.abs() < 1, eps * r / (1 - r.abs()), r.sign() * torch.inf)


def _regress(
    d: torch.Tensor, r: torch.Tensor, w: torch.Tensor, weights: torch.Tensor
) -> list[float]:
    """[η, ηλ] of Δ = η r + ηλ W, by weighted least squares."""
    columns = torch.stack([(weights * c).flatten() for c in (r, w)], dim=1)
    return torch.linalg.lstsq(columns, (weights * d).flatten()[:, None]).solution[:, 0].tolist()


@dataclass(frozen=True)
class _LastLayer:
    """The gradient of the last layer, from its features: [K, n] and [K]; ε, and the misfit."""

    weight_gradient: torch.Tensor
    bias_gradient: torch.Tensor
    eps: float
    misfit: float


def _last_layer(
    seen: Observation, label: torch.Tensor, bounds: Bounds, constants: _Constants
) -> _LastLayer:
    """What the features say that the bounds leave open; ValueError where one cannot be read."""
    layer = seen.head.layer
    weight, bias = layer.weight.detach().double(), layer.bias.detach().double()
    low, high = bounds
    of_weight, of_bias = (seen.parameter_names.index(name) for name in seen.head.names)
    features = _features(low[of_weight], high[of_weight], low[of_bias], high[of_bias])
    if not features.known.all():
        raise ValueError(
            f"weights_after lets {int(features.known.sum())} of {len(features.known)} features of "
            f"the last layer be read: {NO_SUCH_STEP}"
        )
    one_hot = F.one_hot(label[0], seen.num_classes).double()
    bias_gradient = (weight @ features.h + bias).softmax(0) - one_hot
    ratio = (features.slope / bias_gradient)[features.slope.isfinite()]
    return _LastLayer(
        weight_gradient=torch.outer(bias_gradient, features.h),
        bias_gradient=bias_gradient,
        eps=constants.eps / float(ratio.median()),
        misfit=float((ratio / ratio.median() - 1).abs().median()),
    )


class _Features(NamedTuple):
    """The last layer's input h [n], which of it is known [n], the bias's gradient [K] as read.

    The gradient is NaN where it could not be read.
    """

    h: torch.Tensor
    known: torch.Tensor
    slope: torch.Tensor


def _features(
    weight_low: torch.Tensor,
    weight_high: torch.Tensor,
    bias_low: torch.Tensor,
    bias_high: torch.Tensor,
) -> _Features:
    """The features as ratios of the weight's gradient to the bias's, over the readable rows."""
    g, size = (weight_low + weight_high) / 2, (weight_high - weight_low) / 2
    b, b_size = ((bias_low + bias_high) / 2)[:, None], ((bias_high - bias_low) / 2)[:, None]
    variance = (size / g).square() + (b_size / b).square()
    weights = torch.where(variance < READABLE**2, 1 / variance, 0.0)
    h = torch.where(weights > 0, weights * g / b, 0.0).sum(0) / weights.sum(0)
    # A feature of zero moved no weight, not even in the rows that moved.
    dead = ((weight_low <= 0) & (weight_high >= 0)).all(0)
    slope = torch.where(b_size < READABLE * b.abs(), b, torch.nan)[:, 0]
    return _Features(torch.where(dead, 0.0, h), dead | (weights.sum(0) > 0), slope)


def _share_read(low: list[torch.Tensor], high: list[torch.Tensor]) -> float:
    """Share of the coordinates whose bounds lie within 10 % of their middle."""
    read = sum(int((b - a < READABLE * (b + a).abs()).sum()) for a, b in zip(low, high))
    return read / sum(layer.numel() for layer in low)
