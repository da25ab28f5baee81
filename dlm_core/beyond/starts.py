"""What many starts of one search say: how many end at the best picture, and where the others end.

A search that ends twice at one picture may have found the only one, or one of a thousand. All
starts are one batch (``beyond.lanes``).
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from dlm_core import attacks, check, metrics
from dlm_core.observation import Observation
from dlm_core.results import Reconstruction

SEED = 10_007  # between starts, as between the restarts of ``search.reconstruct``


@dataclass(frozen=True, kw_only=True)
class Ends:
    """Where the starts ended.

    Attributes
    ----------
    found
        Each start's result, in the order of the starts.
    cluster
        [n], the number of the picture that each ended at; 0 is that of the lowest loss, 1 that of
        the lowest loss among the rest, and so on.
    """

    found: list[Reconstruction] = field(repr=False)
    cluster: torch.Tensor

    @property
    def best(self) -> Reconstruction:
        """The result of lowest loss."""
        return min(self.found, key=_loss)

    @property
    def share(self) -> float:
        """The part of all starts that ended at the best picture."""
        return float((self.cluster == 0).double().mean())

    @property
    def spread(self) -> float:
        """Root mean square distance, in pixels' units, of the pictures of those from their mean."""
        own = [each for each, cluster in zip(self.found, self.cluster) if cluster == 0]
        images = torch.stack([_in_order(each.images, self.best.images) for each in own])
        return float((images - images.mean(0)).square().mean().sqrt())

    @property
    def clusters(self) -> list[tuple[float, Reconstruction]]:
        """[(part of all starts, its result of lowest loss)] of each picture, in order."""
        kept = []
        for number in range(int(self.cluster.max()) + 1):
            own = [each for each, c in zip(self.found, self.cluster) if c == number]
            kept.append((len(own) / len(self.found), min(own, key=_loss)))
        return kept


@check.arguments
def survey(
    seen: Observation,
    attack: Callable[..., Any] = attacks.dlm_plus,
    *,
    starts: check.Count = 100,
    seed: check.Whole = 0,
    alike: check.Finite = 25.0,
    **options: Any,
) -> Ends:
    """Run a search from many starts, each to its end.

    Parameters
    ----------
    seen
        What the observer sees.
    attack
        One that takes a list of seeds, as those of ``attacks``.
    starts
        How many.
    seed
        Of the first.
    alike
        PSNR in dB from which two pictures count as the same.
    **options
        Of the attack; ``restarts`` is not among them.

    Raises
    ------
    ValueError
        For arguments outside their range, and for ``restarts``.
    """
    if "restarts" in options:
        raise ValueError(f"restarts is {options['restarts']}; each of the starts is one search")
    found = attack(seen, seed=[seed + SEED * i for i in range(starts)], **options)
    cluster = torch.zeros(starts, dtype=torch.long)
    pictures: list[torch.Tensor] = []
    for i in sorted(range(starts), key=lambda i: _loss(found[i])):
        images = found[i].images
        near = (n for n, each in enumerate(pictures) if _psnr(images, each) >= alike)
        cluster[i] = next(near, len(pictures))
        if cluster[i] == len(pictures):
            pictures.append(images)
    return Ends(found=found, cluster=cluster)


def _loss(found: Reconstruction) -> float:
    return found.evidence.loss


def _psnr(images: torch.Tensor, others: torch.Tensor) -> float:
    return float(metrics.psnr(_in_order(images, others), others, data_range=1.0))


def _in_order(images: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """A batch's images in the order of those that they are the most like."""
    return images if len(images) == 1 else images[metrics.match(images, others)]
