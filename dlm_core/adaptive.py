"""Attackers who know the defence: its kind and its parameters are public (Kerckhoffs), the noise that it drew is not.

``defence`` is told as a trial holds it: {"name": a key of ``trials.DEFENCES``, "observer": …, and its keyword arguments}. Which
coordinates a sparsified snapshot or update keeps need not be told; the snapshots show it.
"""

import math
from functools import partial

from torch import nn

from dlm_core import attacks, clients, defenses, exact, objectives
from dlm_core.federated import Observation, last_layer_update, weight_delta

LEAVES_OUT = ("sparsify", "top_k")
CONTRAST = 0.05  # mean difference of neighbouring pixels in natural images: the scale of the total-variation prior


def kept(seen, of_update):
    """Where Δ shows the update, one boolean tensor per parameter: no weight was zeroed in a snapshot.

    of_update  whether the update itself was sparsified: then no entry that Δ leaves at zero counts. Otherwise a weight that
               stayed is a derivative of zero, such as that of a black pixel's.
    """
    after = [seen.weights_after[name].to(p.device) for name, p in seen.model.named_parameters()]
    return [(p != 0) & (a != 0) & ((p != a) | (not of_update)) for p, a in zip(seen.model.parameters(), after)]


def noise_variance(seen, defence):
    """Variance of what the defence's noise adds to an entry of Δ, one number per parameter; 0 for defences without."""
    name, parameters = defence["name"], list(seen.model.parameters())
    if name == "noise":
        unit = 2 if defence.get("distribution", "laplace") == "laplace" else 1
        snapshots = 2 if defence.get("observer", "channel") == "channel" else 1
        factors = [float(defenses.undone_clip(p.detach(), defence.get("clip", 0.2))) for p in parameters]
        variances = [snapshots * unit * (factor * defence["scale"]) ** 2 for factor in factors]
    elif name == "clip_and_noise":
        variances = [(defence["clip"] * defence.get("noise_multiplier", 0.0)) ** 2] * len(parameters)
    elif name == "quantise":  # on average over where an entry lies between two points of the grid
        variances = [float(defenses.grid_step(layer, defence.get("bits", 8))) ** 2 / 6 for layer in weight_delta(seen)]
    else:
        variances = [0.0] * len(parameters)
    return [variance / defence.get("repeats", 1) for variance in variances]


def recover(seen, *, defence, **options):
    """``exact.recover`` without the coordinates that the defence zeroed, under the noise that it adds. Told: the defence."""
    trusted, variance = _trusted(seen, defence), noise_variance(seen, defence)
    if trusted is not None:  # a zero in both snapshots has not even rounding for a variance: any other will do
        variance = [(~t).double() for t in trusted]
    return exact.recover(seen, trusted=trusted, extra_variance=variance, **options)


def dlm_plus(seen, *, defence, total_variation=None, **options):
    """DLM+ without the coordinates that the defence zeroed, all others weighted by their noise. Told: the defence.

    total_variation  of ``search.reconstruct``; None sets it to the most probable image's under a Laplace prior of scale
                     ``CONTRAST`` on the differences of neighbouring pixels, which is 0 without noise.
    """
    variances = noise_variance(seen, defence)
    if not any(variances):
        return attacks.dlm_plus(seen, trusted=_trusted(seen, defence), total_variation=total_variation or 0.0, **options)
    weights = [variance**-0.5 for variance in variances]
    if total_variation is None:
        total_variation = _prior(seen, weights)
    distance = objectives.weighted(objectives.normalised_distance, weights)
    return attacks.reconstruct(seen, distance, total_variation=total_variation, **options)


def unrolled_dlm(seen, *, defence, learning_rate, steps, **options):
    """``dlm_plus`` on a simulated SGD client. Told: the defence, and η and E, which a server prescribes."""
    client = partial(clients.update, rate=learning_rate, steps=steps)
    return dlm_plus(seen, defence=defence, update_of=client, **options)


def combined(rounds, *, defence, **options):
    """DLM+ on several rounds of one client with the same image: the sum of its objectives over their W_t. Told: the defence.

    rounds  a list of Observations. Each is normalised by itself, so that no learning rate or clipping need be shared; the label
            is read off their sum, and the prior is that of ``dlm_plus`` for their mean.

    The defence is one that adds noise, or {}.
    """
    models, size = nn.ModuleList(each.model for each in rounds), len(weight_delta(rounds[0]))
    after = {f"{r}.{name}": tensor for r, each in enumerate(rounds) for name, tensor in each.weights_after.items()}
    joined = Observation(models, after, rounds[0].image_shape, rounds[0].num_classes)
    weights, prior = [[1.0] * size] * len(rounds), 0.0
    if defence:
        weights = [[variance**-0.5 for variance in noise_variance(each, defence)] for each in rounds]
        prior = len(rounds) / sum(1 / _prior(each, w) for each, w in zip(rounds, weights))

    def update_of(models, loss, images, labels):
        return [layer for model in models for layer in objectives.gradient(model, loss, images, labels)]

    def distance(g, d):
        parts = [slice(start, start + size) for start in range(0, len(g), size)]
        return sum(objectives.weighted(objectives.normalised_distance, w)(g[p], d[p]) for w, p in zip(weights, parts))

    label = sum(last_layer_update(each)[2] for each in rounds).argmin()[None]
    options = {"labels": label, "total_variation": prior, **options}
    return attacks.reconstruct(joined, distance, update_of=update_of, **options)


def _prior(seen, weights):
    """Weight of total variation beside DLM+ with coordinates ``weights`` = 1/noise: the Laplace prior of scale CONTRAST."""
    length = objectives.mean_norm([w * layer for w, layer in zip(weights, weight_delta(seen))])
    return 2 * math.prod(seen.image_shape) / CONTRAST / float(length) ** 2


def _trusted(seen, defence):
    return kept(seen, defence["name"] == "top_k") if defence["name"] in LEAVES_OUT else None
