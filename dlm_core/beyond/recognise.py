"""Which optimizer a client ran, told from its two snapshots, for one local step on one image.

Heavy-ball and Nesterov momentum only scale a first step: they are plain SGD of another η, and no observer can tell. AdamW
without decay is Adam, and RMSprop is the Adam of η/√(1-α) and ε/√(1-α): these two are told apart by ε, taken for the default.
"""

from dataclasses import dataclass

import torch
from torch.nn import functional as F

from dlm_core import label_inference
from dlm_core.beyond import signlike

SIGN_LIKE = 0.2  # share of the moved weights that moved by a quarter of the most: 0.4 to 1 for Adam's kin, else < 0.06
ONE_STEP = 0.01  # misfit of a sign-like step's last layer up to which it is one: 1e-4 to 3e-3 there, 0.07 and more elsewhere
ROUNDED = 20.0  # the same of a linear step, in multiples of what rounding of the weights leaves
DECAYS = 1e-5  # λ
BETWEEN = 3e-8  # ε of Adam's 1e-8 and RMSprop's 1e-8/√0.01


@dataclass(frozen=True)
class Recognition:
    """The verdict and what it rests on.

    optimizer      "sgd" (with or without momentum), "sgd with decay", "adam", "adamw", "rmsprop"; or "several steps" where one
                   step of none of these on one image explains the update: a batch looks so too, and too coarse a rounding.
    learning_rate  η (of a full step, for the sign-like; with momentum, what it scales η to), weight_decay λ, eps: ε or NaN.
    share          of the weights that moved by a quarter of the largest move or more.
    misfit         relative deviation of the last layer's update from one step's.
    """

    optimizer: str
    learning_rate: float
    weight_decay: float
    eps: float
    share: float
    misfit: float


def recognise(seen):
    """Name the optimizer behind one local step on one image, from an Observation alone. Returns a Recognition."""
    moved = torch.cat([layer.abs().flatten() for layer in seen.delta])
    share = float((moved > moved.max() / 4).sum() / (moved > 0).sum())
    if share < SIGN_LIKE:
        rate, decay, misfit, rounding = linear_step(seen)
        enough = ROUNDED * rounding
        name, eps = "sgd with decay" if abs(decay) > DECAYS else "sgd", float("nan")
    else:
        try:
            reading = signlike.read(seen)
        except ValueError:
            return Recognition("several steps", *[float("nan")] * 3, share, float("inf"))
        rate, decay, eps, misfit = reading.learning_rate, reading.weight_decay, reading.eps, reading.misfit
        enough = ONE_STEP
        name = "rmsprop" if eps > BETWEEN else "adamw" if abs(decay) > DECAYS else "adam"
    return Recognition(name if misfit < enough else "several steps", rate, decay, eps, share, misfit)


def linear_step(seen):
    """(η, λ, misfit, rounding) of the last layer's update, taken for one step Δ = η(g + λW).

    Its gradient is of rank one, so λ is what W explains beside that. The misfit is that of Δ_b - ηλb from η(p - e_y), or the
    unexplained part of Δ_W, whichever is larger, relative to either; rounding is the part of Δ_W that the weights' may be.
    """
    layer, d_weight, d_bias = seen.head.layer, seen.head.delta_weight, seen.head.delta_bias
    weight, bias = layer.weight.detach().double(), layer.bias.detach().double()
    decay = 0.0
    for _ in range(3):
        slope = d_bias - decay * bias
        across, along = (m - torch.outer(slope, label_inference.features(m, slope)) for m in (weight, d_weight))
        decay = float((across * along).sum() / across.square().sum())
    h = label_inference.features(d_weight - decay * weight, slope)
    expected = F.linear(h, weight, bias).softmax(0) - F.one_hot(label_inference.infer(seen)[0], len(bias)).double()
    rate = float(slope @ expected / expected.square().sum())
    of_bias, of_weight = (slope - rate * expected).norm() / slope.norm(), (along - decay * across).norm() / d_weight.norm()
    noise = seen.head.variance_weight.sum()
    return rate, decay / rate, float(max(of_bias, of_weight)), float(noise.sqrt() / d_weight.norm())
