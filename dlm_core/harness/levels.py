"""A W_t that holds fewer levels than its numbers could: rounded to half precision, or to 8 bits, as
checkpoints are stored.

A client may have trained from the rounded weights, or from finer ones. Then what was rounded away
stands in the update beside its step, and exact recovery is told of that noise.
"""

from collections.abc import Callable, Mapping

import torch
from torch import nn

from dlm_core.beyond.exact import CHI2_RANGE, Fit, Singular
from dlm_core.observation import TINY, unit_in_last_place
from dlm_core.results import Explains, Reconstruction

LEVELS = 127  # of 8 bits, on either side of 0
FEW = 8  # numbers below which any may lie on levels by chance, or be round ones
HIDES = (
    "The weights before the round (W_t) are rounded, more coarsely than those that the client may "
    "have trained from: that may hide a leak, and an audit of the weights that it was really sent "
    "may show more."
)
WHOLE = 0.01  # how nearly they are whole multiples, in steps


def lost(network: nn.Module) -> tuple[list[torch.Tensor], list[str]]:
    """(variance of what W_t may have lost to rounding, one tensor for each parameter; what to say
    of it); both empty where it was not rounded.

    Parameters
    ----------
    network
        With the weights W_t.
    """
    weights = dict(network.named_parameters())
    found = rounding_of(weights)
    if not found:
        return [], []
    said = (
        f"{len(found)} of {len(weights)} tensors of W_t (before) are rounded to half precision or "
        "8 bits: exact recovery takes the client to have trained from them as they are, or else "
        "from finer ones, and counts their rounding as noise; no other attack does"
    )
    return [found.get(name, torch.zeros_like(w)) for name, w in weights.items()], [said]


def rounding_of(weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """{name: variance of each entry's rounding} of the tensors that were rounded; empty where a few
    round numbers alone look like it.

    Parameters
    ----------
    weights
        {name: tensor}, in whatever precision they are held.
    """
    steps = {n: _step(w.detach()) for n, w in weights.items() if w.is_floating_point() and w.any()}
    found = {name: step.square() / 12 for name, step in steps.items() if step is not None}
    return found if any(len(weights[name].unique()) >= FEW for name in found) else {}


def half_of(w: torch.Tensor) -> torch.dtype | None:
    """The half precision that a tensor is rounded to, whatever it is held in; None for neither."""
    either = (torch.bfloat16, torch.float16)  # the coarser counts where both fit
    return next((d for d in either if torch.equal(w.double(), w.to(d).double())), None)


def _step(w: torch.Tensor) -> torch.Tensor | None:
    """From one level to the next, at each entry; None where there are no levels."""
    half = half_of(w)
    if half is not None:
        return unit_in_last_place(w.to(half))
    rows = w.double().flatten(1) if w.ndim > 1 else w.double()[None]
    of_rows = rows.abs().amax(1, keepdim=True)
    for largest in (of_rows.max()[None, None], of_rows):  # one scale, or one for each output
        step = (largest / LEVELS).clamp(min=TINY)
        away = rows / step - (rows / step).round()
        told = int((rows != 0).sum()) - len(largest)  # the largest of each is whole in any case
        if told >= FEW and bool((away.abs() < WHOLE).all()):
            return step.expand_as(rows).reshape(w.shape)
    return None


def either(run: Callable[..., Reconstruction], variance: list[torch.Tensor]) -> Reconstruction:
    """What exact recovery finds of a client that trained from the rounded weights; where that
    explains nothing, of one that trained from finer ones.

    Parameters
    ----------
    run
        Exact recovery, ready but for ``extra_variance``.
    variance
        Of the rounding, one tensor for each parameter.

    Notes
    -----
    Of finer weights the noise must really be there: a fit far below it is none of theirs.
    """
    found = run()
    if found.evidence.explains is not Explains.LITTLE:
        return found
    try:
        again = run(extra_variance=variance)
    except Singular:
        return found
    assert isinstance(again.evidence, Fit)
    finer = again.evidence.chi2 > CHI2_RANGE[0]
    return again if finer and again.evidence.explains is not Explains.LITTLE else found
