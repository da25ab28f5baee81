"""One step of Adam, AdamW or RMSprop: the gradient read back out of an update that looks like a sign.

    Δ = η r + ηλ W,    r = g/(|g| + ε),    so |g| = ε |r|/(1 - |r|)        (RMSprop: η/√(1-α) for η, ε/√(1-α) for ε)

A coordinate falls short of the full step by the share ε/(|g| + ε), and rounding of the weights hides only shares below
ulp(W)/2η. So each coordinate bounds its gradient: from both sides where |g| is small, from below where it is large. The
last layer tells the rest: its readable rows have the ratio of its features h, and softmax(W h + b) - e_y then is the
gradient of its bias, from which ε follows, and the magnitudes that were too large to be read.
"""

from dataclasses import dataclass

import torch
from torch.nn import functional as F

from dlm_core import label_inference, objectives, records
from dlm_core.search import reconstruct

NEAR = 0.9  # of the largest |Δ|: what the full step is first sought among; decay spreads it
READABLE = 0.1  # relative uncertainty of a magnitude up to which it counts as read
ROUNDS = 3  # of bounds -> features -> learning rate, decay and ε -> bounds
ERROR = 1e-3  # relative, of the gradients that the features imply, as far as it matters for η and λ
DECAYS = 1e-5  # λ from which weights are rounded twice, as they shrink perhaps to a doubled ulp
ARITHMETIC = 6  # units in the last place that the client's own computation of r may be off


@dataclass(frozen=True)
class Reading:
    """What one step says about its gradient, and about the optimizer.

    low, high      one tensor per parameter: low <= g <= high (equal in the last layer, where its features were read).
    learning_rate  of a full step: η, for RMSprop η/√(1-α).      eps  ε, for RMSprop ε/√(1-α).      weight_decay  λ.
    readable       share of the coordinates whose magnitude is read to 10 %.
    misfit         median relative deviation of the last bias's gradient, as read, from what its features say: well below
                   0.01 where the update is one such step.
    label          [1], the class.
    """

    low: list
    high: list
    learning_rate: float
    eps: float
    weight_decay: float
    readable: float
    misfit: float
    label: torch.Tensor


def read(seen):
    """Read one step of a sign-like optimizer on one image, of which nothing is known but the two snapshots. A Reading.

    Raises ValueError where the last layer's features are not all readable: then it was no such step, or the weights were
    rounded too coarsely.
    """
    layer = seen.head.layer
    weight, bias = (p.detach().double() for p in (layer.weight, layer.bias))
    weights = [p.detach().double() for p in seen.model.parameters()]
    update, ulps = seen.delta, [(12 * v).sqrt() for v in seen.rounding_variance]
    at, at_bias = (seen.parameter_names.index(name) for name in seen.head.names)
    label, one = label_inference.infer(seen), F.one_hot(label_inference.infer(seen)[0], seen.num_classes).double()
    rate, decay, eps = *_full_step(update, weights), 1.0
    for _ in range(ROUNDS):
        low, high = _bounds(update, weights, ulps, rate, decay, eps)
        (h, known), slope = _features(*(b[i] for i in (at, at_bias) for b in (low, high)))
        if not known.all():
            raise ValueError(
                f"weights_after lets {int(known.sum())} of {len(known)} features of the last layer be read; either it is not one "
                "step of Adam, AdamW or RMSprop at full precision, or gradients so far above ε that they show their signs alone. "
                "This does not mean that nothing leaks: unrolled_dlm with client 'adam' assumes less"
            )
        exact = (weight @ h + bias).softmax(0) - one
        ratio = (slope / exact)[slope.isfinite()]
        eps = eps / float(ratio.median())
        misfit = float((ratio / ratio.median() - 1).abs().median())
        g = torch.outer(exact, h)
        r = g / (g.abs() + eps)
        rate, decay = _regress(update[at], r, weight, 1 / (ulps[at] / rate + ERROR * r.abs() * (1 - r.abs())))
    low, high = _bounds(update, weights, ulps, rate, decay, eps)
    read = sum(int((b - a < READABLE * (b + a).abs()).sum()) for a, b in zip(low, high))
    low[at] = high[at] = g
    low[at_bias] = high[at_bias] = exact
    share = read / sum(layer.numel() for layer in low)
    return Reading(low, high, rate, eps, decay / rate, share, misfit, label)


@records.attack(
    "interval_dlm",
    title="DLM on bounds",
    colour=2,
    marker="^",
    assumes=("that a sign-like optimizer took one step on one image",),
    client="one step of Adam, AdamW or RMSprop on one image",
    audited=1,
)
@records.passes_on_to(reconstruct)
def interval_dlm(seen, **options):
    """DLM on bounds: an image whose gradient lies where ``read`` says it does. Told: that a sign-like optimizer took one step.

    Options are those of ``search.reconstruct``. Raises ValueError as ``read`` does.
    """
    reading = read(seen)
    outside = distance_outside(reading.low, reading.high)
    options = {"labels": reading.label, "tolerance": 1e-8, **options}
    return reconstruct(seen, outside, **options)


@records.attack("sign_dlm", title="signs alone", colour=8, marker="<", client="one step of Adam, AdamW or RMSprop")
@records.passes_on_to(reconstruct)
def sign_dlm(seen, *, total_variation=0.1, **options):
    """What the signs of Δ below the last layer say alone (in that, they say the label): the attack without ``read``."""
    below = [name not in seen.head.names for name in seen.parameter_names]

    def distance(g, d):
        return sign_distance([a for a, b in zip(g, below) if b], [a for a, b in zip(d, below) if b])

    return reconstruct(seen, distance, total_variation=total_variation, **options)


def distance_outside(low, high):
    """The distance Σ_layers ‖g - [low, high]‖², relative to that of g = 0: zero where every coordinate is within its bounds.

    low, high  one tensor per layer; -inf and inf leave a side open. The update is what they were read from, and not looked at.
    """
    nearest = [torch.zeros_like(lo).clamp(lo, hi) for lo, hi in zip(low, high)]
    size = sum(layer.square().sum() for layer in nearest)

    def between(g, d):
        return objectives.squared_distance(g, [layer.clamp(lo, hi).detach() for layer, lo, hi in zip(g, low, high)]) / size

    return between


def sign_distance(g, d, softness=0.1):
    """1 - cos(tanh(g/s), sign Δ), mean over layers, s = softness · the layer's root mean square of g: signs and nothing else.

    Not zero at the truth, for the coordinates smaller than s. Invariant to positive scale.
    """
    scales = [softness * layer.square().mean().sqrt() + torch.finfo(layer.dtype).tiny for layer in g]
    each = [objectives.cosine_distance([torch.tanh(a / s)], [b.sign()]) for a, b, s in zip(g, d, scales)]
    return torch.stack(each).mean()


def _full_step(update, weights):
    """(η, ηλ) from the coordinates that moved furthest, which all moved by η beside the decay."""
    d, w = (torch.cat([layer.flatten() for layer in layers]) for layers in (update, weights))
    near = d.abs() > NEAR * d.abs().max()
    for _ in range(5):
        rate, decay = _regress(d[near], d[near].sign(), w[near], torch.ones_like(d[near]))
        off = ((d - decay * w).abs() - rate).abs()
        near = off <= 2 * off[near].median()
    return rate, decay


def _regress(d, r, w, weights):
    """(η, ηλ) of Δ = η r + ηλ W."""
    columns = torch.stack([(weights * c).flatten() for c in (r, w)], dim=1)
    return torch.linalg.lstsq(columns, (weights * d).flatten()[:, None]).solution[:, 0].tolist()


def _bounds(update, weights, ulps, rate, decay, eps):
    """(low, high) of g for each coordinate of each layer."""
    low, high = [], []
    for d, w, ulp in zip(update, weights, ulps):
        r = (d - decay * w) / rate
        roundings = 1 if abs(decay) < DECAYS * rate else 3
        slack = 0.55 * roundings * ulp / rate + ARITHMETIC * torch.finfo(torch.float32).eps * r.abs()
        r = r.clamp(slack - 1, 1 - slack)  # a full step is no more than that
        for bounds, end in ((low, r - slack), (high, r + slack)):
            bounds.append(torch.where(end.abs() < 1, eps * end / (1 - end.abs()), end.sign() * torch.inf))
    return low, high


def _features(weight_low, weight_high, bias_low, bias_high):
    """((h [n], which of them are known), the bias's gradient [K], NaN where not read): ratios over the readable rows."""
    g, size = (weight_low + weight_high) / 2, (weight_high - weight_low) / 2
    b, b_size = ((bias_low + bias_high) / 2)[:, None], ((bias_high - bias_low) / 2)[:, None]
    variance = (size / g).square() + (b_size / b).square()
    weights = torch.where(variance < READABLE**2, 1 / variance, 0.0)
    h = torch.where(weights > 0, weights * g / b, 0.0).sum(0) / weights.sum(0)
    dead = ((weight_low <= 0) & (weight_high >= 0)).all(0)  # it moved no weight, not even in the rows that moved
    slope = torch.where(b_size < READABLE * b.abs(), b, torch.nan)[:, 0]
    return (torch.where(dead, 0.0, h), dead | (weights.sum(0) > 0)), slope
