"""One search whose parts are exchanged one by one, to see which of them decides its success.

Published attacks differ in objective, start, box, smoothness, optimizer, precision and label all at
once. Here each is an argument of its own. The defaults are ``attacks.dlm_plus`` to the bit; a start
of "noise" without box and smoothness is ``coordinates.pixels``, as released.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch

from dlm_core import check, objectives, records, search
from dlm_core.coordinates import Start, cosines, pixels, smooth_planes
from dlm_core.observation import Observation
from dlm_core.results import Reconstruction

Tensors = Sequence[torch.Tensor]
NORMALISED = ("mean norm", "global norm", "layer norms", "none", "cosine")
TOLD = ("told rate", "trained factor")
STARTS = ("grey", "noise")
FAINT = 0.1  # the noise of ``cosines``' start, of what is mid-grey otherwise
SLOPE = 0.25  # of the sigmoid at mid-grey


@records.attack(
    "ablated",
    title="ablated DLM+",
    colour=5,
    marker="X",
    assumes=("the learning rate, by two of its objectives",),
    client="one step of SGD, with momentum or not",
)
@records.passes_on_to(search.reconstruct, fixed=["scale", "coordinates"])
@search.in_lanes
@check.arguments
def ablated(
    seen: Observation,
    *,
    objective: str = "mean norm",
    learning_rate: check.Positive | None = None,
    start: str = "grey",
    box: bool = True,
    smooth: bool = True,
    **options: Any,
) -> Reconstruction:
    """DLM+ with parts of it exchanged.

    Parameters
    ----------
    seen
        What the observer sees.
    objective
        How far g is from Δ: Σ_layers ‖g/n(g) - Δ/n(Δ)‖² with the "mean norm" of the layers (DLM+),
        the "global norm" of all layers as one vector, each layer over its own norm ("layer norms"),
        or n = 1 ("none"); the "cosine" distance of IG, which is half of "global norm" in exact
        arithmetic; with "told rate" ‖g - Δ/η‖² (DLG), with "trained factor" ‖g - kΔ‖², where k
        begins at 1/η (DLM).
    learning_rate
        η > 0 of the client's one step, told; needed by the last two objectives alone.
    start
        "grey" with faint noise, or "noise" from N(0, 1) in the coordinates of the search.
    box
        Whether a sigmoid keeps pixels in (0, 1).
    smooth
        Whether coordinates are cosine coefficients that fall off as 1/frequency, or the pixels.
    **options
        Of ``search.reconstruct``.

    Raises
    ------
    ValueError
        For an unknown objective or start, and for a learning rate that is lacking or not needed.
    """
    check.one_of("objective", objective, (*NORMALISED, *TOLD))
    check.one_of("start", start, STARTS)
    if (objective in TOLD) != (learning_rate is not None):
        needs = "needs it" if objective in TOLD else "does not use it"
        raise ValueError(
            f"learning_rate is {check.shown(learning_rate)}; the objective {objective!r} {needs}"
        )
    scale: Any = 1.0
    if learning_rate is not None:
        told = objective == "told rate"
        scale = 1 / learning_rate if told else search.Trained(1 / learning_rate)
    return search.reconstruct(
        seen,
        _DISTANCES[objective],
        scale=scale,
        coordinates=_coordinates(start, box, smooth),
        **options,
    )


def _globally_normalised(g: Tensors, d: Tensors) -> torch.Tensor:
    """‖g/‖g‖ - d/‖d‖‖², all layers as one vector; computed as ``normalised_distance`` is."""
    n_g, n_d = (torch.stack([layer.norm() for layer in each]).norm() for each in (g, d))
    return objectives.squared_distance(g, [n_g / n_d * layer for layer in d]) / n_g.square()


def _layerwise_normalised(g: Tensors, d: Tensors) -> torch.Tensor:
    """Σ_layers ‖g/‖g‖ - d/‖d‖‖², layer by layer; one whose d is zero has no direction."""
    pairs = [(one, other) for one, other in zip(g, d) if other.any()]
    return torch.stack([_globally_normalised([one], [other]) for one, other in pairs]).sum()


_DISTANCES: dict[str, Callable[..., torch.Tensor]] = {
    "mean norm": objectives.normalised_distance,
    "global norm": _globally_normalised,
    "layer norms": _layerwise_normalised,
    "none": objectives.squared_distance,
    "cosine": objectives.cosine_distance,
    "told rate": objectives.squared_distance,
    "trained factor": objectives.scaled_distance,
}


@functools.cache
def _coordinates(start: str, box: bool, smooth: bool) -> Callable[..., Start]:
    """Start and map of the images, as ``search.reconstruct`` asks for them."""
    if (start, box, smooth) == ("grey", True, True):
        return cosines

    def made(shape: Sequence[int], like: torch.Tensor, generator: torch.Generator) -> Start:
        noise, plain = pixels(shape, like, generator)
        planes = smooth_planes(shape, like) if smooth else plain
        if box:
            return (FAINT if start == "grey" else 1.0) * noise, lambda z: planes(z).sigmoid()
        if start == "noise":
            return noise, planes
        # the same images to begin with as in the box
        return SLOPE * FAINT * noise, lambda z: 0.5 + planes(z)

    return made
