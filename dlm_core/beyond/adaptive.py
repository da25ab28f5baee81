"""Attackers who know the defence.

Its kind and its parameters are public (Kerckhoffs), the noise that it drew is not. They are told as
a ``defenses.Setting``, or as {"name": …, "observer": …} with the defence's keyword arguments beside
them. Which coordinates a sparsified snapshot or update keeps need not be told: the snapshots show
it.
"""

import copy
import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from dlm_core import attacks, check, objectives, records
from dlm_core.arrays import Labels
from dlm_core.beyond import clients, exact
from dlm_core.defenses import Setting
from dlm_core.observation import Observation
from dlm_core.results import Reconstruction
from dlm_core.search import in_lanes, reconstruct

# Mean difference of neighbouring pixels in natural images: the scale of the total-variation prior.
CONTRAST = 0.05

Told = Setting | Mapping[str, Any]


@records.attack(
    "aware_exact",
    title="exact, aware",
    colour=3,
    marker="*",
    assumes=("that the client took one SGD step on one image",),
    client="one step of SGD on one image, defended",
    several=False,
    seeded=False,
)
@records.passes_on_to(exact.recover, fixed=["trusted", "extra_variance"])
@check.arguments
def recover(seen: Observation, *, defence: Told, **options: Any) -> Reconstruction:
    """``exact.recover`` without what the defence zeroed, under the noise that it adds.

    Parameters
    ----------
    seen
        What the observer sees.
    defence
        Told, with its strength.
    **options
        Of ``exact.recover``, ``trusted`` and ``extra_variance`` aside.
    """
    setting = Setting.of(defence)
    trusted = setting.kept(seen)
    variance: Sequence[torch.Tensor | float] = setting.noise_variance(seen)
    if trusted is not None:
        # A zero in both snapshots has not even rounding for a variance: any other will do.
        variance = [noise + (~kept).double() for noise, kept in zip(variance, trusted)]
    return exact.recover(seen, trusted=trusted, extra_variance=variance, **options)


@records.attack(
    "aware_dlm_plus",
    title="DLM+, aware",
    colour=4,
    marker="P",
    client="one step of SGD, with momentum or not, defended",
)
@records.passes_on_to(reconstruct, fixed=["distance"])
@in_lanes
@check.arguments
def dlm_plus(
    seen: Observation,
    *,
    defence: Told,
    total_variation: check.NonNegative | None = None,
    **options: Any,
) -> Reconstruction:
    """DLM+ without what the defence zeroed, all other coordinates weighted by their noise.

    Parameters
    ----------
    seen
        What the observer sees.
    defence
        Told, with its strength.
    total_variation
        Of ``search.reconstruct``. None sets it to the most probable image's under a Laplace prior
        of scale ``CONTRAST`` on the differences of neighbouring pixels, which is 0 without noise.
    **options
        Of ``search.reconstruct``.
    """
    setting = Setting.of(defence)
    variances, trusted = setting.noise_variance(seen), setting.kept(seen)
    if not any(variances):
        prior = total_variation or 0.0
        return attacks.dlm_plus(seen, trusted=trusted, total_variation=prior, **options)
    by_noise = _weights(variances)
    weights: Sequence[torch.Tensor | float] = by_noise
    if total_variation is None:
        total_variation = _prior(seen, by_noise)
    if trusted is not None:
        weights = [weight * kept for weight, kept in zip(by_noise, trusted)]
        options = attacks.with_labels(seen, trusted, options)
    distance = partial(attacks.weighted_distance, weights)
    return reconstruct(seen, distance, total_variation=total_variation, **options)


@records.attack(
    "aware_unrolled_dlm",
    title="unrolled DLM+, aware",
    colour=5,
    marker="X",
    assumes=("that the client ran plain SGD",),
    client="several local steps of plain SGD, defended",
)
@check.renamed(steps="local_steps")
@records.passes_on_to(dlm_plus, fixed=["update_of"])
@in_lanes
@check.arguments
def unrolled_dlm(
    seen: Observation,
    *,
    defence: Told,
    learning_rate: check.Positive,
    local_steps: check.Count,
    **options: Any,
) -> Reconstruction:
    """``dlm_plus`` on a simulated SGD client.

    Parameters
    ----------
    seen
        What the observer sees.
    defence
        Told, with its strength.
    learning_rate, local_steps
        η > 0 and E >= 1, told: a server prescribes them.
    **options
        Of ``dlm_plus``.
    """
    client = partial(clients.simulate, learning_rate=learning_rate, local_steps=local_steps)
    return dlm_plus(seen, defence=defence, update_of=client, **options)


@records.attack(
    "aware_combined",
    title="DLM+ on several rounds, aware",
    colour=4,
    marker="H",
    assumes=("that the image is the same in all rounds",),
    client="one step of SGD a round on the same image, several rounds, defended by noise",
    several=False,
    scene={"num_rounds": 2},
)
@records.passes_on_to(reconstruct, fixed=["distance", "update_of"])
@check.arguments
def combined(
    rounds: Sequence[Observation],
    *,
    defence: Told | None,
    labels: str | Labels = "inferred",
    total_variation: check.NonNegative | None = None,
    **options: Any,
) -> Reconstruction:
    """DLM+ on several rounds of one client with the same image: the sum of its objectives.

    Parameters
    ----------
    rounds
        One Observation each, at least one, of one architecture. Each is normalised by itself, so
        that no learning rate or clipping need be shared.
    defence
        Told, with its strength: one that leaves nothing out; None or {} for no defence.
    labels
        Of ``search.reconstruct``; "inferred" reads it off the sum of the updates.
    total_variation
        Of ``search.reconstruct``. None sets that of ``dlm_plus`` for the mean of the rounds.
    **options
        Of ``search.reconstruct``.

    Raises
    ------
    ValueError
        For rounds that do not fit each other, and for a defence that zeroes entries.
    """
    check.at_least("number of rounds", len(rounds), 1)
    shapes = [[layer.shape for layer in each.delta] for each in rounds]
    if any(each != shapes[0] for each in shapes):
        raise ValueError("rounds holds Observations of networks of different architecture")
    size = len(rounds[0].delta)
    weights, prior = [[1.0] * size] * len(rounds), 0.0
    setting = Setting.of(defence) if defence else None
    if setting is not None and setting.record.leaves_out:
        raise ValueError(
            f"defence {setting.name!r} zeroes entries, which combined cannot leave out: "
            "dlm_plus can, round by round"
        )
    variances = [setting.noise_variance(each) if setting else [0.0] for each in rounds]
    if all(any(each) for each in variances):
        weights = [_weights(each) for each in variances]
        prior = len(rounds) / sum(1 / _prior(each, w) for each, w in zip(rounds, weights))

    def update_of(models, loss, images, labels):
        return [g for model in models for g in objectives.gradient(model, loss, images, labels)]

    def distance(g, d):
        total = g[0].new_zeros(())
        for turn, own in enumerate(weights):
            part = slice(turn * size, (turn + 1) * size)
            between = objectives.weighted(objectives.normalised_distance, own)
            total = total + between(g[part], d[part])
        return total

    if isinstance(labels, str) and labels == "inferred":
        none = torch.zeros_like(rounds[0].head.delta_bias)
        labels = sum((each.head.delta_bias for each in rounds), start=none).argmin()[None]
    prior = prior if total_variation is None else total_variation
    settings = {"labels": labels, "total_variation": prior, **options}
    return reconstruct(_joined(rounds), distance, update_of=update_of, **settings)


def _joined(rounds: Sequence[Observation]) -> Observation:
    """One Observation of a model that is the list of all, parameters round by round."""
    models = _Models(copy.deepcopy(each.model) for each in rounds)  # parameters of its own each
    after = {
        f"{turn}.{name}": tensor
        for turn, each in enumerate(rounds)
        for name, tensor in each.weights_after.items()
    }
    return Observation(models, after, rounds[0].image_shape, rounds[0].num_classes)


class _Models(nn.ModuleList):
    """Several, which classify an image as the first does."""

    def forward(self, images: torch.Tensor) -> Any:
        """As the first model's."""
        return self[0](images)


def _weights(variances: Sequence[float]) -> list[float]:
    """1/σ of each parameter's entries. What has no noise among noise, such as a layer of zeros that
    is quantised, counts like what has least.
    """
    least = min(variance for variance in variances if variance > 0)
    return [max(variance, least) ** -0.5 for variance in variances]


def _prior(seen: Observation, weights: Sequence[float]) -> float:
    """Weight of total variation beside DLM+ with coordinates ``weights`` = 1/noise.

    It is the Laplace prior of scale CONTRAST.
    """
    length = objectives.mean_norm([w * layer for w, layer in zip(weights, seen.delta)])
    return 2 * math.prod(seen.image_shape) / CONTRAST / float(length) ** 2
