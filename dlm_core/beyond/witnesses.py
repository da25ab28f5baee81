"""What later layers saw, held against an image or the input of an earlier layer."""

from collections.abc import Iterable, Mapping
from typing import TypeVar

import torch
from torch.nn import functional as F

from dlm_core.beyond.tracing import Traced

ABSENT, ALIKE = 1e-3, 0.99  # of two inputs: what is taken for zero, and the cosine of the same
SAME = 0.02  # of two inputs, relative: what half precision leaves between them, and more

T = TypeVar("T")


def contradict(traced: Traced, image: torch.Tensor, inputs: Mapping[str, torch.Tensor]) -> bool:
    """Whether an image gives other inputs of later layers than these, which are known up to their
    length; where ReLU left nothing, and where chance reaches in training, they say nothing.

    Parameters
    ----------
    traced
        The network.
    image
        [1, C, H, W].
    inputs
        {later layer: its input [features]}.
    """
    passes, sure = _without_chance(traced, image, inputs)
    return bool(sure) and not any(
        all(_alike(passed[name][0].flatten(), each) for name, each in sure.items())
        for passed in passes
    )


def agree(
    traced: Traced, image: torch.Tensor, inputs: Mapping[str, tuple[torch.Tensor, bool]]
) -> bool | None:
    """Whether later layers saw what this image leaves, but for what half precision explains; None
    where none speaks: layers that chance reaches in training say nothing.

    Parameters
    ----------
    traced
        The network.
    image
        [1, C, H, W].
    inputs
        {later layer: (its input [features], whether its length is known)}.
    """
    passes, sure = _without_chance(traced, image, inputs)
    return _any_leaves(passes, sure) if sure else None


def leads_elsewhere(
    traced: Traced,
    name: str,
    values: torch.Tensor,
    inputs: Mapping[str, tuple[torch.Tensor, bool]],
) -> bool:
    """Whether later layers saw what another input of this layer leads to.

    Parameters
    ----------
    traced, inputs
        As ``agree`` takes them.
    name, values
        The layer, and its input [features].
    """
    try:
        behind = traced.behind(name, values) - {name}
        with traced.instead(name, values[None]):
            later = {each: inputs[each] for each in behind if each in inputs}
            return bool(later) and agree(traced, traced.grey(), later) is False
    except Exception:  # whatever a user's network raises
        return False


def _without_chance(
    traced: Traced, image: torch.Tensor, inputs: Mapping[str, T]
) -> tuple[list[dict[str, list[torch.Tensor]]], dict[str, T]]:
    """(what passes through the layers, as the client trained and as its network answers; those
    ``inputs`` that chance does not reach).
    """
    answered = traced.passed(image)
    try:
        train, again = (traced.passed(image, train=True, seed=seed) for seed in (0, 1))
    except Exception:  # one image in batch norm
        train = again = answered
    every = train.keys() & again.keys() & answered.keys()
    sure = {
        name: each
        for name, each in inputs.items()
        if name in every and train[name][0].equal(again[name][0])
    }
    return [train, answered], sure


def _alike(found: torch.Tensor, expected: torch.Tensor) -> bool:
    used = expected.abs() > ABSENT * expected.abs().max()
    return bool(F.cosine_similarity(found[used], expected[used], 0).abs() > ALIKE)


def _any_leaves(
    passes: Iterable[Mapping[str, list[torch.Tensor]]],
    inputs: Mapping[str, tuple[torch.Tensor, bool]],
) -> bool:
    """Whether these are the inputs of layers in one of the passes."""
    return any(
        all(_same(passed[name][0].flatten(), *each) for name, each in inputs.items())
        for passed in passes
    )


def _same(found: torch.Tensor, expected: torch.Tensor, scaled: bool) -> bool:
    """Whether two inputs are one but for half precision, and but for a factor where the length is
    not known.
    """
    if not scaled:
        expected = (found @ expected) / expected.square().sum() * expected
    return bool((found - expected).norm() <= SAME * expected.norm())
