"""Which classes the client's images have, read off the last layer's update without knowing the learning rate."""

import torch
from torch.nn import functional as F

from dlm_core.federated import last_layer, last_layer_update


def infer(seen, num_images=1, trusted=None):
    """Return ``num_images`` class indices [B], ascending, found from Δ alone.

    trusted  one boolean tensor per parameter, False for coordinates of Δ to ignore; one image only.

    For one image the bias update η(p - e_y) has a single negative entry, the label (iDLG, Zhao et al. 2020). For B
    images Δ_b = η(p̄ - c/B) with c the counts per class. p̄ is the model's output for the mean feature h̄, which is the
    mean of the weight update's rows scaled by the bias update; η and c then follow by turns, c rounded to B in all.

    Where the bias of the label's class is not to be trusted, its row of weights fell as a whole, for features of one sign.

    Raises ValueError where the model does not end in a linear layer with bias, or ``trusted`` comes with several images.
    """
    layer, d_weight, d_bias = last_layer_update(seen)
    if trusted is not None:
        if num_images > 1:
            raise ValueError(
                f"num_images is {num_images}; labels of a batch are not read off an update with gaps: give them"
            )
        masks = dict(zip((name for name, _ in seen.model.named_parameters()), trusted))
        d_weight, d_bias = (d * masks[name] for d, name in zip((d_weight, d_bias), last_layer(seen.model)[1]))
        return (d_bias if d_bias.min() < 0 else d_weight.sum(1)).argmin()[None]
    if num_images == 1:
        return d_bias.argmin()[None]
    if not d_bias.any():
        raise ValueError("the last layer's bias did not change, so labels of a batch cannot be read off it: give them")
    h = features(d_weight, d_bias)
    p = F.linear(h, layer.weight.double(), layer.bias.double()).softmax(0)
    counts = torch.zeros_like(p)
    present = d_bias < 0  # certain: a class without images has Δ_b = η p̄ > 0
    eta = d_bias[~present].sum() / p[~present].sum()
    for _ in range(10):
        counts = _round_to(num_images * (p - d_bias / eta), num_images)
        residual = p - counts / num_images
        eta = (residual @ d_bias / residual.square().sum()).clamp(min=torch.finfo(p.dtype).tiny)
    return torch.repeat_interleave(torch.arange(len(counts), device=p.device), counts.long())


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
