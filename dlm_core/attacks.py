"""The attacks by name. Each takes an Observation and, as explicit arguments, whatever else it has
to be told.

All are one search (``dlm_core.search.reconstruct``, whose options they pass on) with a distance of
their own. Given a list of Observations, or of seeds, they search for all at once and return a list
(``search.in_lanes``).
"""

import importlib
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch

from dlm_core import check, label_inference, objectives, records
from dlm_core.arrays import Labels, for_model
from dlm_core.coordinates import pixels
from dlm_core.observation import Observation, check_per_parameter
from dlm_core.optimizers import SignedAdam
from dlm_core.results import Reconstruction, baseline
from dlm_core.search import Trained, in_lanes, reconstruct

__all__ = ["Reconstruction", "dlg", "dlm", "dlm_plus", "idlg", "inverting_gradients", "reconstruct"]

PLAIN_STEP = "that the client took one plain SGD step"


def __getattr__(name: str) -> Any:
    if name == "unrolled_dlm":  # lies beyond the paper, and has been an attack by this name
        return importlib.import_module("dlm_core.beyond.unrolled").unrolled_dlm
    raise AttributeError(f"module 'dlm_core.attacks' has no attribute {name!r}")


@records.attack(
    "dlg", title="DLG", colour=0, marker="o", assumes=(PLAIN_STEP,), client="one step of plain SGD"
)
@records.passes_on_to(reconstruct, fixed=["scale"])
@in_lanes
@check.arguments
def dlg(
    seen: Observation,
    *,
    learning_rate: check.Positive,
    labels: str | Labels = "optimised",
    **options: Any,
) -> Reconstruction:
    """Deep Leakage from Gradients (Zhu et al. 2019): Σ_layers ‖g - Δ/η‖².

    Parameters
    ----------
    seen
        What the observer sees.
    learning_rate
        η > 0 of the client's one step, told.
    labels, **options
        Of ``search.reconstruct``.
    """
    return reconstruct(
        seen, objectives.squared_distance, scale=1 / learning_rate, labels=labels, **options
    )


@records.attack(
    "idlg",
    title="iDLG",
    colour=9,
    marker="v",
    assumes=(PLAIN_STEP,),
    client="one step of plain SGD",
)
@records.passes_on_to(dlg, fixed=["labels"])
@in_lanes
@check.arguments
def idlg(seen: Observation, *, learning_rate: check.Positive, **options: Any) -> Reconstruction:
    """iDLG (Zhao et al. 2020): DLG with the label read off the last layer's update instead of
    optimised.

    Parameters
    ----------
    seen
        What the observer sees.
    learning_rate
        η > 0 of the client's one step, told.
    **options
        Of ``search.reconstruct``.
    """
    return dlg(seen, learning_rate=learning_rate, labels="inferred", **options)


@records.attack(
    "dlg_factor",
    title="DLG with a factor",
    colour=0,
    marker="<",
    assumes=(PLAIN_STEP,),
    client="one step of plain SGD",
)
@records.passes_on_to(dlg, fixed=["update_of", "unknowns"])
@in_lanes
@check.arguments
def dlg_factor(
    seen: Observation, *, learning_rate: check.Positive, k0: check.Positive, **options: Any
) -> Reconstruction:
    """DLG with a factor on the dummy gradient, of the released experiments: Σ_layers ‖k·g - Δ/η‖²,
    k optimised along with the images.

    Parameters
    ----------
    seen
        What the observer sees.
    learning_rate
        η > 0 of the client's one step, told.
    k0
        The guess > 0 that k starts from, told; the true factor is 1. What the search makes of it is
        ``found.point["k"]``.
    **options
        Of ``dlg``.
    """
    factor = {"update_of": _factored, "unknowns": {"k": k0}}
    return dlg(seen, learning_rate=learning_rate, **factor, **options)


def _factored(model, loss, images, labels, *, k: torch.Tensor) -> list[torch.Tensor]:
    return [k * layer for layer in objectives.gradient(model, loss, images, labels)]


@records.attack(
    "inverting_gradients",
    title="IG",
    colour=2,
    marker="s",
    assumes=(
        "a total-variation weight that suits the data",
        "for batches the labels, where they are given",
    ),
    client="one step of SGD, with momentum or not",
)
@records.passes_on_to(reconstruct, fixed=["scale"])
@in_lanes
@check.arguments
def inverting_gradients(
    seen: Observation,
    *,
    total_variation: check.NonNegative = 1e-2,
    max_evaluations: check.Count = 2000,
    **options: Any,
) -> Reconstruction:
    """Inverting Gradients (Geiping et al. 2020): cosine distance, total variation, signed Adam on
    boxed pixels, without patience: it ends at its budget, or where it has converged.

    Parameters
    ----------
    seen
        What the observer sees.
    total_variation
        Weight of the prior. One that suits the data is told to the attack.
    max_evaluations, **options
        Of ``search.reconstruct``.
    """
    published = {"coordinates": pixels, "optimizer": SignedAdam, "patience": max_evaluations}
    settings = {
        "total_variation": total_variation,
        "max_evaluations": max_evaluations,
        **published,
        **options,
    }
    return reconstruct(seen, objectives.cosine_distance, **settings)


@records.attack(
    "dlm", title="DLM", colour=1, marker="D", client="one step of SGD, with momentum or not"
)
@records.passes_on_to(reconstruct, fixed=["scale"])
@in_lanes
@check.arguments
def dlm(
    seen: Observation, *, k0: check.Positive, relative: bool = True, **options: Any
) -> Reconstruction:
    """DLM (Zhao et al. 2024): Σ_layers ‖g - kΔ‖², k, which stands for 1/η, optimised along with the
    images.

    Parameters
    ----------
    seen
        What the observer sees.
    k0
        The guess > 0 that k starts from, told.
    relative
        Whether the search's variable is k/k0; in the released code it is k itself.
    **options
        Of ``search.reconstruct``. The label is inferred; the released code optimises it
        (``labels="optimised"``), and then g -> 0, k -> 0 is a global minimum.
    """
    return reconstruct(seen, objectives.scaled_distance, scale=Trained(k0, relative), **options)


@records.attack(
    "dlm_plus",
    title="DLM+",
    colour=4,
    marker="P",
    client="one step of SGD, with momentum or not",
    audited=5,
)
@records.passes_on_to(reconstruct, fixed=["scale"])
@in_lanes
@check.arguments
def dlm_plus(
    seen: Observation, *, trusted: Sequence[torch.Tensor] | None = None, **options: Any
) -> Reconstruction:
    """DLM+ (Zhao et al. 2024): Σ_layers ‖g/n(g) - Δ/n(Δ)‖², n the mean layer norm. Told: nothing
    but the two snapshots.

    Parameters
    ----------
    seen
        What the observer sees.
    trusted
        One boolean tensor per parameter, False for coordinates of Δ to leave out (a defence's);
        None takes all.
    **options
        Of ``search.reconstruct``: num_images (in the client's step; 1), labels, restarts, seed,
        max_evaluations, …
    """
    if trusted is not None:
        check_per_parameter(seen, "trusted", trusted)
    if trusted is None:
        return reconstruct(seen, objectives.normalised_distance, **options)
    options = with_labels(seen, trusted, options)
    return reconstruct(seen, partial(weighted_distance, trusted), **options)


def with_labels(
    seen: Observation, trusted: Sequence[torch.Tensor], options: Mapping[str, Any]
) -> dict[str, Any]:
    """The options of a search, whose labels, where they are to be inferred, are inferred from the
    trusted coordinates of Δ alone.

    Parameters
    ----------
    seen, trusted
        As in ``dlm_plus``.
    options
        Of ``search.reconstruct``.
    """
    labels = options.get("labels", "inferred")
    if isinstance(labels, str) and labels == "inferred":
        labels = label_inference.infer(seen, options.get("num_images", 1), trusted)
    return {**options, "labels": labels}


def weighted_distance(
    weights: Sequence[torch.Tensor | float], g: Sequence[torch.Tensor], d: Sequence[torch.Tensor]
) -> torch.Tensor:
    """DLM+'s distance with every coordinate multiplied by its weight (``objectives.weighted``)."""
    return objectives.weighted(objectives.normalised_distance, weights)(g, d)


@records.attack("grey", title="grey square", colour=7, marker="", client="any", seeded=False)
@check.arguments
def grey(seen: Observation, *, num_images: check.Count = 1) -> Reconstruction:
    """The trivial baseline: mid-grey, the best guess of an observer who looks at nothing."""
    return baseline(for_model(torch.full((num_images, *seen.image_shape), 0.5), seen.model))


@records.attack("noise", title="noise", colour=7, marker=".", client="any")
@check.arguments
def noise(
    seen: Observation, *, num_images: check.Count = 1, seed: check.Whole = 0
) -> Reconstruction:
    """The other one: uniform noise in [0, 1]."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand((num_images, *seen.image_shape), generator=generator)
    return baseline(for_model(images, seen.model))
