"""A network and the snapshots that fit it: one of ours by name, or a user's own."""

import copy
import itertools
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn

from dlm_core import models
from dlm_core.harness import files
from dlm_core.harness.look import sentence
from dlm_core.weights import StateDict


class Fitted(NamedTuple):
    """Two snapshots, and a network that they fit.

    Attributes
    ----------
    network
        With weights of its own, not yet those of a snapshot.
    before, after
        State dicts in the network's order.
    notes
        What was done to the files, in sentences.
    where
        What to add to an error of the network's.
    """

    network: nn.Module
    before: StateDict
    after: StateDict
    notes: list[str]
    where: str


def fitted(
    before: files.Given,
    after: files.Given,
    model: str | nn.Module,
    image_shape: Sequence[int],
    num_classes: int | None,
) -> Fitted:
    """Read two snapshots for a network.

    Parameters
    ----------
    before, after
        As ``files.snapshots`` takes them.
    model
        A network of a user's own, which is copied, or a name of ``models.build``.
    image_shape, num_classes
        Of a network by name; None: as many classes as in ``before``.

    Raises
    ------
    ValueError
        As ``files.snapshots`` does, and for a network that cannot be copied.
    """
    where = ""
    expected: Any
    if isinstance(model, nn.Module):
        model = copied(model)
    if isinstance(model, str):
        where = f" (image_shape is {image_shape}, num_classes {num_classes or 'as in before'})"
        expected = partial(_shapes_for, model, image_shape, num_classes)
    else:
        expected = model.state_dict(keep_vars=True)  # in which parameters are marked as such
    try:
        before, after, notes = files.snapshots(before, after, expected)
    except files.Unfit as why:
        raise ValueError(f"{why}{where}") from None
    if isinstance(model, str):
        model = models.build(
            model, image_shape, num_classes or _classes_of(model, image_shape, before)
        )
    return Fitted(model, before, after, notes, where)


def copied(model: nn.Module) -> nn.Module:
    """A copy of a user's network, without what ``torch.compile`` and parallel training wrap around
    it; ValueError, in one sentence, where there is none.
    """
    model = _unwrapped(model)
    kind = type(model).__name__
    if isinstance(model, torch.jit.ScriptModule):
        raise ValueError(
            f"the model ({kind}) is compiled by torch.jit, and its layers cannot be followed; "
            "give the network in Python that it was made from"
        )
    entries = itertools.chain(model.named_parameters(), model.named_buffers())
    complex_s = next((name for name, w in entries if w.is_complex()), None)
    if complex_s is not None:
        raise ValueError(
            f"the model ({kind}) has complex numbers in {complex_s!r}; an audit takes real ones: "
            "hold them as pairs, by torch.view_as_real"
        )
    if any(nn.parameter.is_lazy(w) for w in (*model.parameters(), *model.buffers())):
        raise ValueError(
            f"the model ({kind}) has lazy layers without weights; call it once on an image"
        )
    try:
        return copy.deepcopy(model)
    except Exception as why:  # a lock, an open file, a tensor kept from a forward pass
        raise ValueError(
            f"the model ({kind}) cannot be copied ({sentence(why)}); "
            "give one that has not been called yet, and no more than its layers"
        ) from None


def _unwrapped(model: nn.Module) -> nn.Module:
    """The network itself: wrappers are neither followed nor needed here."""
    parallel = (nn.DataParallel, nn.parallel.DistributedDataParallel)
    while True:
        inner = model.module if isinstance(model, parallel) else getattr(model, "_orig_mod", None)
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def _shapes_for(
    model: str, image_shape: Sequence[int], num_classes: int | None, known: Mapping[str, Any]
) -> StateDict:
    """The same as ``_shapes``, with the number of classes that ``known`` entries show."""
    return _shapes(model, image_shape, num_classes or _classes_of(model, image_shape, dict(known)))


def _shapes(model: str, image_shape: Sequence[int], num_classes: int) -> StateDict:
    """The state dict of a network by name, without its numbers where the network allows."""
    try:
        try:
            with torch.device("meta"):
                return models.build(model, image_shape, num_classes).state_dict()
        except (NotImplementedError, RuntimeError):  # a user's network may need the numbers
            return models.build(model, image_shape, num_classes).state_dict()
    except ValueError:
        raise
    except Exception as why:
        raise ValueError(
            f"model {model!r} cannot be made for image_shape {image_shape} and {num_classes} "
            f"classes ({sentence(why)})"
        ) from None


def _classes_of(model: str, image_shape: Sequence[int], before: StateDict) -> int:
    """The number of classes in a snapshot: where networks of more of them are larger."""
    one, more = (_shapes(model, image_shape, count) for count in (100, 101))
    for name, shape in ((name, w.shape) for name, w in one.items() if name in before):
        for axis, (size, larger) in enumerate(zip(shape, more[name].shape)):
            if size != larger and before[name].ndim > axis:
                return before[name].shape[axis]
    return 100
