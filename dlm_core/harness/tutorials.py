"""The client of Flower's and PyTorch's quickstarts, changed a little: what a server sees of its
images, what noise is enough, and what accuracy the change costs.

All are values that ``sweeps.sweep`` runs. The network is that of the tutorials, with PyTorch's
weights, pixels taken to [-1, 1], SGD of 0.01 with momentum 0.9; examples/flower/ has the same
client in processes of Flower.
"""

import contextlib
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from dlm_core import check, data, defenses, federated, label_inference, metrics, models, records
from dlm_core.arrays import Images
from dlm_core.beyond import fisher, leading, preprocessing
from dlm_core.beyond.weighted import weighted
from dlm_core.harness.keys import result_key
from dlm_core.observation import Observation
from dlm_core.records import typed
from dlm_core.threads import client_seed, one_thread

NETWORK, SHAPE, CLASSES = "tutorial", (3, 32, 32), 10
NORMALISE = preprocessing.KNOWN["half"]
SGD: dict[str, Any] = {"learning_rate": 0.01, "optimizer_options": {"momentum": 0.9}}
HELD_OUT = 500  # digits, for the accuracy
CLIENTS, BATCH, LAST = 4, 16, 3  # of the training; rounds over which the accuracy is averaged
COORDINATES = 500  # of the search: a third of its own, in a quarter of the time


@dataclass(frozen=True, kw_only=True)
class Change:
    """What a client does otherwise than the quickstart's.

    Attributes
    ----------
    local_steps
        Steps in a round on the images that it has.
    num_images
        In a step, of a client that is attacked.
    half
        Whether weights travel in half precision, float16, to the client and back.
    clip, noise
        Norm to which the update is cut, and the standard deviation of the noise on each of its
        entries as a share of that; no clip for neither.
    """

    local_steps: check.Count = 1
    num_images: check.Count = 1
    half: bool = False
    clip: check.Positive | None = None
    noise: check.NonNegative = 0.0

    def __post_init__(self) -> None:
        check.fields(self)
        if self.noise and self.clip is None:
            raise ValueError(f"noise is {self.noise:g} of the clip, and clip is None; give both")

    def transmitted(self) -> torch.dtype | None:
        """The precision of weights on their way; None for the network's own."""
        return torch.float16 if self.half else None

    def sent(self, seen: Observation, seed: int) -> Observation:
        """What a server sees of a client that cuts its update and adds noise."""
        if self.clip is None:
            return seen
        return defenses.defend(
            *(seen, "clip_and_noise"),
            observer="server",
            seed=seed,
            clip=self.clip,
            noise_multiplier=self.noise,
        )


@dataclass(frozen=True, kw_only=True)
class Watched:
    """One client whose images are faces, attacked by the server that sent it the weights.

    Attributes
    ----------
    change
        A ``Change``, or a dict of its fields.
    index
        Of its first face; its weights and noise are drawn by this number as well.
    max_steps
        Of the search.
    """

    change: Change = field(default_factory=Change)
    index: check.Whole = 0
    max_steps: check.Count = 16

    def __post_init__(self) -> None:
        object.__setattr__(self, "change", typed("change", Change, self.change))
        check.fields(self)

    @property
    def key(self) -> str:
        """The name of the result."""
        return _key(self, "lfw")

    def run(self) -> dict[str, Any]:
        """The record: PSNR in dB of the picture that the attack found to the nearest of the faces,
        of a grey square, and of the nearest other face of the set; whether the label that it read
        is one of theirs; and the error of the first linear layer's input, as a share of its size.
        """
        began = time.process_time()
        with one_thread():
            images, labels, others = self.faces()
            model = _network(self.index)
            seen = self._seen(model, images, labels)
            found: torch.Tensor | None = None
            error = math.inf
            with contextlib.suppress(ValueError):  # the attack does not apply
                error = _error(*leading.features(seen), model, images)
                made = leading.leading(seen)
                found = weighted(made, num_coordinates=COORDINATES, max_steps=self.max_steps).images
            pictures = {"truth": images}
            pictures |= {} if found is None else {"found": found.float()}
            return {
                "psnr": -math.inf if found is None else nearest(images, found),
                "grey": nearest(images, torch.full_like(images[:1], 0.5)),
                "other": max(nearest(images, other[None]) for other in others),
                "label": int(label_inference.infer(seen)) in labels.tolist(),
                "features": error,
                "seconds": time.process_time() - began,
                "arrays": {name: each.contiguous() for name, each in pictures.items()},
            }

    def faces(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Images and labels of the client, and the faces of others."""
        every = data.load("lfw")
        everything = coloured(every.images[every.labels == 1])
        places = (self.index + torch.arange(self.change.num_images)) % len(everything)
        theirs = torch.ones(len(everything), dtype=torch.bool)
        theirs[places] = False
        return everything[places], places % CLASSES, everything[theirs]

    def _seen(self, model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> Observation:
        seen = federated.train_locally(
            *(model, images, labels),
            local_steps=self.change.local_steps,
            transmitted=self.change.transmitted(),
            **SGD,
        )
        return self.change.sent(seen, client_seed(self.index))


@dataclass(frozen=True, kw_only=True)
class Enough:
    """The noise on the update of a client with one face and one step from which no observer with a
    smooth prior passes 20 dB in the mean, in one round.

    Attributes
    ----------
    index
        As in ``Watched``.
    """

    index: check.Whole = 0

    def __post_init__(self) -> None:
        check.fields(self)

    @property
    def key(self) -> str:
        """The name of the result."""
        return _key(self, "lfw")

    def run(self) -> dict[str, Any]:
        """The record: the noise's standard deviation on each entry of the update."""
        began = time.process_time()
        with one_thread():
            images, labels, _ = Watched(index=self.index).faces()
            model = _network(self.index)
            rate = SGD["learning_rate"]  # of one step: momentum has no part in it
            noise = fisher.noise_for(model, images, labels, learning_rate=rate)
        return {"noise": noise, "seconds": time.process_time() - began, "arrays": {}}


@dataclass(frozen=True, kw_only=True)
class Trained:
    """A federation of four clients with digits, each of which makes a change; a round is an epoch.

    Attributes
    ----------
    change
        A ``Change``, or a dict of its fields; here ``local_steps`` are epochs, and each step has
        ``BATCH`` images.
    num_rounds
        Of FedAvg.
    seed
        Of the weights, of who has which digits, and of the noise.
    """

    change: Change = field(default_factory=Change)
    num_rounds: check.Count = 12
    seed: check.Whole = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "change", typed("change", Change, self.change))
        check.fields(self)

    @property
    def key(self) -> str:
        """The name of the result."""
        return _key(self, "digits")

    def run(self) -> dict[str, Any]:
        """The record: the share of held-out digits that the network knows after each round, and
        over the last ``LAST``.
        """
        began = time.process_time()
        with one_thread():
            found = list(self._rounds())
        last = found[-LAST:]
        accuracy = sum(last) / len(last)
        seconds = time.process_time() - began
        return {"accuracy": accuracy, "accuracies": found, "seconds": seconds, "arrays": {}}

    def _rounds(self) -> Iterator[float]:
        digits = data.load("digits")
        images, labels = coloured(digits.images), digits.labels
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(self.seed))
        held_out, rest = order[:HELD_OUT], order[HELD_OUT:]
        parts = [rest[n::CLIENTS] for n in range(CLIENTS)]
        steps = self.change.local_steps * math.ceil(len(parts[0]) / BATCH)
        for model, _ in federated.rounds(
            _network(self.seed),
            [(images[part], labels[part]) for part in parts],
            num_rounds=self.num_rounds,
            defend=self._sent,
            local_steps=steps,
            batch_size=BATCH,
            transmitted=self.change.transmitted(),
            **SGD,
        ):
            with torch.no_grad():
                right = model(images[held_out]).argmax(1) == labels[held_out]
            yield float(right.double().mean())

    def _sent(self, seen: Observation, turn: int, client: int) -> Observation:
        return self.change.sent(seen, client_seed(self.seed, turn, client))


def _key(value: Any, dataset: str) -> str:
    named = [records.NETWORKS[NETWORK]]
    return result_key(value, ["dlm_core.harness.tutorials"], named, dataset, "bundled")


def _network(seed: int) -> nn.Module:
    network = models.build(NETWORK, SHAPE, CLASSES, seed=seed, init="default")
    return preprocessing.normalised(network, NORMALISE)


@check.arguments
def coloured(images: Images) -> torch.Tensor:
    """Images [N, 1, H, W] in [0, 1] as colour images [N, 3, 32, 32], of the network's size.

    Raises
    ------
    ValueError
        For images that are not grey.
    """
    if images.shape[1] != 1:
        raise ValueError(f"images has {images.shape[1]} channels; it takes grey ones, of one")
    size = F.interpolate(images, SHAPE[1:], mode="bilinear", align_corners=False)
    return size.clamp(0, 1).repeat(1, SHAPE[0], 1, 1)


@check.arguments
def nearest(images: Images, found: Images) -> float:
    """PSNR in dB of a picture to the nearest of the images.

    Parameters
    ----------
    images
        [N, C, H, W].
    found
        [1, C, H, W].

    Raises
    ------
    ValueError
        For a picture of another shape.
    """
    if images.shape[1:] != found.shape[1:]:
        raise ValueError(
            f"images are {[*images.shape[1:]]} and found is {[*found.shape[1:]]}; "
            "they take the same C, H, W"
        )
    of_each = [metrics.psnr(found[:1], each[None], data_range=1.0) for each in images]
    return max(map(float, of_each))


def _error(name: str, h: torch.Tensor, model: nn.Module, images: torch.Tensor) -> float:
    """Of a layer's input, relative to that of the nearest image."""
    passed: list[torch.Tensor] = []
    hook = model.get_submodule(name).register_forward_pre_hook(
        lambda _, given: passed.append(given[0].detach().double())
    )
    with torch.no_grad():
        model(images)
    hook.remove()
    return float(((h - passed[0]).norm(dim=1) / passed[0].norm(dim=1)).min())
