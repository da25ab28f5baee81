"""What precision does to Δ: the noise that exact recovery has to reckon with, from rounding on the way and in the client.

Per layer one matrix [O, I], as in ``recursion``.
"""

import math

import torch

from dlm_core.beyond.recursion import signals
from dlm_core.federated import loss as training_loss

RESOLVED = 3.0  # ulp: a coordinate, or its output unit, that moved less is censored by rounding rather than noisy


def transmitted_variance(seen, pack, update, trusted, extra_variance, transmitted):
    """Per layer the variance of each entry of Δ that does not depend on the image, and which entries to use.

    Where Δ is below the resolution of the weights, the error of rounding is not noise: it is -Δ, for all entries of an
    output unit alike. Such entries are used only where their output unit as a whole is well resolved.
    """
    of_weights = seen.rounding_variance
    zeros = [torch.zeros_like(r) for r in of_weights]
    for name, given in (("trusted", trusted), ("extra_variance", extra_variance)):
        if given is not None and len(given) != len(zeros):
            raise ValueError(f"{name} has {len(given)} entries; the model has {len(zeros)} parameters")
    eps = torch.finfo(next(seen.model.parameters()).dtype).eps
    coarser = torch.finfo(transmitted).eps / eps if transmitted else 1.0
    trusted = pack(trusted or [z == 0 for z in zeros])
    extra = pack([e + z for e, z in zip(extra_variance or zeros, zeros)])
    variances, keep = [], []
    for d, rounding, e, t in zip(update, pack(of_weights), extra, trusted):
        rounding = coarser**2 * rounding
        ulp = (12 * rounding).sqrt()
        unit = d.square().mean(1, keepdim=True).sqrt()
        keep.append(t & ((d.abs() > 1.5 * ulp) | (unit > RESOLVED * ulp) | (e > ulp.square())))
        variances.append(rounding + e)
    return variances, keep


def arithmetic_variance(seen, layers, label, x, pack):
    """(mean square error [O, 1] or [O, I] of the gradient that the client computes in its own precision at ``x``; how many
    entries of a layer share each of its errors; the mean square error of the first layer's δ, where that is linear).

    Measured by computing it so, against float64. Errors common to many entries are no independent ones:
    - in a convolution the part that all patches share is left out, and with it the softmax's: the image hardly feels them;
    - where the first layer is linear its δ has errors that are unknowns of the fit, and leave each product δ_o x_i its own;
    - in every other linear layer whole rows (from δ) or columns (from the features) share theirs.
    """
    parameters = list(seen.model.parameters())
    x = x[: math.prod(seen.image_shape)].to(parameters[0].dtype)
    logits = seen.model(x.reshape(1, *seen.image_shape))
    client = pack(torch.autograd.grad(training_loss(logits, label[None]), parameters))
    softmax = logits.detach()[0].softmax(0).double()[:, None]
    variances, shared, error_variance = [], [], 1.0
    exact, of_softmax = signals(layers, label, x.double()), signals(layers, label, x.double(), softmax)
    for layer, in_client, *either in zip(layers, client, zip(*exact), zip(*of_softmax)):
        convolves = layer.window is not None
        d, u = either[convolves]
        exactly = layer.gradient(d, u)
        error, repeats = in_client.double() - exactly, 1
        if convolves:
            patches = layer.gradient(torch.ones_like(u[:1]), u)  # their sum [1, I]
            error = error - error @ patches.T @ patches / patches.square().sum()
        elif layer is not layers[0]:
            repeats = max(error.shape)
        elif len(layers) > 1:
            common = error[:, -1:]  # the bias's, which is δ's
            error_variance = float(common.square().sum() / max(1, int((common != 0).sum())))
            error = error - layer.gradient(common, u)
        variance = error.square().mean(1, keepdim=True)
        if layer is layers[0] and not convolves:
            products = torch.cat([exactly[:, :-1], torch.zeros_like(exactly[:, -1:])], dim=1).square()
            variance = variance * products / products.mean(1, keepdim=True).clamp(min=1e-300)
        variances.append(variance)
        shared.append(repeats)
    return variances, shared, max(error_variance, 1e-300)


def pack(model, layers, tensors):
    """One tensor per parameter, in the model's order -> one matrix [O, I] per layer."""
    named = dict(zip((name for name, _ in model.named_parameters()), tensors))
    matrices = []
    for layer in layers:
        parts = [named[f"{layer.name}.weight".lstrip(".")].flatten(1)]
        if layer.has_bias:
            parts.append(named[f"{layer.name}.bias".lstrip(".")][:, None])
        matrices.append(torch.cat(parts, dim=1))
    return matrices
