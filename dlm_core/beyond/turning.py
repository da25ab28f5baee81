"""Whether the update of a linear layer tells one input from several: δ, the loss's slopes at the
layer's output, turns from one input to another, and rounding does not hide it.
"""

from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from dlm_core.beyond.tracing import AWAY, NOISE, Traced, slope
from dlm_core.observation import scores

NEAR = 1e-4  # how far inputs are moved, over their own size, to see how δ turns
NEAR32 = 1e-2  # the same in float32
TURNS = 1e-4  # the angle that δ turns by, over how far its input moved, from which two show as two
HIDDEN = 40.0  # times the relative size below which rounding hides a direction: what δ turns by
PROBES = 4
LEVELS = 4  # numbers of a δ to each size that it has, where a loss's slopes are constant
FITS = 0.999  # cosine of δ with the update's, from which a label is taken for the client's
FITS_EXACTLY = 1 - 5e-7  # the same where nothing else speaks of the loss: 0.1 % of δ's length


class Loss(NamedTuple):
    """What the last layer's move says of the client's loss.

    Attributes
    ----------
    seen
        Whether that layer moved.
    slopes
        [K] the loss's slopes in the scores, where they are the same for any images of a class.
    """

    seen: bool
    slopes: torch.Tensor | None = None


def tells_apart(
    traced: Traced,
    name: str,
    values: torch.Tensor,
    left: torch.Tensor,
    hidden: float,
    loss: Loss,
    away: float = AWAY,
) -> bool:
    """Whether δ turns where this input changes, and not so little that rounding hides it: then two
    inputs would show as two.

    Parameters
    ----------
    traced, name
        The network, and the layer.
    values, left
        Its input [features], and the direction of δ [outputs] that the update has.
    hidden
        Relative size of a direction that rounding hides.
    loss
        What the last layer's move says of it.
    away
        How far two inputs are apart, relative to their size.

    Notes
    -----
    δ does not turn in a network of one output, or of two classes, whose units are switched and not
    smooth, and where the scores are so far apart that the softmax has saturated; of a loss of
    constant slopes it turns only where the network between does. It has to turn whatever the label
    is; where one label explains ``left``, for that.
    """
    near = NEAR if traced.dtype == torch.float64 else NEAR32
    noise = torch.randn(PROBES, len(values), generator=traced.generator, dtype=torch.float64)
    one = torch.ones_like(noise[:1])
    given = values * torch.cat([one, 1 + near * noise, 1 + away * noise]).to(values)
    try:
        signals = _signals(traced, name, given, left, loss)
        enough = FITS if loss.seen else FITS_EXACTLY
        fits = [s for s in signals if F.cosine_similarity(s[0], left, 0).abs() > enough]
        if not fits and repeats(left, hidden):  # a loss of constant slopes, for any images
            return False
        turned = torch.stack([_turned(each) for each in fits or signals])
    except Exception:  # a network that takes one image, or gives no gradient: nothing is known
        return False
    turns = max(TURNS * near, 1e2 * torch.finfo(traced.dtype).eps)
    by_near, by_far = turned[:, :PROBES].amax(1), turned[:, PROBES:].amax(1)
    return bool((by_near > turns).all() and (by_far > HIDDEN * hidden).all())


def _signals(
    traced: Traced, name: str, given: torch.Tensor, left: torch.Tensor, loss: Loss
) -> list[torch.Tensor]:
    """dL/dz at the layer's output for each input [N, features], L the usual loss, or one of
    constant slopes, which it may be as well where it was not seen; for the labels whose classes
    have the highest scores and the lowest, since others turn no less, and for the class that
    moved most where ``left`` is of the scores.
    """
    kept: dict[str, torch.Tensor] = {}

    def keep(_: nn.Module, __: Any, output: torch.Tensor) -> torch.Tensor:
        kept["output"] = output.detach().requires_grad_()
        return kept["output"].clone()  # which the next layer may overwrite

    hook = traced.layers[name].register_forward_hook(keep)
    try:
        with traced.instead(name, given), torch.enable_grad():
            traced.passed(traced.grey(len(given)), grad=True)
            output = scores(traced.returned).flatten(1)
            losses = [F.softplus(output).sum()]
            slopes = loss.slopes
            if slopes is not None and len(slopes) == output.shape[1]:
                losses = [(output @ slopes.to(output)).sum()]
            elif output.shape[1] > 1:
                order = output[0].argsort()
                labels = {int(order[at]) for at in (0, -1, -2)}
                if len(left) == output.shape[1]:
                    labels.add(int(left.abs().argmax()))
                losses = [
                    F.cross_entropy(output, torch.full_like(output[:, 0], label).long())
                    for label in sorted(labels)
                ]
            if not loss.seen:
                losses.append((output * slope(output[0])).sum())
            return [
                torch.autograd.grad(each, kept["output"], retain_graph=True)[0].double().flatten(1)
                for each in losses
            ]
    finally:
        hook.remove()


def repeats(signal: torch.Tensor, hidden: float) -> bool:
    """Whether most numbers of a δ are of one size with another, as of a hinge or absolute loss: its
    slopes are then the same for all images of a class.

    Parameters
    ----------
    signal
        δ [outputs].
    hidden
        Relative size below which rounding hides how its numbers differ.
    """
    sizes = (signal.abs() / signal.abs().max()).sort().values
    sizes = sizes[sizes > NOISE * hidden]
    if len(sizes) < 2:
        return True
    gaps = sizes.diff()
    same = gaps < NOISE * hidden
    if not same.double().mean() > 0.5:
        return False
    # of very many classes neighbours are near, whatever the loss: one size is as wide as rounding
    group = torch.cat([same.new_zeros(1), ~same]).cumsum(0)
    beyond = sizes - sizes[torch.searchsorted(group, group)] > NOISE * hidden
    return bool(group[-1] + 1 + beyond.sum() <= max(3, len(sizes) // LEVELS))


def _turned(signals: torch.Tensor) -> torch.Tensor:
    """By how much each direction is another than the first, from 0 to 1."""
    first = signals[0] / signals[0].norm()
    beside = signals[1:] - (signals[1:] @ first)[:, None] * first
    return (beside.norm(dim=1) / signals[1:].norm(dim=1)).nan_to_num()
