"""Which optimizer a client ran, told from its two snapshots, for one local step on one image.

Heavy-ball and Nesterov momentum only scale a first step: they are plain SGD of another η, and no
observer can tell. AdamW without decay is Adam, and RMSprop is the Adam of η/√(1-α) and ε/√(1-α):
these two are told apart by ε, taken for the default.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch.nn import functional as F

from dlm_core import check, label_inference
from dlm_core.beyond import reading
from dlm_core.observation import Observation

# Share of the moved weights that moved by a quarter of the most: 0.4 to 1 for Adam's kin, else
# below 0.06.
SIGN_LIKE = 0.2
# Misfit of a sign-like step's last layer up to which it is one: 1e-4 to 3e-3 there, 0.07 and more
# elsewhere.
ONE_STEP = 0.01
ROUNDED = 20.0  # the same of a linear step, in multiples of what rounding of the weights leaves
DECAYS = 1e-5  # λ
SURELY = 3.0  # standard errors of λ
BETWEEN = 3e-8  # ε of Adam's 1e-8 and RMSprop's 1e-8/√0.01
ROUNDS = 3  # of gradient -> decay -> gradient


@dataclass(frozen=True)
class Recognition:
    """The verdict and what it rests on.

    Attributes
    ----------
    optimizer
        "sgd" (with or without momentum), "sgd with decay", "adam", "adamw", "rmsprop"; or "several
        steps" where one step of none of these on one image explains the update. A batch looks so
        too, too coarse a rounding, and two classes, which tell no step.
    learning_rate
        η: of a full step, for the sign-like; with momentum, what it scales η to.
    weight_decay
        λ.
    eps
        ε, or NaN.
    share
        Of the weights that moved by a quarter of the largest move or more.
    misfit
        Relative deviation of the last layer's update from one step's.
    """

    optimizer: str
    learning_rate: float
    weight_decay: float
    eps: float
    share: float
    misfit: float


class LinearStep(NamedTuple):
    """The last layer's update, taken for one step Δ = η(g + λW).

    Attributes
    ----------
    learning_rate, weight_decay
        η and λ.
    misfit
        That of Δ_b - ηλb from η(p - e_y), or the unexplained part of Δ_W, whichever is larger,
        relative to either.
    rounding
        The part of Δ_W that rounding of the weights may be.
    decay_error
        Standard error of λ by that rounding.
    """

    learning_rate: float
    weight_decay: float
    misfit: float
    rounding: float
    decay_error: float


@check.arguments
def recognise(seen: Observation) -> Recognition:
    """Name the optimizer behind one local step on one image, from an Observation alone.

    Parameters
    ----------
    seen
        What the observer sees.
    """
    moved = torch.cat([layer.abs().flatten() for layer in seen.delta])
    share = float((moved > moved.max() / 4).sum() / (moved > 0).sum())
    if seen.num_classes <= 2:  # whose last layer moves as in one step on one image, whatever it was
        return _several(share)
    return _linear(seen, share) if share < SIGN_LIKE else _sign_like(seen, share)


def _linear(seen: Observation, share: float) -> Recognition:
    try:
        step = linear_step(seen)
    except ValueError:  # of a last layer that did not move, or whose outputs are no class scores
        return _several(share)
    decays = abs(step.weight_decay) > max(DECAYS, SURELY * step.decay_error)
    name = "sgd with decay" if decays else "sgd"
    return Recognition(
        optimizer=name if step.misfit < ROUNDED * step.rounding else "several steps",
        learning_rate=step.learning_rate,
        weight_decay=step.weight_decay,
        eps=float("nan"),
        share=share,
        misfit=step.misfit,
    )


def _several(share: float) -> Recognition:
    """Where the last layer tells nothing of one step."""
    nan = float("nan")
    return Recognition("several steps", nan, nan, nan, share, misfit=float("inf"))


def _sign_like(seen: Observation, share: float) -> Recognition:
    try:
        step = reading.read(seen)
    except ValueError:
        return _several(share)
    name = "adamw" if abs(step.weight_decay) > DECAYS else "adam"
    if step.eps > BETWEEN:
        name = "rmsprop"
    return Recognition(
        optimizer=name if step.misfit < ONE_STEP else "several steps",
        learning_rate=step.learning_rate,
        weight_decay=step.weight_decay,
        eps=step.eps,
        share=share,
        misfit=step.misfit,
    )


@check.arguments
def linear_step(seen: Observation) -> LinearStep:
    """Read η and λ of one linear step off the last layer's update.

    Parameters
    ----------
    seen
        What the observer sees.

    Notes
    -----
    The gradient of the layer's weight is of rank one, so λ is what W explains beside that. With two
    classes it is so for any batch and loss, and η is that of one image with a hard label.
    """
    head = seen.head
    weight, bias = head.layer.weight.detach().double(), head.layer.bias.detach().double()
    decay = 0.0  # ηλ
    for _ in range(ROUNDS):
        slope = head.delta_bias - decay * bias
        across = _beside(weight, slope)
        along = _beside(head.delta_weight, slope)
        of_decay = across.square().sum()
        decay = float((across * along).sum() / of_decay)
    h = label_inference.features(head.delta_weight - decay * weight, slope)
    one_hot = F.one_hot(label_inference.infer(seen)[0], len(bias)).double()
    expected = F.linear(h, weight, bias).softmax(0) - one_hot
    rate = float(slope @ expected / expected.square().sum())
    size = head.delta_weight.norm()
    of_bias = (slope - rate * expected).norm() / slope.norm()
    of_weight = (along - decay * across).norm() / size
    return LinearStep(
        learning_rate=rate,
        weight_decay=decay / rate,
        misfit=float(max(of_bias, of_weight)),
        rounding=float(head.variance_weight.sum().sqrt() / size),
        decay_error=float((across.square() * head.variance_weight).sum().sqrt() / of_decay / rate),
    )


def _beside(matrix: torch.Tensor, slope: torch.Tensor) -> torch.Tensor:
    """What of a matrix [K, n] is no multiple of ``slope`` [K] in its columns."""
    return matrix - torch.outer(slope, label_inference.features(matrix, slope))
