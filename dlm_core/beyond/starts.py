"""Many starts of one search as evidence: how many end at the best picture, and where others end.

Two searches that end at one picture may have found the only one that explains the update, or one of
many. All starts are one batch (``beyond.lanes``). That most end at one picture says that the search
finds it easily; that no other picture explains the update is what speaks for it.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch

from dlm_core import attacks, check, metrics
from dlm_core.observation import Observation
from dlm_core.results import Reconstruction, Status
from dlm_core.stopping import rank

SEED = 10_007  # between starts, as between the restarts of ``search.reconstruct``


@dataclass(frozen=True, kw_only=True)
class Ends:
    """Where the starts ended.

    Attributes
    ----------
    found
        Each start's result, in the order of the starts.
    cluster
        [n], the number of the picture that each ended at; 0 is the best one, 1 the best among the
        rest, and so on. A result that has converged is better than one that has not, and then the
        one of lower loss.
    """

    found: list[Reconstruction] = field(repr=False)
    cluster: torch.Tensor

    @cached_property
    def clusters(self) -> list[Reconstruction]:
        """Of each picture, the best result that ended there."""
        return [min(self._of(number), key=_rank) for number in range(int(self.cluster.max()) + 1)]

    @property
    def counts(self) -> list[int]:
        """How many starts ended at each picture."""
        return self.cluster.bincount().tolist()

    @cached_property
    def best(self) -> Reconstruction:
        """The best result."""
        return self.clusters[0]

    @property
    def share(self) -> float:
        """The part of all starts that ended at the best picture."""
        return self.counts[0] / len(self.found)

    @property
    def spread(self) -> float:
        """Root mean square distance of these from their mean, in pixels' units."""
        images = torch.stack([self.ordered(each) for each in self._of(0)])
        return float((images - images.mean(0)).square().mean().sqrt())

    @property
    def explaining(self) -> int:
        """How many pictures explain the update as well as one at which a search converged: where
        there are several, the update does not tell which is the client's.
        """
        converged = (each for each in self.found if each.status is Status.CONVERGED)
        enough = max(map(_loss, converged), default=-math.inf)
        return sum(_loss(each) <= enough for each in self.clusters)

    def ordered(self, found: Reconstruction) -> torch.Tensor:
        """A result's images, each in the place of the best one's that it is the most like."""
        return _in_order(found.images, self.best.images)

    def _of(self, number: int) -> list[Reconstruction]:
        return [each for each, cluster in zip(self.found, self.cluster) if cluster == number]


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
    for i in sorted(range(starts), key=lambda i: _rank(found[i])):
        images = found[i].images
        near = (n for n, each in enumerate(pictures) if _psnr(images, each) >= alike)
        cluster[i] = next(near, len(pictures))
        if cluster[i] == len(pictures):
            pictures.append(images)
    return Ends(found=found, cluster=cluster)


def _loss(found: Reconstruction) -> float:
    return found.evidence.loss


def _rank(found: Reconstruction) -> tuple[bool, bool, float]:
    return rank(found.status, _loss(found))


def _psnr(images: torch.Tensor, others: torch.Tensor) -> float:
    return float(metrics.psnr(_in_order(images, others), others, data_range=1.0))


def _in_order(images: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """A batch's images in the order of those that they are the most like."""
    return images if len(images) == 1 else images[metrics.match(images, others)]
