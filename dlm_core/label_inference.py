"""Which classes the client's images have, read off the last layer's update."""

from collections.abc import Sequence

import torch
from torch.nn import functional as F

from dlm_core import check
from dlm_core.observation import TINY, Observation, check_per_parameter

ROUNDS = 10  # of counts -> learning rate -> counts


class Untold(ValueError, torch.linalg.LinAlgError):
    """No label stands in the update: a trial without a picture."""


@check.renamed(steps="local_steps")
@check.arguments
def infer(
    seen: Observation,
    num_images: check.Count = 1,
    trusted: Sequence[torch.Tensor] | None = None,
    local_steps: check.Count = 1,
) -> torch.Tensor:
    """Read the classes of the client's images off Δ alone.

    Parameters
    ----------
    seen
        What the observer sees.
    num_images
        B, the number of images in the client's step.
    trusted
        One boolean tensor per parameter, False for coordinates of Δ to ignore; one image only.
    local_steps
        Of the client, each on all images. More than it took do as well if its rate is small,
        fewer do not.

    Returns
    -------
    torch.Tensor
        [B] class indices, ascending.

    Raises
    ------
    ValueError
        Where the model does not end in a linear layer with bias, or ``trusted`` comes with
        several images.
    Untold
        Where the last layer did not change, its outputs are no class scores, or no counts of
        labels fit a batch's: a ValueError, too.

    Notes
    -----
    For one image the bias update η(p - e_y) has a single negative entry, the label (iDLG, Zhao
    et al. 2020). For B images Δ_b = η(p̄ - c/B) with c the counts per class. p̄ is the model's
    output for the mean feature h̄, which is the mean of the weight update's rows scaled by the
    bias update; η and c then follow by turns, c rounded to B in all. Over several steps p̄ is
    the mean output of the last layer as it learns from h̄, which is taken to stay as it is.

    Where the bias of the label's class is not to be trusted, or no bias fell (one that is frozen),
    its row of weights fell as a whole, for features of one sign.
    """
    if not seen.has_class_scores:
        raise Untold(
            "the last linear layer's outputs are no class scores of the network, so no label can "
            "be read off it; give it where an attack takes one (labels)"
        )
    layer, d_weight, d_bias = seen.head.layer, seen.head.delta_weight, seen.head.delta_bias
    if trusted is not None:
        if num_images > 1:
            raise ValueError(
                f"num_images is {num_images}; "
                "an update with gaps does not tell labels of a batch: give them"
            )
        check_per_parameter(seen, "trusted", trusted)
        masks = dict(zip(seen.parameter_names, trusted))
        weight_name, bias_name = seen.head.names
        d_weight, d_bias = d_weight * masks[weight_name], d_bias * masks[bias_name]
    if num_images == 1:
        fell = d_bias if d_bias.min() < 0 else d_weight.sum(1)
        if not fell.any():
            raise Untold(
                "the last layer did not change, so no label can be read off it; "
                "give it where an attack takes one (labels)"
            )
        return fell.argmin()[None]
    if not d_bias.any():
        raise Untold(
            "the last layer's bias did not change, "
            "so labels of a batch cannot be read off it: give them"
        )
    h = features(d_weight, d_bias)
    logits = F.linear(h, layer.weight.double(), layer.bias.double()).detach()
    # A class whose Δ_b is negative is certainly present: without images it is η p̄ > 0.
    p, absent = logits.softmax(0), d_bias >= 0
    rate = d_bias[absent].sum() / p[absent].sum()  # η times the number of steps
    shares = p - d_bias / rate
    for _ in range(ROUNDS):
        p = _mean_output(logits, shares, rate / local_steps * (h @ h + 1), local_steps)
        counts = num_images * (p - d_bias / rate)
        present = counts.clamp(min=0)
        if not (counts.isfinite().all() and TINY < present.sum() < torch.inf):
            raise Untold(
                "no counts of labels fit the move of the last layer's bias under cross-entropy of "
                "a softmax, so labels cannot be read off it: give them"
            )
        shares = _round_to(present, num_images) / num_images
        residual = p - shares
        rate = residual @ d_bias / residual.square().sum()
        rate = rate.clamp(min=torch.finfo(p.dtype).tiny)
    classes = torch.arange(len(p), device=p.device)
    return torch.repeat_interleave(classes, (num_images * shares).round().long())


def _mean_output(
    logits: torch.Tensor, shares: torch.Tensor, rate: torch.Tensor, local_steps: int
) -> torch.Tensor:
    """The mean of softmax(logits) over steps of gradient descent towards ``shares``."""
    total = torch.zeros_like(logits)
    for _ in range(local_steps):
        p = logits.softmax(0)
        total, logits = total + p, logits - rate * (p - shares)
    return total / local_steps


def features(d_weight: torch.Tensor, d_bias: torch.Tensor) -> torch.Tensor:
    """The last layer's input [n], for a batch its mean weighted by p - e_y.

    Parameters
    ----------
    d_weight, d_bias
        [K, n] and [K], that layer's part of Δ: the weight's update is the bias's times the input.
    """
    return d_weight.T @ d_bias / d_bias.square().sum()


def _round_to(values: torch.Tensor, total: int) -> torch.Tensor:
    """Whole numbers that sum to ``total``, in proportion to ``values`` of 0 and more, by largest
    remainder.
    """
    values = values * (total / values.sum())
    whole = values.floor()
    short = int(total - whole.sum())
    whole[(values - whole).topk(short).indices] += 1
    return whole
