"""The likelihood of an image and a learning rate, given one update, and its fit by Gauss-Newton.

    Δ = η (g(x) + λ W) + noise,    unknown: image x, learning rate η, and weight decay λ where asked
    for.

The unknown x is the image [n]. In the fit of a first linear layer the client's errors in its δ
follow [O] (float32 arithmetic; all its row shares each). log η is fitted, so that η stays positive.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch

from dlm_core.beyond import information
from dlm_core.beyond.recursion import PRIOR_MEAN, PRIOR_VARIANCE, Tensors, pull_back, signals
from dlm_core.beyond.rounding import Weighting
from dlm_core.beyond.stacks import Layer
from dlm_core.results import Status

CONVERGED = 0.01  # standard errors per unknown: the length of a step too short to matter
SHORTEST = 1e-4  # part of a step below which it leads nowhere
LARGEST_LOG = 10.0  # by which one step may raise log η


class Start(NamedTuple):
    """Where a fit begins: x, η and λ."""

    x: torch.Tensor
    eta: float
    decay: float = 0.0


@dataclass(frozen=True)
class Point:
    """The fit at one (x, η, λ).

    Attributes
    ----------
    x, eta, decay
        The point.
    chi2, expected
        χ² there, and what it would be at the truth.
    merit
        χ² plus the prior's term: what the fit lowers.
    slope, scale_slope
        Minus half the slope of ``merit`` in x [n], and in (log η, λ) [1 or 2].
    cross, scale
        The parts of the information matrix that concern (log η, λ): [n, 1 or 2] with x, [1 or 2, 1
        or 2] alone.
    """

    x: torch.Tensor
    eta: float
    decay: float
    chi2: float
    expected: float
    merit: float
    slope: torch.Tensor
    scale_slope: torch.Tensor
    cross: torch.Tensor
    scale: torch.Tensor

    @property
    def loss(self) -> float:
        """χ² over its expectation: 1 at the truth."""
        return self.chi2 / self.expected


class Step(NamedTuple):
    """A change of x [n], and of (log η, λ) [1 or 2]."""

    of_x: torch.Tensor
    of_scales: torch.Tensor


@dataclass(frozen=True)
class Problem:
    """What is to be explained.

    Attributes
    ----------
    layers, label
        The network, and the image's class.
    update
        Δ, one matrix per layer.
    weighting
        How much each of its entries counts.
    decays
        Whether λ is fitted.
    mean
        The prior's, of each entry of the image or of all: what it shows where no data do.
    prior_variance
        The prior's, of each entry of the image.
    """

    layers: Sequence[Layer]
    label: torch.Tensor
    update: Tensors
    weighting: Weighting
    decays: bool
    mean: float | torch.Tensor = PRIOR_MEAN
    prior_variance: float = PRIOR_VARIANCE

    @property
    def weights(self) -> Tensors:
        """Per layer 1/σ² of the update's entries, 0 for those not to be used."""
        return self.weighting.weights

    @property
    def expected(self) -> float:
        """χ² at the truth."""
        entries_used = sum(int((w > 0).sum()) for w in self.weights)
        return max(1.0, self.weighting.expected or entries_used)

    def above(self, first: int) -> "Problem":
        """The same for the layers from ``first`` on, whose input takes the place of the image."""
        weighting = replace(self.weighting, weights=self.weights[first:])
        above = replace(self, mean=PRIOR_MEAN, prior_variance=PRIOR_VARIANCE) if first else self
        return replace(
            above, layers=self.layers[first:], update=self.update[first:], weighting=weighting
        )

    def at(self, x: torch.Tensor, eta: float, decay: float) -> Point:
        """Evaluate χ² and its derivatives.

        Parameters
        ----------
        x
            [n] the image, or longer, as the module says.
        eta
            η > 0.
        decay
            λ.
        """
        (deltas, inputs), pull = pull_back(partial(signals, self.layers, self.label), x)

        def transpose(matrices: Tensors) -> torch.Tensor:
            """Jᵀ W times an update, J the update's Jacobian in x."""
            each = zip(self.layers, self.weights, matrices, deltas, inputs)
            back = [layer.gradient_transpose(w * m, d, u) for layer, w, m, d, u in each]
            return eta * pull(([d for d, _ in back], [u for _, u in back]))[0]

        gradient = self._gradient(deltas, inputs)
        per_decay = [eta * layer.weight for layer in self.layers]  # the update's slope in λ
        predicted = [eta * g + decay * w for g, w in zip(gradient, per_decay)]  # and in log η
        residual = [seen - p for seen, p in zip(self.update, predicted)]
        columns = [predicted, per_decay] if self.decays else [predicted]
        chi2 = float(self._dot(residual, residual))
        mean, precision = self._prior(x)
        return Point(
            x=x,
            eta=eta,
            decay=decay,
            chi2=chi2,
            expected=self.expected,
            merit=chi2 + float((precision * (x - mean).square()).sum()),
            slope=transpose(residual) + precision * (mean - x),
            scale_slope=self._project(columns, residual),
            cross=torch.stack([transpose(column) for column in columns], dim=1),
            scale=self._gram(columns),
        )

    def curvature(self, point: Point) -> information.Curvature:
        """The information about x at a point, η and λ granted."""
        return information.curvature(
            self.layers,
            self.label,
            self.weights,
            point.x,
            point.eta,
            self.weighting.error_variance,
            self.prior_variance,
        )

    def scales(self, x: torch.Tensor) -> tuple[float, float]:
        """(η, λ) that explain the update best, given x: weighted linear regression."""
        gradient = self._gradient(*signals(self.layers, self.label, x))
        columns = [gradient]
        if self.decays:
            columns.append([layer.weight for layer in self.layers])
        projected = self._project(columns, self.update)
        solution = torch.linalg.lstsq(self._gram(columns), projected).solution.tolist()
        eta = max(solution[0], 1e-12)
        decay = solution[1] / eta if self.decays else 0.0
        return eta, decay

    def _gradient(self, deltas: Tensors, inputs: Tensors) -> Tensors:
        return [layer.gradient(d, u) for layer, d, u in zip(self.layers, deltas, inputs)]

    def _prior(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(mean, precision) of each entry of x."""
        n = self.layers[0].size
        mean = torch.zeros_like(x)
        mean[:n] = self.mean
        precision = torch.full_like(x, 1 / self.prior_variance)
        precision[n:] = 1 / self.weighting.error_variance
        return mean, precision

    def _dot(self, a: Tensors, b: Tensors) -> torch.Tensor:
        """Weighted inner product of two updates."""
        products = ((w * p * q).sum() for w, p, q in zip(self.weights, a, b))
        return sum(products, start=self.update[0].new_zeros(()))

    def _project(self, columns: list[Tensors], update: Tensors) -> torch.Tensor:
        return torch.stack([self._dot(column, update) for column in columns])

    def _gram(self, columns: list[Tensors]) -> torch.Tensor:
        return torch.stack([self._project(columns, column) for column in columns])


class GaussNewton:
    """A fit by Gauss-Newton that uses a curvature again, as long as each step halves the distance.

    A curvature costs a hundred times what a step does. It is fresh, then used, then due again:

    - on a fresh one a step is shortened until it leads to a better point, and if none does the fit
      has stalled;
    - on a used one the whole step is tried alone, and if it fails or was slow, a new curvature is
      due.

    Parameters
    ----------
    problem
        What is to be explained.
    start
        Where to begin.
    weigh
        (x, η) -> Weighting, asked anew before each curvature; None keeps the problem's.

    Attributes
    ----------
    point
        The best one so far.
    curvature
        Of the problem; None where a new one is due.
    fresh
        Whether no step has been taken yet on ``curvature``.
    squared_length
        Of the latest step, in standard errors.
    losses
        χ² over its expectation, at each step.
    status
        How ``run`` ended.
    """

    def __init__(
        self,
        problem: Problem,
        start: Start,
        weigh: Callable[[torch.Tensor, float], Weighting] | None = None,
    ) -> None:
        self.problem = problem
        self.weigh = weigh
        self.point = problem.at(*start)
        self.curvature: Any = None  # an information.Curvature, once run
        self.fresh = False
        self.squared_length = math.inf
        self.losses: list[float] = []
        self.status = Status.BUDGET

    def run(self, max_steps: int) -> "GaussNewton":
        """Take up to ``max_steps`` steps; return the fit, which then has a curvature and a loss."""
        self.status = Status.BUDGET
        for _ in range(max_steps):
            if self.curvature is None:
                self.refresh()
            ended = self.step()
            if ended is not None:
                self.status = ended
                break
        if self.curvature is None:
            self.curvature = self.problem.curvature(self.point)
        if self.status is Status.BUDGET:  # its last step led to a point that is not noted yet
            self.losses.append(self.point.loss)
        return self

    @property
    def final_curvature(self) -> information.Curvature:
        """``curvature``, which is there once ``run`` has ended."""
        assert self.curvature is not None
        return self.curvature

    def refresh(self) -> None:
        """Weigh the update's entries anew at the present point, and compute the curvature there."""
        if self.weigh is not None:
            weighting = self.weigh(self.point.x, self.point.eta)
            self.problem = replace(self.problem, weighting=weighting)
            self.point = self.problem.at(self.point.x, self.point.eta, self.point.decay)
        self.curvature = self.problem.curvature(self.point)
        self.fresh = True

    def step(self) -> Status | None:
        """Move to a better point if there is one; return the reason to end here, or None."""
        assert self.curvature is not None
        self.losses.append(self.point.loss)
        step = _newton_step(self.point, self.curvature.solve)
        previous = self.squared_length
        self.squared_length = _squared_length(self.point, step)
        if self.squared_length < CONVERGED**2 * len(self.point.x):
            return Status.CONVERGED
        better = self._line_search(step, shortest=SHORTEST if self.fresh else 1.0)
        if better is None and self.fresh:
            return Status.STALLED
        slow = not self.fresh and self.squared_length > previous / 4
        if better is None or slow:
            self.curvature = None
        if better is not None:
            self.point = better
        self.fresh = False
        return None

    def _line_search(self, step: Step, shortest: float) -> Point | None:
        """The first of the points at 1, 1/4, 1/16 … of the step that is better, or None."""
        part = 1.0
        while part >= shortest:
            trial = self._moved(step, part)
            if trial.merit < self.point.merit:
                return trial
            part /= 4
        return None

    def _moved(self, step: Step, part: float) -> Point:
        """The point at ``part`` of the step."""
        scales = (part * step.of_scales).tolist()
        x = self.point.x + part * step.of_x
        eta = self.point.eta * math.exp(min(scales[0], LARGEST_LOG))
        decay = self.point.decay + scales[1] if self.problem.decays else 0.0
        return self.problem.at(x, eta, decay)


def _newton_step(point: Point, solve: Callable[[torch.Tensor], torch.Tensor]) -> Step:
    """The Step that would end at the minimum were χ² quadratic; ``solve`` is the curvature's in x.

    (log η, λ) are eliminated blockwise.
    """
    free = solve(point.slope[:, None])[:, 0]
    coupled = solve(point.cross)
    schur = point.scale - point.cross.T @ coupled
    of_scales = torch.linalg.solve(schur, point.scale_slope - point.cross.T @ free)
    return Step(free - coupled @ of_scales, of_scales)


def _squared_length(point: Point, step: Step) -> float:
    """Of a Newton step, in standard errors: what it promises to lower the merit by."""
    return abs(float(point.slope @ step.of_x + point.scale_slope @ step.of_scales))
