"""Which classes the client's images have, read off the last layer's update without knowing the learning rate."""

import torch
from torch.nn import functional as F

from dlm_core.federated import last_layer, last_layer_update

ROUNDS = 10  # of counts -> learning rate -> counts


def infer(seen, num_images=1, trusted=None, steps=1):
    """Return ``num_images`` class indices [B], ascending, found from Δ alone.

    trusted  one boolean tensor per parameter, False for coordinates of Δ to ignore; one image only.
    steps    local steps of the client, each on all images. More than it took do as well if its rate is small, fewer do not.

    For one image the bias update η(p - e_y) has a single negative entry, the label (iDLG, Zhao et al. 2020). For B
    images Δ_b = η(p̄ - c/B) with c the counts per class. p̄ is the model's output for the mean feature h̄, which is the
    mean of the weight update's rows scaled by the bias update; η and c then follow by turns, c rounded to B in all.
    Over several steps p̄ is the mean output of the last layer as it learns from h̄, which is taken to stay as it is.

    Where the bias of the label's class is not to be trusted, its row of weights fell as a whole, for features of one sign.

    Raises ValueError where the model does not end in a linear layer with bias, or ``trusted`` comes with several images.
    """
    layer, d_weight, d_bias = last_layer_update(seen)
    if trusted is not None:
        if num_images > 1:
            raise ValueError(f"num_images is {num_images}; an update with gaps does not tell labels of a batch: give them")
        masks = dict(zip((name for name, _ in seen.model.named_parameters()), trusted))
        d_weight, d_bias = (d * masks[name] for d, name in zip((d_weight, d_bias), last_layer(seen.model)[1]))
        return (d_bias if d_bias.min() < 0 else d_weight.sum(1)).argmin()[None]
    if num_images == 1:
        return d_bias.argmin()[None]
    if not d_bias.any():
        raise ValueError("the last layer's bias did not change, so labels of a batch cannot be read off it: give them")
    h = features(d_weight, d_bias)
    logits = F.linear(h, layer.weight.double(), layer.bias.double()).detach()
    # A class whose Δ_b is negative is certainly present: without images it is η p̄ > 0.
    p, absent = logits.softmax(0), d_bias >= 0
    rate = d_bias[absent].sum() / p[absent].sum()  # η times the number of steps
    shares = p - d_bias / rate
    for _ in range(ROUNDS):
        p = _mean_output(logits, shares, rate / steps * (h @ h + 1), steps)
        shares = _round_to(num_images * (p - d_bias / rate), num_images) / num_images
        residual = p - shares
        rate = (residual @ d_bias / residual.square().sum()).clamp(min=torch.finfo(p.dtype).tiny)
    return torch.repeat_interleave(torch.arange(len(p), device=p.device), (num_images * shares).round().long())


def _mean_output(logits, shares, rate, steps):
    """The mean over ``steps`` steps of gradient descent of softmax(logits), which learns to be ``shares``."""
    total = 0
    for _ in range(steps):
        p = logits.softmax(0)
        total, logits = total + p, logits - rate * (p - shares)
    return total / steps


def features(d_weight, d_bias):
    """The last layer's input [n], for a batch its mean weighted by p - e_y: what the weight's update is of the bias's."""
    return d_weight.T @ d_bias / d_bias.square().sum()


def _round_to(values, total):
    """Non-negative whole numbers that sum to ``total``, by largest remainder."""
    values = values.clamp(min=0)
    values = values * (total / values.sum().clamp(min=1e-300))
    whole = values.floor()
    short = int(total - whole.sum())
    whole[(values - whole).topk(short).indices] += 1
    return whole
