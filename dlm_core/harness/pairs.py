"""Whether two images in the client's steps would have left an update like that of one: then what a
search or a fit of one image finds may be their mean.

Weights that move the scores little, as PyTorch's initial ones, leave two images of one class nearly
the update of their mean: small steps are rounded, and a search ends above what rounding leaves. So
the question is asked of the very image that was found: of two that differ from it, the update is
computed, and held against what the image itself leaves unexplained.
"""

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial

import torch

from dlm_core import label_inference
from dlm_core.beyond import clients, inputs, priors
from dlm_core.beyond.attention import plain_attention
from dlm_core.beyond.layer_input import LayerInput
from dlm_core.beyond.weighted import EXACT
from dlm_core.federated import loss as training_loss
from dlm_core.harness import clues
from dlm_core.harness.belief import AGREED
from dlm_core.harness.look import Look
from dlm_core.observation import TINY, Observation
from dlm_core.results import Reconstruction, SearchEvidence, Status

PAIRS = 4  # that are tried, of differences as smooth as natural images
SHOWS = 10.0  # times the squares left unexplained, from which two images would have shown
HIDDEN = (
    f"two images of one class, {AGREED:.0f} dB to either side of one that was found, leave an "
    "update that cannot be told from its own: what was found may be the mean of two such images, "
    "or of two that differ more"
)
UNKNOWN = (
    "it does not explain the update to its rounding, as several images of one class may leave it, "
    "and the client's loss is not known, with which they would be computed"
)
SIGNS = (
    "one step of Adam or its kin leaves little more than signs, which do not tell how many images "
    "left them: what was found may be the mean of several"
)
UNTOLD = "whether two images would have left such an update could not be computed"
UNASKED = "its time was over before it was held against two images"

Tensors = Sequence[torch.Tensor]


def against(seen: Observation, found: Reconstruction, look: Look) -> str | None:
    """What speaks against a result: that twice as many images would have left such an update, or
    that this cannot be told; None where they would have shown.

    Parameters
    ----------
    seen, found
        What the observer sees, and an attack's result.
    look
        The first look at the update.

    Notes
    -----
    Where labels are -1, the client's loss is not known. A search then has to explain the update to
    its rounding, and two images are looked for under cross-entropy instead. Of an exact attack that
    needs no label nothing is asked.
    """
    known = bool((found.labels >= 0).all())
    if not known:
        if not isinstance(found.evidence, SearchEvidence):
            return None
        if found.status is not Status.CONVERGED:
            return UNKNOWN
        label = label_inference.infer(seen).to(found.labels)
        found = replace(found, labels=label.expand(len(found.images)))
    if signs_alone(found, look):
        return SIGNS
    try:
        return HIDDEN if _hidden(seen, found, look, known) else None
    except Exception:  # whatever a user's network raises
        return UNTOLD


def signs_alone(found: Reconstruction, look: Look) -> bool:
    """Whether the update is that of one step of Adam or its kin, however a search went on."""
    return look.kin == "adam" and found.local_steps in (None, 1)


def _hidden(seen: Observation, found: Reconstruction, look: Look, known: bool) -> bool:
    """Whether there are two images that would not have shown, by a loss that is ``known`` or not.

    A pair with more directions than the client's update shows as well, unless that has so many that
    its directions say nothing.
    """
    images = found.images.detach().double()
    update_of = _client(seen, found, look.kin)
    directions = 0 if look.coarse else _most(look.layers)  # rounding has directions of its own
    decay = max((each.decay for each in look.layers), default=0.0)
    own, update = update_of(images), _without_decay(seen, found, decay)
    measures = [_Measure(w, update, own) for w in _weights(seen)]
    if not known:  # it was explained to so many times its rounding
        measures = measures[:1]
        measures[0].left = EXACT**2 * sum(int((d != 0).sum()) for d in seen.delta)
    for place, away in itertools.product(range(len(images)), _differences(seen, images)):
        twice = torch.stack([images, images])
        twice[:, place] += torch.stack([away, -away])
        both = update_of(twice.flatten(0, 1))
        if any(each.shows(both) for each in measures):
            continue
        if not directions or _directions(seen, both, measures[0].factor) <= directions:
            return True
    return False


def _directions(seen: Observation, update: Tensors, factor: float) -> int:
    """Of an update times ``factor``, rounded as the client's weights are."""
    named = seen.model.named_parameters()
    after = {n: (w.double() - factor * g).to(w.dtype) for (n, w), g in zip(named, update)}
    return _most(inputs.read(seen.model, after, seen.image_shape))


def _most(layers: Iterable[LayerInput]) -> int:
    """The most directions that a linear layer's update has; 0 where that says nothing."""
    return max((each.directions for each in layers), default=0)


class _Measure:
    """What an image's update, ``own``, leaves unexplained of the client's, by weighted squares."""

    def __init__(self, weights: Tensors, update: Tensors, own: Tensors) -> None:
        self.weights, self.own = weights, own
        self.factor = self._along(update)
        self.left = self._size(update, self.factor)

    def shows(self, both: Tensors) -> bool:
        """Whether the update of two images is another by much more."""
        alike = self._along(both)
        return self.factor**2 * self._size(both, alike) >= SHOWS * self.left

    def _along(self, other: Tensors) -> float:
        """The multiple of the image's own update that comes nearest to another."""
        return self._dot(other, self.own) / self._dot(self.own, self.own)

    def _size(self, other: Tensors, factor: float) -> float:
        rest = [a - factor * b for a, b in zip(other, self.own)]
        return self._dot(rest, rest)

    def _dot(self, one: Tensors, other: Tensors) -> float:
        return sum(float((w * a * b).sum()) for w, a, b in zip(self.weights, one, other))


def _weights(seen: Observation) -> tuple[Tensors, Tensors]:
    """Of the entries that moved, in units of their rounding, and relative to their tensor's move:
    a search's error is spread as the latter, that of a fit as the former.
    """
    moved = [(d != 0).double() for d in seen.delta]
    rounding = [m / v.clamp(min=TINY) for m, v in zip(moved, seen.rounding_variance)]
    sizes = [d.double().square().sum().clamp(min=TINY) for d in seen.delta]
    return rounding, [m / size for m, size in zip(moved, sizes)]


def _client(
    seen: Observation, found: Reconstruction, kin: str
) -> Callable[[torch.Tensor], Tensors]:
    """The update of images, by the client that was found; of as many more, each by its label."""
    model = clues.precise(seen.model, seen.image_shape)
    dtype = next(model.parameters()).dtype
    optimizer = found.client.optimizer or kin
    simulated = partial(
        clients.simulate,
        model,
        training_loss,
        learning_rate=found.learning_rate or 1.0,
        local_steps=found.local_steps or 1,
        client_optimizer=clients.step_of("client_optimizer", optimizer),
    )

    def update_of(images: torch.Tensor) -> Tensors:
        labels = found.labels.repeat(len(images) // len(found.labels))
        with plain_attention():
            return [d.detach().double() for d in simulated(images.to(dtype), labels)]

    return update_of


def _without_decay(seen: Observation, found: Reconstruction, decay: float) -> Tensors:
    """Δ but for the weight decay that was found, or for that of its layers."""
    if found.weight_decay is not None:
        decay = (found.learning_rate or 0.0) * found.weight_decay
    return [d - decay * w.detach() for d, w in zip(seen.delta, seen.model.parameters())]


def _differences(seen: Observation, images: torch.Tensor) -> Tensors:
    """[C, H, W] each, of a root mean square that is 25 dB."""
    generator = torch.Generator().manual_seed(0)
    to_images, _ = priors.root("smooth", seen.image_shape)
    shape = (PAIRS, *seen.image_shape)
    white = torch.randn(*shape, generator=generator, dtype=torch.float64)
    drawn = [to_images(each).to(images) for each in white]
    return [d / d.square().mean().sqrt() * 10 ** (-AGREED / 20) for d in drawn]
