"""The one loop behind every attack: descend from a start, remember the best point, decide when to
stop, start again.
"""

import copy
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
from dlm_core.coordinates import cosines
from dlm_core.federated import loss as training_loss
from dlm_core.observation import Observation
from dlm_core.optimizers import lbfgs
from dlm_core.records import passes_on_to
from dlm_core.results import ClientEstimate, Reconstruction, SearchEvidence, Status
from dlm_core.threads import for_network

DESCENT = 1e-5  # of the start's misfit: where any image fits well, fitting well is no answer
Tensors = Sequence[torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class StopRule:
    """When a search ends.

    Attributes
    ----------
    max_evaluations
        Budget of each restart.
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

    max_evaluations: int = 400
    tolerance: float = 1e-6
    patience: int = 50

    def __post_init__(self) -> None:
        check.at_least("max_evaluations", self.max_evaluations, 1)
        check.at_least("patience", self.patience, 1)
        check.in_range("tolerance", self.tolerance, 0, math.inf)


@dataclass(frozen=True)
class Trained:
    """A number that is optimised along with the images, from ``start``; L-BFGS likes variables of
    order 1, so its growth is.
    """

    start: float


@passes_on_to(StopRule)
def reconstruct(
    seen: Observation,
    distance: Callable[..., torch.Tensor],
    *,
    num_images: int = 1,
    labels: str | torch.Tensor = "inferred",
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
    scale: float | Trained = 1.0,
    total_variation: float = 0.0,
    coordinates: Callable[..., Any] = cosines,
    optimizer: Callable[..., torch.optim.Optimizer] = lbfgs,
    restarts: int = 1,
    keep_every: int | None = None,
    update_of: Callable[..., Tensors] = objectives.gradient,
    unknowns: Mapping[str, float] | None = None,
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
        "inferred" from Δ, "optimised" as soft labels, or a tensor [B] of class indices (told).
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
        given.
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
    for name, value in {
        "num_images": num_images,
        "restarts": restarts,
        "keep_every": keep_every or 1,
    }.items():
        check.at_least(name, value, 1)
    check.at_least("seed", seed, 0)
    check.in_range("total_variation", total_variation, 0, math.inf)
    rule = StopRule(**stop)
    began = time.perf_counter()
    with for_network(seen.model):
        known = known_labels(seen, labels, num_images)
        target = _Target(seen, distance, scale, dtype)
        numbers = dict(unknowns or {})
        model = copy.deepcopy(seen.model).to(dtype)
        problem = _Problem(model, target, known, update_of, tuple(numbers), total_variation)
        if target.trained:
            numbers["growth"] = 1.0
        searches = []
        for restart in range(restarts):
            generator = torch.Generator().manual_seed(seed + 10_007 * restart)
            variables, to_images = _start(
                seen, coordinates, target, known, num_images, numbers, generator
            )
            variables |= {name: tensor.clone() for name, tensor in (resume or {}).items()}
            floor, descent = seen.rounding_share, math.inf if resume else DESCENT
            objective = partial(problem.evaluate, to_images=to_images)
            search = _Search(variables, objective, rule, floor, descent, keep_every)
            search.run(optimizer)
            searches.append((search, to_images))
            if search.status is Status.CONVERGED:
                break
        best, to_images = min(searches, key=lambda each: each[0].loss)
        return _result(best, to_images, target, known, time.perf_counter() - began)


class _Target:
    """scale · Δ in the attacker's precision, and the unit in which distances are counted."""

    def __init__(
        self, seen: Observation, distance: Callable, scale: float | Trained, dtype: torch.dtype
    ) -> None:
        self.trained = isinstance(scale, Trained)
        self.k0 = scale.start if isinstance(scale, Trained) else 1.0
        factor = 1.0 if isinstance(scale, Trained) else scale
        self.update = [factor * layer.to(dtype) for layer in seen.delta]
        self.distance = distance
        # distance(-d, d)/4 is where g is as far from d as d is long, for all: ‖d‖² for the squares,
        # 1/2 for the cosine,
        # whose small angles count as θ²/2
        opposite = [-layer * self.k0 for layer in self.update]
        self.unit = float(self.distance_from(opposite, torch.ones_like(self.update[0].sum()))) / 4

    def distance_from(self, g: Tensors, growth: Any) -> torch.Tensor:
        """The distance of ``g``; a trained scale has grown from its start by ``growth``."""
        if not self.trained:
            return self.distance(g, self.update)
        assert growth is not None  # one of the variables, where the scale is trained
        return self.distance(g, self.update, self.k0 * growth)

    def misfit(self, g: Tensors, growth: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """(distance, distance relative to the target's length)."""
        distance = self.distance_from(g, growth)
        if not self.trained:
            return distance, distance.detach() / self.unit
        assert growth is not None
        return distance, distance.detach() / (self.unit * growth.detach() ** 2)


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
        misfit, relative = self.target.misfit(g, variables.get("growth"))
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
    k = float(target.k0 * search.best["growth"]) if target.trained else None
    images = to_images(search.best["images"])
    evidence = SearchEvidence(
        losses=search.losses,
        loss=search.loss,
        k=k,
        ks=[target.k0 * growth for growth in search.growths],
        history=search.history,
        point=search.best,
    )
    return Reconstruction(
        images=images,
        labels=search.best["logits"].argmax(1) if known is None else known,
        status=search.status,
        vouched=torch.zeros(len(images), dtype=torch.bool),
        evidence=evidence,
        client=ClientEstimate(learning_rate=1 / k if k else None),
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
    ):
        self.variables = {name: start.requires_grad_() for name, start in variables.items()}
        self.objective = objective
        self.rule = rule
        self.floor, self.descent = floor, descent
        self.enough: float | None = (
            None  # misfit at which it has converged, known from the first evaluation on
        )
        self.keep_every = keep_every
        self.losses: list[float] = []
        self.lowest: list[float] = []
        self.history: list[tuple[int, torch.Tensor]] = []
        self.growths: list[float] = []
        self.loss, self.best = math.inf, self._copy()
        self.status = Status.BUDGET

    def run(self, optimizer) -> None:
        """Descend until the verdict falls."""
        stepper = optimizer(list(self.variables.values()), self.rule.max_evaluations)
        try:
            while True:
                stepper.step(self._closure)
        except _Finished:
            pass

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
        if "growth" in self.variables:
            self.growths.append(float(self.variables["growth"].detach()))
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
    if not isinstance(labels, torch.Tensor):
        check.one_of("labels", labels, ("inferred", "optimised"))
        if labels == "optimised":
            return None
        return label_inference.infer(seen, num_images, local_steps=local_steps)
    if labels.shape != (num_images,) or labels.is_floating_point():
        raise ValueError(
            f"labels has shape {list(labels.shape)} and dtype {labels.dtype}; "
            f"it takes {num_images} class indices"
        )
    if labels.min() < 0 or labels.max() >= seen.num_classes:
        raise ValueError(
            f"labels is {labels.tolist()}; the model has classes 0 to {seen.num_classes - 1}"
        )
    return labels.to(next(seen.model.parameters()).device)
