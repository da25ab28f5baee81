"""Whether two images in the client's step would have left an update like that of one: then what a
search or a fit of one image finds may be their mean.

Weights that move the scores little, as PyTorch's initial ones, leave two images of one class nearly
the update of their mean, and small steps are rounded. So the question is asked of the very image
that was found: of two that differ from it, the update is computed, and held against what the image
itself leaves unexplained.
"""

import contextlib
import copy
from collections.abc import Sequence
from dataclasses import replace

import torch

from dlm_core import objectives
from dlm_core.beyond import inputs, priors
from dlm_core.federated import loss as training_loss
from dlm_core.harness.belief import AGREED, Belief
from dlm_core.observation import TINY, Observation
from dlm_core.results import Explains, Reconstruction, SearchEvidence

PAIRS = 4  # that are tried, of differences as smooth as natural images
SHOWS = 10.0  # times what is left unexplained, from which two images would have shown

Tensors = Sequence[torch.Tensor]


def doubted(belief: Belief, seen: Observation, found: Reconstruction) -> Belief:
    """The same belief in a result of exact recovery, or less where two images would have left such
    an update. A search ends above what rounding leaves, so of its result that decides nothing.

    Parameters
    ----------
    belief, seen, found
        In what was found, what the observer sees, and that result.
    """
    said = None if isinstance(found.evidence, SearchEvidence) else _of_believed(belief, seen, found)
    return belief if said is None else replace(belief, grade=Explains.PARTLY, doubt=said)


def caution(belief: Belief, seen: Observation, found: Reconstruction) -> str | None:
    """What to say of a search's result that is believed, where two images would have left such an
    update; None where they would have shown, and of other results.

    Parameters
    ----------
    belief, seen, found
        As of ``doubted``.
    """
    said = _of_believed(belief, seen, found) if isinstance(found.evidence, SearchEvidence) else None
    return said and f"{said}: it may be the mean of two such images"


def _of_believed(belief: Belief, seen: Observation, found: Reconstruction) -> str | None:
    """``doubt`` of what is believed and fits the whole update; None where a network raises."""
    if belief.grade is Explains.FULLY and not isinstance(found.evidence, inputs.Ratio):
        with contextlib.suppress(Exception):
            return doubt(seen, found)
    return None


def doubt(seen: Observation, found: Reconstruction) -> str | None:
    """What to say where two images as far from the one that was found as 25 dB leave its update, to
    what it leaves unexplained; None where they would have shown, and for other clients than those
    of one step of SGD on one image.

    Parameters
    ----------
    seen, found
        What the observer sees, and an attack's result.

    Raises
    ------
    Exception
        Whatever a user's network raises.
    """
    if len(found.images) != 1 or (found.local_steps or 1) != 1 or (found.labels < 0).any():
        return None
    image = found.images.detach().double()
    model = copy.deepcopy(seen.model).double()
    weights = [(d != 0) / v.clamp(min=TINY) for d, v in zip(seen.delta, seen.rounding_variance)]
    own = _gradient(model, image, found.labels)
    decay = (found.learning_rate or 0.0) * (found.weight_decay or 0.0)
    update = [d - decay * w.detach() for d, w in zip(seen.delta, model.parameters())]
    rate = _dot(weights, update, own) / _dot(weights, own, own)
    left = _size(weights, [d - rate * g for d, g in zip(update, own)])
    generator = torch.Generator().manual_seed(0)
    to_images, _ = priors.root("smooth", seen.image_shape)
    for _ in range(PAIRS):
        drawn = torch.randn(*seen.image_shape, generator=generator, dtype=torch.float64)
        drawn = to_images(drawn).to(image)
        away = drawn / drawn.square().mean().sqrt() * 10 ** (-AGREED / 20)
        both = _gradient(model, torch.cat([image + away, image - away]), found.labels.repeat(2))
        alike = _dot(weights, both, own) / _dot(weights, own, own)
        beside = _size(weights, [rate * (b - alike * g) for b, g in zip(both, own)])
        if beside < SHOWS * left and not _shows(seen, both, rate):
            return (
                "two images of one class that differ from this one by "
                f"{AGREED:.0f} dB leave an update that cannot be told from its own"
            )
    return None


def _gradient(model: torch.nn.Module, images: torch.Tensor, labels: torch.Tensor) -> Tensors:
    found = objectives.gradient(model, training_loss, images, labels)
    return [g.detach() for g in found]


def _dot(weights: Tensors, one: Tensors, other: Tensors) -> float:
    return sum(float((w * a * b).sum()) for w, a, b in zip(weights, one, other))


def _size(weights: Tensors, rest: Tensors) -> float:
    return _dot(weights, rest, rest)


def _shows(seen: Observation, gradient: Tensors, rate: float) -> bool:
    """Whether a linear layer's update has two directions after such a step."""
    named = seen.model.named_parameters()
    after = {n: (w.double() - rate * g).to(w.dtype) for (n, w), g in zip(named, gradient)}
    layers = inputs.read(seen.model, after, seen.image_shape)
    return any(each.directions > 1 for each in layers)
