"""The one loop behind every attack: descend from a start, remember the best point, decide when to
stop, start again.
"""

import copy
import itertools
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from dlm_core import check, label_inference, objectives
from dlm_core.arrays import Labels, Precision
from dlm_core.coordinates import cosines
from dlm_core.federated import loss as training_loss
from dlm_core.observation import Observation
from dlm_core.optimizers import lbfgs
from dlm_core.records import passes_on_to
from dlm_core.results import ClientEstimate, Reconstruction, SearchEvidence, Status
from dlm_core.threads import for_network

OWN = ("images", "logits", "growth")  # names of the variables that are not the client's
DESCENT = 1e-5  # of the start's misfit: where any image fits well, fitting well is no answer
Tensors = Sequence[torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class StopRule:
    """When a search ends, and with which of its points.

    Attributes
    ----------
    max_evaluations
        Budget of each restart.
    max_iterations
        Budget in steps of the optimizer, each of one evaluation or several; None for no other
        budget than that of evaluations.
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


@dataclass(frozen=True)
class Trained:
    """A scale that is optimised along with the images.

    Attributes
    ----------
    start
        Its first value.
    relative
        Whether the variable is the scale over ``start``, which begins at 1, as L-BFGS likes them;
        the released code optimises the scale itself.
    """

    start: check.Positive
    relative: bool = True

    def __post_init__(self) -> None:
        check.fields(self)

    @property
    def factor(self) -> float:
        """The scale over its variable."""
        return self.start if self.relative else 1.0

    @property
    def variable(self) -> float:
        """The variable's first value."""
        return self.start / self.factor


@passes_on_to(StopRule)
@check.arguments
def reconstruct(
    seen: Observation,
    distance: Callable[..., torch.Tensor],
    *,
    num_images: check.Count = 1,
    labels: str | Labels = "inferred",
    seed: check.Whole = 0,
    dtype: Precision = torch.float64,
    scale: check.Positive | Trained = 1.0,
    total_variation: check.NonNegative = 0.0,
    coordinates: Callable[..., Any] = cosines,
    optimizer: Callable[..., torch.optim.Optimizer] = lbfgs,
    restarts: check.Count = 1,
    keep_every: check.Count | None = None,
    update_of: Callable[..., Tensors] = objectives.gradient,
    unknowns: Mapping[str, check.Finite] | None = None,
    resume: Mapping[str, torch.Tensor] | None = None,
    **stop: Any,
) -> Reconstruction:
    """Search for images whose gradient at W_t matches Δ, and return the best.

    Parameters
    ----------
    seen
        What the observer sees.
    distance
        Of ``dlm_core.objectives``: (g, scale · Δ) -> scalar, or with a trained scale (g, Δ, scale)
        -> scalar.
    num_images
        B, the number of images in the client's step.
    labels
        "inferred" from Δ, "optimised" as soft labels, or class indices [B] (told): a tensor, an
        array or a list.
    seed
        Of the starts.
    dtype
        Of the attacker's arithmetic.
    scale
        Δ is multiplied by it: 1/η where that is told; ``Trained`` optimises it too, as DLM's k.
    total_variation
        Weight of that prior, added to the distance.
    coordinates
        Of ``dlm_core.coordinates``: start and parametrisation of the images.
    optimizer
        Of ``dlm_core.optimizers``: (variables, max_evaluations) -> torch optimizer.
    restarts
        Independent starts; the one of lowest loss is returned, the first that converges ends the
        search.
    keep_every
        Keep the images of every so many evaluations in ``history``.
    update_of
        The client that is assumed: ``(model, loss, images, labels, **unknowns)`` -> g, its update.
    unknowns
        {name: number} of that client that are optimised along with the images, from the value
        given; "images", "logits" and "growth" are the search's own.
    resume
        The ``point`` of an earlier search to go on from, or a part of it; it replaces the start,
        and is no yardstick for convergence.
    **stop
        Fields of ``StopRule``.

    Raises
    ------
    ValueError
        For arguments outside their range.
    """
    rule = StopRule(**stop)
    taken = [name for name in OWN if name in (unknowns or {})]
    if taken:
        raise ValueError(f"unknowns has {taken[0]!r}, which is a variable of the search's own")
    began = time.perf_counter()
    with for_network(seen.model):
        known = known_labels(seen, labels, num_images)
        target = _Target(seen, distance, scale, dtype)
        of_client = dict(unknowns or {})
        model = copy.deepcopy(seen.model).to(dtype)
        problem = _Problem(model, target, known, update_of, tuple(of_client), total_variation)
        numbers = {**of_client, **target.unknowns}
        searches = []
        for restart in range(restarts):
            generator = torch.Generator().manual_seed(seed + 10_007 * restart)
            variables, to_images = _start(
                seen, coordinates, target, known, num_images, numbers, generator
            )
            variables |= {name: tensor.clone() for name, tensor in (resume or {}).items()}
            floor, descent = seen.rounding_share, math.inf if resume else DESCENT
            objective = partial(problem.evaluate, to_images=to_images)
            search = _Search(variables, objective, rule, floor, descent, keep_every, target.k_at)
            search.run(optimizer)
            searches.append((search, to_images))
            if search.status is Status.CONVERGED:
                break
        best, to_images = min(searches, key=lambda each: each[0].loss)
        return _result(best, to_images, target, known, time.perf_counter() - began)


class _Target:
    """scale · Δ in the attacker's precision, and the unit in which distances are counted.

    Attributes
    ----------
    unknowns
        {name: start} of the variable that a trained scale adds to the search.
    """

    def __init__(
        self, seen: Observation, distance: Callable, scale: float | Trained, dtype: torch.dtype
    ) -> None:
        self.trained = scale if isinstance(scale, Trained) else None
        self.unknowns = {"growth": scale.variable} if isinstance(scale, Trained) else {}
        self.start = scale.start if isinstance(scale, Trained) else 1.0
        factor = 1.0 if isinstance(scale, Trained) else scale
        self.update = [factor * layer.to(dtype) for layer in seen.delta]
        self.distance = distance
        # distance(-d, d)/4 is where g is as far from d as d is long, for all: ‖d‖² for the squares,
        # 1/2 for the cosine, whose small angles count as θ²/2
        one = torch.ones_like(self.update[0].sum())
        first = {name: one * value for name, value in self.unknowns.items()}
        opposite = [-layer * self.start for layer in self.update]
        self.unit = float(self._distance_from(opposite, first)) / 4

    def scale(self, variables: Mapping[str, torch.Tensor]) -> torch.Tensor | None:
        """A trained scale at ``variables``, else None."""
        return self.trained.factor * variables["growth"] if self.trained else None

    def k_at(self, variables: Mapping[str, torch.Tensor]) -> float | None:
        """The same as a number for the trace."""
        scale = self.scale(variables)
        return None if scale is None else float(scale.detach())

    def misfit(
        self, g: Tensors, variables: Mapping[str, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(distance, distance relative to the target's length)."""
        distance = self._distance_from(g, variables)
        scale = self.scale(variables)
        grown = 1.0 if scale is None else (scale.detach() / self.start) ** 2
        return distance, distance.detach() / (self.unit * grown)

    def _distance_from(self, g: Tensors, variables: Mapping[str, torch.Tensor]) -> torch.Tensor:
        scale = self.scale(variables)
        own = () if scale is None else (scale,)
        return self.distance(g, self.update, *own)


@dataclass(frozen=True)
class _Problem:
    """The objective as a function of the search's variables."""

    model: nn.Module
    target: _Target
    known: torch.Tensor | None
    update_of: Callable
    of_client: tuple[str, ...]
    total_variation: float

    def evaluate(self, variables: Mapping[str, torch.Tensor], to_images: Callable):
        """(relative misfit, loss, images) at ``variables``."""
        images = to_images(variables["images"])
        labels = variables["logits"].softmax(1) if self.known is None else self.known
        client = {name: variables[name] for name in self.of_client}
        g = self.update_of(self.model, training_loss, images, labels, **client)
        misfit, relative = self.target.misfit(g, variables)
        return relative, misfit + self.total_variation * objectives.total_variation(images), images


def _start(seen, coordinates, target, known, num_images, numbers, generator):
    """(variables at the start, the map from coordinates to images)."""
    like = target.update[0]
    start, to_images = coordinates((num_images, *seen.image_shape), like, generator)
    variables = {"images": start}
    if known is None:
        logits = torch.randn(num_images, seen.num_classes, generator=generator, dtype=torch.float64)
        variables["logits"] = logits.to(like)
    variables |= {name: torch.full_like(like.sum(), value) for name, value in numbers.items()}
    return variables, to_images


def _result(search: "_Search", to_images, target: _Target, known, seconds: float) -> Reconstruction:
    scale = target.scale(search.best)
    k = None if scale is None else float(scale)
    # A factor that has not settled, or collapsed to nothing, is no learning rate.
    settled = search.status is Status.CONVERGED
    rate = 1 / k if settled and k is not None and k > 0 else None
    images = to_images(search.best["images"])
    evidence = SearchEvidence(
        losses=search.losses,
        loss=search.loss,
        k=k,
        ks=search.ks,
        history=search.history,
        point=search.best,
    )
    return Reconstruction(
        images=images,
        labels=search.best["logits"].argmax(1) if known is None else known,
        status=search.status,
        vouched=torch.zeros(len(images), dtype=torch.bool, device=images.device),
        evidence=evidence,
        client=ClientEstimate(learning_rate=rate),
        seconds=seconds,
    )


class _Finished(Exception):
    """Raised inside the optimizer's closure to leave its loop at once."""


class _Search:
    """One descent over a dict of variables; ``objective(variables)`` returns (relative misfit,
    loss, images).
    """

    def __init__(
        self,
        variables,
        objective,
        rule: StopRule,
        floor: float,
        descent: float,
        keep_every: int | None,
        k_of: Callable[[Mapping[str, torch.Tensor]], float | None],
    ):
        self.variables = {name: start.requires_grad_() for name, start in variables.items()}
        self.objective = objective
        self.rule = rule
        self.floor, self.descent = floor, descent
        # misfit at which it has converged, known from the first evaluation on
        self.enough: float | None = None
        self.keep_every = keep_every
        self.k_of = k_of
        self.losses: list[float] = []
        self.lowest: list[float] = []
        self.history: list[tuple[int, torch.Tensor]] = []
        self.ks: list[float] = []
        self.loss, self.best = math.inf, self._copy()
        self.status = Status.WHOLE if rule.whole_budget else Status.BUDGET

    def run(self, optimizer) -> None:
        """Descend until the verdict falls."""
        stepper = optimizer(list(self.variables.values()), self.rule.max_evaluations)
        steps = itertools.repeat(None, self.rule.max_iterations or self.rule.max_evaluations)
        try:
            for _ in steps:
                stepper.step(self._closure)
        except _Finished:
            pass
        if self.rule.whole_budget:
            self.loss, self.best = self._last(), self._copy()

    def _last(self) -> float:
        """The loss where the search has ended: its optimizer's last step is not evaluated."""
        _, loss, _ = self.objective(self.variables)
        return float(loss.detach())

    def _closure(self):
        misfit, loss, images = self.objective(self.variables)
        gradients = torch.autograd.grad(loss, list(self.variables.values()))
        for variable, gradient in zip(self.variables.values(), gradients):
            variable.grad = gradient
        if self.enough is None:
            start = self.descent * float(misfit)
            self.enough = max(self.floor, min(self.rule.tolerance, start))
        number = float(loss.detach())
        finite = math.isfinite(number) and all(gradient.isfinite().all() for gradient in gradients)
        if self.keep_every and len(self.losses) % self.keep_every == 0:
            self.history.append((len(self.losses), images.detach().clone()))
        k = self.k_of(self.variables)
        if k is not None:
            self.ks.append(k)
        if finite and number < self.loss:
            self.loss, self.best = number, self._copy()
        self.losses.append(number)
        self.lowest.append(self.loss)
        verdict = self._verdict(finite, float(misfit))
        if verdict:
            self.status = verdict
            raise _Finished
        return loss.detach()

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

    def _copy(self):
        return {name: variable.detach().clone() for name, variable in self.variables.items()}


def known_labels(
    seen: Observation, labels: str | torch.Tensor, num_images: int, local_steps: int = 1
) -> torch.Tensor | None:
    """The labels [B] where they are told or inferred, None where they are to be optimised.

    Parameters
    ----------
    seen
        What the observer sees.
    labels
        As in ``reconstruct``.
    num_images
        B.
    local_steps
        As in ``label_inference.infer``.

    Raises
    ------
    ValueError
        For labels of another shape, or that are no classes of the model.
    """
    if isinstance(labels, str):
        check.one_of("labels", labels, ("inferred", "optimised"))
        if labels == "optimised":
            return None
        return label_inference.infer(seen, num_images, local_steps=local_steps)
    if len(labels) != num_images:
        raise ValueError(
            f"labels has shape {list(labels.shape)}; it takes {num_images} class indices"
        )
    if labels.max() >= seen.num_classes:
        raise ValueError(
            f"labels is {labels.tolist()}; the model has classes 0 to {seen.num_classes - 1}"
        )
    return labels.to(next(seen.model.parameters()).device)
