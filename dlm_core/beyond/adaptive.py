"""Attackers who know the defence: its kind and its parameters are public (Kerckhoffs), the noise that it drew is not.

``defence`` is told as a ``defenses.Setting``, or {"name": …, "observer": …} with its keyword arguments beside them. Which
coordinates a sparsified snapshot or update keeps need not be told; the snapshots show it.
"""

import math
from functools import partial

from torch import nn

from dlm_core import attacks, defenses, objectives, records
from dlm_core.beyond import clients, exact
from dlm_core.observation import Observation

CONTRAST = 0.05  # mean difference of neighbouring pixels in natural images: the scale of the total-variation prior


@records.attack("aware_exact", title="exact, aware", colour=3, marker="*", several=False, seeded=False)
def recover(seen, *, defence, **options):
    """``exact.recover`` without the coordinates that the defence zeroed, under the noise that it adds. Told: the defence."""
    defence = defenses.Setting.of(defence)
    trusted, variance = defence.kept(seen), defence.noise_variance(seen)
    if trusted is not None:  # a zero in both snapshots has not even rounding for a variance: any other will do
        variance = [(~t).double() for t in trusted]
    return exact.recover(seen, trusted=trusted, extra_variance=variance, **options)


@records.attack("aware_dlm_plus", title="DLM+, aware", colour=4, marker="P")
def dlm_plus(seen, *, defence, total_variation=None, **options):
    """DLM+ without the coordinates that the defence zeroed, all others weighted by their noise. Told: the defence.

    total_variation  of ``search.reconstruct``; None sets it to the most probable image's under a Laplace prior of scale
                     ``CONTRAST`` on the differences of neighbouring pixels, which is 0 without noise.
    """
    defence = defenses.Setting.of(defence)
    variances = defence.noise_variance(seen)
    if not any(variances):
        return attacks.dlm_plus(seen, trusted=defence.kept(seen), total_variation=total_variation or 0.0, **options)
    weights = [variance**-0.5 for variance in variances]
    if total_variation is None:
        total_variation = _prior(seen, weights)
    distance = objectives.weighted(objectives.normalised_distance, weights)
    return attacks.reconstruct(seen, distance, total_variation=total_variation, **options)


@records.attack("aware_unrolled_dlm", title="unrolled DLM+, aware", colour=5, marker="X")
def unrolled_dlm(seen, *, defence, learning_rate, local_steps, **options):
    """``dlm_plus`` on a simulated SGD client. Told: the defence, and η and E, which a server prescribes."""
    client = partial(clients.update, learning_rate=learning_rate, local_steps=local_steps)
    return dlm_plus(seen, defence=defence, update_of=client, **options)


@records.attack("aware_combined", title="DLM+ on several rounds, aware", colour=4, marker="H")
def combined(rounds, *, defence, **options):
    """DLM+ on several rounds of one client with the same image: the sum of its objectives over their W_t. Told: the defence.

    rounds  a list of Observations. Each is normalised by itself, so that no learning rate or clipping need be shared; the label
            is read off their sum, and the prior is that of ``dlm_plus`` for their mean.

    The defence is one that adds noise, or {}.
    """
    models, size = nn.ModuleList(each.model for each in rounds), len(rounds[0].delta)
    after = {f"{r}.{name}": tensor for r, each in enumerate(rounds) for name, tensor in each.weights_after.items()}
    joined = Observation(models, after, rounds[0].image_shape, rounds[0].num_classes)
    weights, prior = [[1.0] * size] * len(rounds), 0.0
    if defence:
        weights = [[variance**-0.5 for variance in defenses.Setting.of(defence).noise_variance(each)] for each in rounds]
        prior = len(rounds) / sum(1 / _prior(each, w) for each, w in zip(rounds, weights))

    def update_of(models, loss, images, labels):
        return [layer for model in models for layer in objectives.gradient(model, loss, images, labels)]

    def distance(g, d):
        parts = [slice(start, start + size) for start in range(0, len(g), size)]
        return sum(objectives.weighted(objectives.normalised_distance, w)(g[p], d[p]) for w, p in zip(weights, parts))

    label = sum(each.head.delta_bias for each in rounds).argmin()[None]
    options = {"labels": label, "total_variation": prior, **options}
    return attacks.reconstruct(joined, distance, update_of=update_of, **options)


def _prior(seen, weights):
    """Weight of total variation beside DLM+ with coordinates ``weights`` = 1/noise: the Laplace prior of scale CONTRAST."""
    length = objectives.mean_norm([w * layer for w, layer in zip(weights, seen.delta)])
    return 2 * math.prod(seen.image_shape) / CONTRAST / float(length) ** 2

