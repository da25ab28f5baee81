"""The attacks by name. Each takes an Observation and, as explicit arguments, whatever else it has to be told.

All are one search (``dlm_core.search.reconstruct``, whose options they pass on) with a distance of their own.
"""

import math

from dlm_core import check, objectives
from dlm_core import labels as label_inference
from dlm_core.coordinates import pixels
from dlm_core.optimizers import SignedAdam
from dlm_core.search import Reconstruction, reconstruct
from dlm_core.unrolled import unrolled_dlm

__all__ = ["Reconstruction", "dlg", "dlm", "dlm_plus", "idlg", "inverting_gradients", "reconstruct", "unrolled_dlm"]


def dlg(seen, *, learning_rate, labels="optimised", **options):
    """Deep Leakage from Gradients (Zhu et al. 2019). Told: the learning rate, and that the client took one plain SGD step."""
    check.in_range("learning_rate", learning_rate, 0, math.inf, open_low=True)
    return reconstruct(seen, objectives.squared_distance, scale=1 / learning_rate, labels=labels, **options)


def idlg(seen, *, learning_rate, **options):
    """iDLG (Zhao et al. 2020): DLG with the label read off the last layer's update instead of optimised. Told: as DLG."""
    return dlg(seen, learning_rate=learning_rate, labels="inferred", **options)


def inverting_gradients(seen, *, total_variation=1e-2, max_evaluations=2000, **options):
    """Inverting Gradients (Geiping et al. 2020): cosine distance, total variation, signed Adam on boxed pixels, full budget.

    Told: nothing about the learning rate, but a total-variation weight that suits the data, and for batches the labels.
    """
    published = {"coordinates": pixels, "optimizer": SignedAdam, "patience": max_evaluations}
    settings = {"total_variation": total_variation, "max_evaluations": max_evaluations, **published, **options}
    return reconstruct(seen, objectives.cosine_distance, **settings)


def dlm(seen, *, k0, **options):
    """DLM (Zhao et al. 2024): k, which stands for 1/η, is optimised along with the images from the guess ``k0``. Told: k0.

    The label is inferred. The released code optimises it (``labels="optimised"``), and then g -> 0, k -> 0 is a global minimum.
    """
    check.in_range("k0", k0, 0, math.inf, open_low=True)
    return reconstruct(seen, objectives.scaled_distance, k0=k0, **options)


def dlm_plus(seen, *, trusted=None, **options):
    """DLM+ (Zhao et al. 2024): both sides divided by their mean layer norm. Told: nothing but the two snapshots.

    trusted  one boolean tensor per parameter, False for coordinates of Δ to leave out (a defence's); None takes all.
    options  of ``search.reconstruct``: num_images (in the client's step; 1), labels, restarts, seed, max_evaluations, …
    """
    if trusted is None:
        return reconstruct(seen, objectives.normalised_distance, **options)
    if "labels" not in options:
        options["labels"] = label_inference.infer(seen, options.get("num_images", 1), trusted)
    return reconstruct(seen, objectives.weighted(objectives.normalised_distance, trusted), **options)
