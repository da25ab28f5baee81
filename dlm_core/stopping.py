"""When a search ends, and with which of its points."""

import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch

from dlm_core import check
from dlm_core.results import Status

DESCENT = 1e-5  # of the start's misfit: where any image fits well, fitting well is no answer


def by_loss(loss: float) -> tuple[bool, float]:
    """The key that sorts losses, NaN after all others."""
    return math.isnan(loss), loss


def rank(status: Status, loss: float) -> tuple[bool, bool, float]:
    """The key that sorts ends of a search: what has converged comes first, since losses of DLM at
    different k cannot be compared; then by loss.
    """
    return (status is not Status.CONVERGED, *by_loss(loss))


@dataclass(frozen=True, kw_only=True)
class StopRule:
    """When a search ends, and with which of its points.

    Attributes
    ----------
    max_evaluations
        Budget of each restart.
    max_iterations
        Budget in steps of the optimizer, each of one evaluation or several; None for no other
        budget than that of evaluations, which ends a search in any case.
    whole_budget
        True as in the released code: tolerance and patience are not asked, and the last point is
        returned instead of the best one.
    tolerance
        Relative misfit ‖g - d‖²/‖d‖² at which the search has converged, if it is also a
        hundred-thousandth of the start's; or the one that rounding of the transmitted weights
        leaves at best.
    patience
        The search has stalled when this many evaluations lower the loss by less than 5 %.

    Raises
    ------
    ValueError
        For a number out of range.
    """

    max_evaluations: check.Count = 400
    tolerance: check.NonNegative = 1e-6
    patience: check.Count = 50
    max_iterations: check.Count | None = None
    whole_budget: bool = False

    def __post_init__(self) -> None:
        check.fields(self)


class Trace:
    """What a search has met, its best point, and the verdict on where it stands.

    Parameters
    ----------
    rule
        When it ends.
    floor
        The misfit below which nothing is explained any better.
    descent
        The part of the start's misfit that it has to fall to.

    Attributes
    ----------
    losses, ks, history
        Of ``SearchEvidence``.
    loss, best
        The lowest one, and the variables that have it.
    status
        The verdict once it has ended.
    """

    def __init__(self, rule: StopRule, floor: float, descent: float) -> None:
        self.rule = rule
        self.floor, self.descent = floor, descent
        # misfit at which it has converged, known from the first evaluation on
        self.enough: float | None = None
        self.losses: list[float] = []
        self.lowest: list[float] = []
        self.history: list[tuple[int, torch.Tensor]] = []
        self.ks: list[float] = []
        self.loss = math.inf
        self.best: dict[str, torch.Tensor] = {}
        self.status = Status.WHOLE if rule.whole_budget else Status.BUDGET

    def add(self, loss: float, misfit: float, finite: bool, here: Callable[[], dict]) -> bool:
        """Note an evaluation.

        Parameters
        ----------
        loss, misfit
            What it came to.
        finite
            Whether the gradient is.
        here
            A copy of the variables.

        Returns
        -------
        bool
            Whether the search has ended; ``status`` says how.
        """
        if self.enough is None:
            self.enough = max(self.floor, min(self.rule.tolerance, self.descent * misfit))
        finite = finite and math.isfinite(loss)
        if finite and loss < self.loss:
            self.loss, self.best = loss, here()
        self.losses.append(loss)
        self.lowest.append(self.loss)
        verdict = self._verdict(finite, misfit)
        self.status = verdict or self.status
        return verdict is not None

    def _verdict(self, finite: bool, misfit: float) -> Status | None:
        """The reason to stop now, or None."""
        if not finite:
            return Status.DIVERGED
        if self.rule.whole_budget:
            return Status.WHOLE if len(self.losses) >= self.rule.max_evaluations else None
        assert self.enough is not None  # set before the first verdict
        if misfit <= self.enough:
            return Status.CONVERGED
        patience = self.rule.patience
        if len(self.losses) > patience and self.lowest[-1] > 0.95 * self.lowest[-1 - patience]:
            far = statistics.median(self.losses[-patience:]) > 10 * self.loss
            return Status.DIVERGED if far else Status.STALLED
        return Status.BUDGET if len(self.losses) >= self.rule.max_evaluations else None
