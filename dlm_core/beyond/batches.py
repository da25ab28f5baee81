"""Exact recovery of a batch through a ReLU layer: images, labels and learning rate.

No search over pixels is made. SPEAR (Dimitrov et al., NeurIPS 2024): where the first layer is
z = W x + b with ReLU, a client that trains on r images changes::

    Δ_W = Σ_i d_i x_iᵀ,   Δ_b = Σ_i d_i,   with d_i = 0 in every unit that image i leaves off.

d_i is the trace of image i. Δ_W has rank r where neither images nor traces combine others, so its
singular vectors give U [m, r] with d_i ∝ U q_i for unknown q_i. Nearly every combination of columns
of U has no zeros at all; the r of them with the most zeros are the traces. Δ_b fixes their lengths,
and x follows by least squares.

Rank counts directions, not images: an image and its darker copy, or an image and black, share one,
and what is found there is neither of them. One SGD step on what was found then does not explain the
rest of the update, which is what χ² tests; and Δ_b is not the sum of the traces, after any number
of steps.

SPEAR samples rows of U and takes null vectors, in time exponential in r, and is told gradients.
Here the zeros are found by minimising ``Σ_units |u q|^½``, which goes on where sampling stops, and
from the images at hand: what the model shows of which units they leave off says where their traces
vanish. What counts as zero is read off the noise of two snapshots. ``sparse_traces`` finds the
traces, ``one_step`` tests the step.
"""

import math
import time
from dataclasses import dataclass, replace
from enum import StrEnum
from functools import partial

import torch

from dlm_core import check, records
from dlm_core.beyond import one_step, preprocessing, sparse_traces
from dlm_core.beyond.chance import draws_from_seed
from dlm_core.beyond.rounding import CHI2_RANGE, TWO_CLASSES
from dlm_core.beyond.sparse_traces import ZERO
from dlm_core.observation import Observation
from dlm_core.results import ClientEstimate, Evidence, Explains, Reconstruction, Status
from dlm_core.threads import for_network

AGREES = 0.8  # share of units, of images that no step confirms; mixtures have about two thirds


class Reason(StrEnum):
    """Why a batch was recovered, or was not."""

    EXPLAINED = "explained"
    UNTRACED = "explained, others without a trace"
    UNTESTED = "untested"
    NOT_ONE_STEP = "not one step"
    SHARED = "shared directions"
    UNMOVED = "unmoved"
    TOO_FEW_UNITS = "too few units"
    UNSETTLED = "unsettled"


# Each image found is one of the client's; where it was no one step, by its assumptions.
VOUCHED_FOR = (Reason.EXPLAINED, Reason.UNTRACED, Reason.NOT_ONE_STEP)


@dataclass(frozen=True, kw_only=True)
class Traces(Evidence):
    """The evidence of a batch: the units in which each image left a trace. ``losses`` is [chi2].

    Attributes
    ----------
    recovered
        [B] whether the attack shows the image: the zeros of the traces settle it, and either one
        step explains the update or each image's own ReLU pattern agrees with the units in which it
        left a trace. Where they do not settle it, its own pattern agrees wholly.
    agreement
        [B] the share of units in which it does; 0 for an image that was not found at all.
    image_error
        [B] standard error of a pixel, root mean square over the image.
    num_recovered
        How many images were.
    rank
        Of Δ_W, at most ``num_images``: how many directions it has. Several images may share one.
    units
        Of the first layer, that moved by more than rounding.
    chi2
        χ²/N of one SGD step on the recovered images against the noise, 1 where it holds; NaN where
        images are missing.
    two_classes
        Whether the network tells two classes apart, where χ² tests less.
    reason
        Why.
    """

    recovered: torch.Tensor
    agreement: torch.Tensor
    image_error: torch.Tensor
    num_recovered: int
    rank: int
    units: int
    chi2: float
    two_classes: bool
    reason: Reason

    @property
    def explains(self) -> Explains:
        """All of the update where every image was recovered and shares its direction with none."""
        if self.recovered.all() and self.reason is not Reason.SHARED:
            return Explains.FULLY
        return Explains.PARTLY if self.recovered.any() else Explains.LITTLE

    @property
    def verdict(self) -> str:
        """How many images were recovered, or shown without a test that confirms them, and why."""
        sure = (Reason.EXPLAINED, Reason.UNTRACED)
        done = "recovered" if self.reason in sure else "shown"
        return f"{self.num_recovered} of {len(self.recovered)} images {done}: {self._why()}"

    def _why(self) -> str:
        found = f"chi2/N {self.chi2:.3g}, expected 1"
        explained = f"one SGD step on these images explains the update ({found})"
        if self.chi2 <= CHI2_RANGE[0]:
            explained += "; the noise was overstated, and with it the errors"
        if self.two_classes:
            explained += f"; {TWO_CLASSES}"
        return {
            Reason.EXPLAINED: explained,
            Reason.UNTRACED: f"{explained}; the others left no trace",
            Reason.UNTESTED: (
                "the noise that is assumed would explain the whole update, so nothing was tested "
                f"({found}): η is open, the labels are a guess"
            ),
            Reason.NOT_ONE_STEP: (
                f"it was not one SGD step on these images ({found}): η is open, the labels are a "
                "guess. The zeros of the first layer's update single them out as its directions; "
                "each is an image where no two images share one and no more images took part than "
                "directions; as bright as shown where weights and biases moved at one rate"
            ),
            Reason.SHARED: (
                f"it was not one SGD step on these images ({found}), and the first layer's bias "
                "moved otherwise than by their traces: by another rule, or a direction stands for "
                "several images, as for an image and its darker copy or black; none need be as "
                "shown"
            ),
            Reason.UNMOVED: "no unit of the first layer moved by more than rounding",
            Reason.TOO_FEW_UNITS: (
                f"Δ has rank {self.rank}, {self.units} units moved; "
                "it takes more than twice as many units to tell images apart"
            ),
            Reason.UNSETTLED: (
                f"Δ has rank {self.rank}, and the zeros of {self.units} units do not settle which "
                "of its mixtures are images; those are shown that agree with their own pattern of "
                "zeros, without labels and learning rate"
            ),
        }[self.reason]


@records.attack(
    "exact_batch",
    title="exact, batch",
    colour=3,
    marker="H",
    assumes=("the number of images, if some left no trace",),
    client="several images, a network that begins with Linear and ReLU",
    audited=3,
    scene={"network": "mlp"},
)
@check.arguments
@draws_from_seed
def recover_batch(
    seen: Observation,
    *,
    num_images: check.Count | None = None,
    seed: check.Whole = 0,
    max_rounds: check.Count = 50,
) -> Reconstruction:
    """Recover the images of one client's update; and labels and learning rate, if it was one step.

    Parameters
    ----------
    seen
        What the observer sees.
    num_images
        B >= 1 where the observer knows it. None takes each direction of Δ_W for an image: one that
        the model already classified without error leaves no trace, and η scales with B.
    seed
        Of the starts.
    max_rounds
        Of the descent, at least 1; it ends when the zeros settle every trace.

    Returns
    -------
    Reconstruction
        Its evidence are ``Traces``. Images that were not found are grey, with label -1.

    Raises
    ------
    ValueError
        For counts below 1; and, naming the layer, for a model that is not a stack that begins with
        nn.Linear (with bias) and nn.ReLU.

    Notes
    -----
    Several local steps, momentum and mini-batches keep Δ_W of this form as long as units stay off,
    so images are recovered from them too.
    """
    began = time.perf_counter()
    network, told = preprocessing.bare(seen)
    with for_network(seen.model):
        outcome = _recover(network, num_images, max_rounds, seed)
        found = outcome.as_reconstruction(network, began)
    return found if told is None else _in_pixels(found, told)


def _in_pixels(found: Reconstruction, told: preprocessing.Normalisation) -> Reconstruction:
    """The same of images that the network saw normalised."""
    traces = found.evidence
    assert isinstance(traces, Traces)
    images = told.pixels(found.images)
    images[~traces.recovered] = 0.5
    evidence = replace(traces, image_error=traces.image_error * told.error)
    return replace(found, images=images, evidence=evidence)


def _recover(seen: Observation, num_images: int | None, max_rounds: int, seed: int) -> "_Outcome":
    moved = sparse_traces.moved_units(seen)
    units = len(moved.update)
    if units == 0:
        return _Outcome(reason=Reason.UNMOVED, num_images=num_images or 1)
    decomposed = sparse_traces.decompose(moved)
    rank = min(decomposed.rank, num_images or len(decomposed.values))
    if not 0 < 2 * rank < units:
        total = num_images or max(rank, 1)
        return _Outcome(reason=Reason.TOO_FEW_UNITS, num_images=total, rank=rank, units=units)
    mixture, sigma = sparse_traces.mixture_of(moved, decomposed, rank)
    traces, certain = sparse_traces.find_traces(mixture, moved, max_rounds, seed)
    x = torch.linalg.lstsq(traces, moved.update).solution
    agreement, silent_units_fit = sparse_traces.patterns(moved, x, traces)
    if certain and silent_units_fit:
        error = sparse_traces.image_error(x, traces, sigma, moved.bias_sigma)
        shared = sparse_traces.bias_left(mixture, traces, moved) > ZERO**2
        return _explain(seen, num_images, x, agreement, error, units, shared)
    images = x.reshape(-1, *seen.image_shape)
    found = _Found(images=images, shown=agreement > 1 - 1 / units, agreement=agreement)
    total = num_images or rank
    return _Outcome(reason=Reason.UNSETTLED, num_images=total, rank=rank, units=units, found=found)


def _explain(
    seen: Observation,
    num_images: int | None,
    x: torch.Tensor,
    agreement: torch.Tensor,
    error: torch.Tensor,
    units: int,
    shared: bool,
) -> "_Outcome":
    """With all images at hand, read labels and η off the last layer and test one SGD step."""
    rank = len(x)
    images = x.reshape(-1, *seen.image_shape)
    labels, counts = one_step.labels_and_counts(seen, images)
    once = torch.arange(rank, device=x.device)
    if counts.sum() > (num_images or 10 * rank):
        counts = torch.ones_like(counts)
    each = torch.repeat_interleave(once, counts)
    step = one_step.fitted(seen, images[each], labels[each], error[each])
    most = CHI2_RANGE[1]
    explained = step.rate > 0 and step.chi2 <= most
    tested = step.chi2_of_noise > most
    if not explained and num_images is None:  # then nothing is known of copies either
        each = once
    total = num_images or len(each)
    if not tested:
        reason = Reason.UNTESTED
    elif explained:
        reason = Reason.UNTRACED if total > len(each) else Reason.EXPLAINED
    else:
        reason = Reason.SHARED if shared else Reason.NOT_ONE_STEP
    # where one image is a mixture, the others may be
    trusted = (explained and tested) or bool((agreement > AGREES).all())
    # an image without a trace has its share in the client's mean loss
    rate = step.rate * (total / len(each))
    return _Outcome(
        reason=reason,
        num_images=total,
        rank=rank,
        units=units,
        found=_Found(
            images=images[each],
            shown=torch.full_like(each, trusted, dtype=torch.bool),
            agreement=agreement[each],
            error=error[each],
            labels=labels[each],
        ),
        learning_rate=rate if explained and tested else None,
        chi2=step.chi2,
    )


@dataclass(frozen=True, kw_only=True)
class _Found:
    """The k images at hand, and what is known of each.

    Attributes
    ----------
    images
        [k, C, H, W].
    shown
        [k] whether the attack stands by it.
    agreement
        [k] of its ReLU pattern with its trace.
    error
        [k] standard error of a pixel; None where unknown.
    labels
        [k] class indices; None where unknown.
    """

    images: torch.Tensor
    shown: torch.Tensor
    agreement: torch.Tensor
    error: torch.Tensor | None = None
    labels: torch.Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class _Outcome:
    """How a recovery of ``num_images`` images ended; the other fields are those of ``Traces``."""

    reason: Reason
    num_images: int
    rank: int = 0
    units: int = 0
    found: _Found | None = None
    learning_rate: float | None = None
    chi2: float = math.nan

    def as_reconstruction(self, seen: Observation, began: float) -> Reconstruction:
        """Put the images that are shown in their place, and grey elsewhere."""
        each = partial(self._each, device=next(seen.model.parameters()).device)
        recovered = each("shown", False, torch.bool)
        canvas = each("images", 0.5, torch.float64, *seen.image_shape)
        canvas[~recovered] = 0.5
        number = int(recovered.sum())
        evidence = Traces(
            losses=[self.chi2],
            loss=self.chi2,
            recovered=recovered,
            agreement=each("agreement", 0.0, torch.float64),
            image_error=each("error", math.inf, torch.float64),
            num_recovered=number,
            rank=self.rank,
            units=self.units,
            chi2=self.chi2,
            two_classes=seen.num_classes == 2,
            reason=self.reason,
        )
        return Reconstruction(
            images=canvas,
            labels=each("labels", -1, torch.int64),
            status=Status.CONVERGED if number == self.num_images else Status.STALLED,
            # with two classes a blend of several may be explained as well
            vouched=recovered & (self.reason in VOUCHED_FOR) & (seen.num_classes != 2),
            evidence=evidence,
            client=ClientEstimate(learning_rate=self.learning_rate),
            seconds=time.perf_counter() - began,
        )

    def _each(
        self, name: str, otherwise: float, dtype: torch.dtype, *shape: int, device: torch.device
    ) -> torch.Tensor:
        """[B, *shape] of one field of ``found``, ``otherwise`` where there is nothing."""
        tensor = torch.full((self.num_images, *shape), otherwise, dtype=dtype, device=device)
        given = None if self.found is None else getattr(self.found, name)
        if given is not None:
            tensor[: len(given)] = given[: self.num_images]
        return tensor
