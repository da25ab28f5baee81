"""The first look at an update, before any attack: what it shows without one, and what kind of
client it may come from.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from dlm_core.beyond import inputs, preprocessing, recognise
from dlm_core.beyond.layer_input import LayerInput
from dlm_core.beyond.noisy import NoisyInput, noisy_inputs
from dlm_core.harness import pictures
from dlm_core.observation import Observation

UNBALANCED = 0.01  # of the size of the last bias's move, that its sum may be under cross-entropy
BY_ENTRIES = ("adam", "adamw", "rmsprop")  # optimizers that change an update entry by entry


@dataclass(frozen=True, kw_only=True)
class Look:
    """What an update says at once.

    Attributes
    ----------
    optimizer
        That ``recognise`` names; "several steps" where one step on one image explains nothing.
    kin
        "adam" or "sgd", by the sizes of the weights' moves.
    learning_rate
        Of one step, where that was recognised.
    swapped
        Whether the two files look as if they had changed places.
    unmoved
        Names of the parameters that did not change.
    last_alone
        Whether nothing but the last layer moved.
    layers
        What the linear layers say.
    noisy
        What those say whose update is one direction and noise.
    invented
        What may have been made up to fit the network, in sentences.
    numbers
        How many weights moved.
    num_parameters
        How many tensors the network has.
    num_classes
        Its outputs.
    coarse
        Whether the weights were rounded to half precision.
    unread
        Why the update cannot be read, in a sentence; None where it can.
    normalisation
        What the client is told to have made of its pixels; None where nothing is.
    """

    optimizer: str = "several steps"
    kin: str = "sgd"
    learning_rate: float = math.nan
    swapped: bool = False
    unmoved: list[str] = field(default_factory=list)
    last_alone: bool = False
    layers: list[LayerInput] = field(repr=False, default_factory=list)
    noisy: list[NoisyInput] = field(repr=False, default_factory=list)
    invented: list[str] = field(default_factory=list)
    numbers: int = 0
    num_parameters: int = 0
    num_classes: int = 0
    coarse: bool = False
    unread: str | None = None
    normalisation: preprocessing.Normalisation | None = None

    @property
    def images(self) -> int:
        """Images in the client's round, at least: the directions in a layer that sees the pixels
        themselves, whatever steps it took; 1 where there is no such layer.
        """
        return max([1, *(each.directions for each in self.layers if each.pixels and each.fixed)])

    @property
    def directions(self) -> int:
        """Images times steps, at least: the directions in any linear layer."""
        return max([1, *(each.directions for each in self.layers)])

    @property
    def one_input(self) -> bool:
        """Whether some layer's update can be that of one input alone."""
        return any(each.alone for each in self.layers)

    @property
    def blends(self) -> list[LayerInput]:
        """Layers whose update is that of one input or of several that are alike to them, where
        none is that of one alone.
        """
        if self.one_input:
            return []
        told = [each for each in self.layers if each.values is not None and each.rank == 1]
        return [each for each in told if each.scaled and not each.signs]

    @property
    def shown(self) -> list[str]:
        """The layers' inputs that stand in the update, in sentences."""
        return [*filter(None, (each.told for each in self.layers)), *map(str, self.noisy)]

    @property
    def leaked(self) -> list[str]:
        """Those of them that are one input's, or a mean of several that are nearly the same."""
        return [each.sentence or "" for each in self.layers if each.alone]

    @property
    def suspicion(self) -> str | None:
        """What the images that stand in the update say against ``normalisation``, in a sentence."""
        said = (
            pictures.suspicion(
                each.image,
                self.normalisation,
                error=each.error * float(each.image.double().square().mean().sqrt()),
                mixed=not each.alone,
            )
            for each in self.layers
            if each.image is not None
        )
        return next(filter(None, said), None)

    @property
    def sentences(self) -> Iterator[str]:
        """What to say of it."""
        if self.swapped:
            yield (
                "have the two files changed places? the last bias moved as cross-entropy would "
                "move it backwards; if they have, give them the other way round: what follows is "
                "wrong then"
            )
        if self.unmoved:
            yield (
                f"{len(self.unmoved)} of {self.num_parameters} tensors did not change and say "
                f"nothing: {_some(self.unmoved)}"
            )
        if self.last_alone:
            yield (
                "the last layer alone moved: its update tells no more than its inputs and the "
                "labels, and of an image no more than what its inputs tell"
            )
        yield from self.invented
        yield from filter(None, (each.sentence for each in self.layers))
        yield from map(str, self.noisy)
        yield from filter(None, [self.suspicion])
        if self.unread is not None:
            yield f"the update cannot be read at a first look: {self.unread}"
        elif 0 < self.num_classes <= 2 and self.directions == 1:
            outputs = "one output" if self.num_classes == 1 else "two classes"
            yield (
                f"with {outputs} any number of images and steps may leave the last layer such an "
                "update: neither it nor the learning rate can be told"
            )
        elif self.optimizer != "several steps":
            # signs do not tell how many images left them
            alike = ", or on several of one class" if self.kin == "adam" else ""
            yield (
                f"the update looks like one step of {self.optimizer} on one image{alike}, "
                f"learning rate {self.learning_rate:.3g} if its loss is plain cross-entropy"
            )
        else:
            unread = (
                "one step of which rounding leaves too little"
                if self.coarse
                else "one step whose gradients are too large to read"
            )
            more = f", or {unread}" if self.coarse or self.kin == "adam" else ""
            several = "several steps, several images, another loss, another optimizer"
            changed = "entries that were changed (noise, quantising, sparsifying, clipping)"
            yield f"the update looks like {self.kin} or its kin: {several}, {changed}{more}"


def first_look(seen: Observation, num_images: int, coarse: dict[str, torch.dtype]) -> Look:
    """Look at an update.

    Parameters
    ----------
    seen
        What the observer sees.
    num_images
        In the client's step, as far as known.
    coarse
        {name: half precision that a tensor of the weights was rounded to}.

    Notes
    -----
    Whatever a user's network raises is ``unread``.
    """
    moved = [bool(layer.any()) for layer in seen.delta]
    told = [name for name, did in zip(seen.parameter_names, moved) if did]
    about: dict[str, Any] = {
        "unmoved": [name for name, did in zip(seen.parameter_names, moved) if not did],
        "last_alone": set(seen.parameter_names) > set(seen.head.names) >= set(told),
        "invented": _invented(seen),
        "numbers": sum(int((layer != 0).sum()) for layer in seen.delta),
        "num_parameters": len(moved),
        "num_classes": seen.num_classes,
        "coarse": bool(coarse),
        "normalisation": preprocessing.told_to(seen.model),
    }
    try:
        layers = inputs.layer_inputs(seen, coarse)
        noisy = noisy_inputs(seen, layers)
        found = recognise.recognise(seen)
    except Exception as why:
        return Look(**about, swapped=_swapped(seen, num_images), unread=sentence(why))
    linear = any(each.linear for each in layers)  # entries changed one by one leave full rank
    kin = "adam" if found.share >= recognise.SIGN_LIKE and not linear else "sgd"
    noisy = [] if kin == "adam" else noisy  # its leading direction is none of an input
    look = Look(**about, kin=kin, layers=layers, noisy=noisy)
    look = replace(look, swapped=_swapped(seen, max(num_images, look.images)))
    if not (linear and found.optimizer in BY_ENTRIES):
        look = replace(look, optimizer=found.optimizer, learning_rate=found.learning_rate)
    return replace(look, optimizer="several steps") if look.directions > 1 else look


def _swapped(seen: Observation, num_images: int) -> bool:
    """Whether the last bias moved as after minus before would: the classes of so many images rise
    in it, and all others fall.
    """
    bias = seen.head.delta_bias
    balanced = abs(float(bias.sum())) <= UNBALANCED * float(bias.abs().sum())  # as of a softmax
    return balanced and bool((bias > 0).sum() <= num_images < (bias < 0).sum())


def _invented(seen: Observation) -> list[str]:
    """What may have been made up to fit the network: entries that stood still beside others."""
    moved = {name for name, delta in seen.delta_by_name.items() if delta.any()}
    still = [name for name in seen.parameter_names if name not in moved]
    biases = [n for n in still if n.endswith("bias") and f"{n[:-4]}weight" in moved]
    norms = {
        f"{name}.{each}"
        for name, module in seen.model.named_modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm)
        for each in ("weight", "bias")
    }
    said = []
    for what, names in (("biases", biases), ("batch norm's", [n for n in still if n in norms])):
        if names:
            said.append(
                f"{what} {_some(names)} did not move, though other weights did: the client did "
                "not train them, or a normalisation behind them takes their move away (searches "
                "leave them out); or they were invented to fit the network, and then no search "
                "finds the image, until the network is the client's own"
            )
    return said


def sentence(error: BaseException) -> str:
    """An error in one line; its kind too, where it is none of ours."""
    line = next(iter(str(error).splitlines()), "")
    if isinstance(error, (ValueError, torch.linalg.LinAlgError)) and line:
        return line
    return f"{type(error).__name__}: {line}" if line else type(error).__name__


def _some(names: list[str]) -> str:
    shown = ", ".join(repr(name) for name in names[:4])
    return shown if len(names) <= 4 else f"{shown} and {len(names) - 4} more"
