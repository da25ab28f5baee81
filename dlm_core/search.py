"""The one loop behind every attack: descend from a start, remember the best point, decide when to stop, start again."""

import copy
import math
import statistics
import time
from dataclasses import dataclass, field
from functools import partial

import torch

from dlm_core import check, objectives
from dlm_core import labels as label_inference
from dlm_core.coordinates import cosines
from dlm_core.federated import loss as training_loss
from dlm_core.federated import rounding_share, weight_delta
from dlm_core.optimizers import lbfgs

DESCENT = 1e-5  # of the start's misfit: where any image fits well, fitting well is no answer


@dataclass(frozen=True)
class Reconstruction:
    """What an attack found.

    images       [B, C, H, W] in the attacker's precision, the ones that have ``loss``.
    labels       [B] class indices: given, inferred, or the largest of the optimised logits.
    losses       the objective at every evaluation of the chosen restart.
    loss         the lowest of them.
    stop_reason  "converged" (the misfit fell to ``tolerance``, or to what rounding of the weights explains), "stalled"
                 (no progress over ``patience`` evaluations), "diverged" (NaN, or far above the best for as long), "budget".
    k            DLM's k, None for attacks without one.     ks  its value at every evaluation.
    seconds      wall time of all restarts.
    history      [(evaluation, images)] where intermediate images were asked for.
    point        {name: tensor} of all that was optimised, in the search's own coordinates.
    """

    images: torch.Tensor = field(repr=False)
    labels: torch.Tensor
    losses: list = field(repr=False)
    loss: float
    stop_reason: str
    k: float | None
    seconds: float
    history: list = field(repr=False, default_factory=list)
    ks: list = field(repr=False, default_factory=list)
    point: dict = field(repr=False, default_factory=dict)

    @property
    def evaluations(self):
        """How often the objective and its gradient were computed in the chosen restart."""
        return len(self.losses)


def reconstruct(
    seen,
    distance,
    *,
    scale=1.0,
    k0=None,
    labels="inferred",
    num_images=1,
    total_variation=0.0,
    coordinates=cosines,
    optimizer=lbfgs,
    max_evaluations=400,
    tolerance=1e-6,
    patience=50,
    restarts=1,
    seed=0,
    dtype=torch.float64,
    keep_every=None,
    update_of=objectives.gradient,
    unknowns=(),
    resume=(),
):
    """Search for images whose gradient at W_t matches Δ, and return the best, a Reconstruction.

    seen             Observation.
    distance         of ``dlm_core.objectives``: (g, scale * Δ), and k where ``k0`` is given -> scalar.
    labels           "inferred" from Δ, "optimised" as soft labels, or a tensor [B] of class indices (told).
    num_images       B, the number of images in the client's step.
    total_variation  weight of that prior, added to the distance.
    coordinates      of ``dlm_core.coordinates``: start and parametrisation of the images.
    optimizer        of ``dlm_core.optimizers``: (variables, max_evaluations) -> torch optimizer.
    max_evaluations  budget of each restart.
    tolerance        relative misfit ‖g - d‖²/‖d‖² (DLM: d = kΔ) at which the search has converged, if it is also a
                     hundred-thousandth of the start's; or the one that rounding of the transmitted weights leaves at best.
    patience         the search has stalled when this many evaluations lower the loss by less than 5 %.
    restarts         independent starts; the one of lowest loss is returned, the first that converges ends the search.
    seed             of the starts.     dtype  of the attacker's arithmetic.
    keep_every       keep the images of every so many evaluations in ``history``.
    update_of        the client that is assumed: (model, loss, images, labels, **unknowns) -> g, its update.
    unknowns         {name: number} that are optimised along with the images, from the value given.
    resume           the ``point`` of an earlier Reconstruction to go on from, or a part of it; it replaces the start, and is
                     no yardstick for convergence.

    Raises ValueError for arguments outside their range.
    """
    counts = {"num_images": num_images, "max_evaluations": max_evaluations, "patience": patience, "restarts": restarts}
    for name, value in {**counts, "keep_every": keep_every or 1}.items():
        check.at_least(name, value, 1)
    for name, value in {"total_variation": total_variation, "tolerance": tolerance}.items():
        check.in_range(name, value, 0, math.inf)
    began = time.perf_counter()
    model = copy.deepcopy(seen.model).to(dtype)
    update = [scale * layer.to(dtype) for layer in weight_delta(seen)]
    known = known_labels(seen, labels, num_images)
    unit, floor = _unit(distance, update, k0), rounding_share(seen)
    numbers = dict(unknowns) if k0 is None else {"growth": 1.0, **dict(unknowns)}  # k = k0 * growth: L-BFGS likes order 1
    limits = (floor, tolerance, math.inf if resume else DESCENT, max_evaluations, patience, keep_every)

    def objective(variables, to_images):
        images = to_images(variables["images"])
        soft = variables["logits"].softmax(1) if known is None else known
        g = update_of(model, training_loss, images, soft, **{name: variables[name] for name in dict(unknowns)})
        misfit = distance(g, update) if k0 is None else distance(g, update, k0 * variables["growth"])
        relative = misfit.detach() / (unit if k0 is None else unit * variables["growth"].detach() ** 2)
        return relative, misfit + total_variation * objectives.total_variation(images), images

    searches = []
    for restart in range(restarts):
        generator = torch.Generator().manual_seed(seed + 10_007 * restart)
        start, to_images = coordinates((num_images, *seen.image_shape), update[0], generator)
        variables = {"images": start}
        if known is None:
            logits = torch.randn(num_images, seen.num_classes, generator=generator, dtype=torch.float64)
            variables["logits"] = logits.to(update[0])
        variables |= {name: torch.full_like(update[0].sum(), value) for name, value in numbers.items()}
        variables |= {name: tensor.clone() for name, tensor in dict(resume).items()}
        search = _Search(variables, partial(objective, to_images=to_images), *limits)
        search.run(optimizer)
        searches.append((search, to_images))
        if search.stop_reason == "converged":
            break

    search, to_images = min(searches, key=lambda each: each[0].loss)
    return Reconstruction(
        images=to_images(search.best["images"]),
        labels=search.best["logits"].argmax(1) if known is None else known,
        losses=search.losses,
        loss=search.loss,
        stop_reason=search.stop_reason,
        k=None if k0 is None else float(k0 * search.best["growth"]),
        seconds=time.perf_counter() - began,
        history=search.history,
        ks=[k0 * growth for growth in search.growths],
        point=search.best,
    )


class _Finished(Exception):
    """Raised inside the optimizer's closure to leave its loop at once."""


class _Search:
    """One descent over a dict of variables; ``objective(variables)`` returns (relative misfit, loss, images)."""

    def __init__(self, variables, objective, floor, tolerance, descent, max_evaluations, patience, keep_every):
        self.variables = {name: start.requires_grad_() for name, start in variables.items()}
        self.objective, self.floor, self.tolerance, self.descent, self.enough = objective, floor, tolerance, descent, None
        self.max_evaluations, self.patience, self.keep_every = max_evaluations, patience, keep_every
        self.losses, self.lowest, self.history, self.growths = [], [], [], []
        self.loss, self.best, self.stop_reason = math.inf, self._copy(), None

    def run(self, optimizer):
        """Descend until the verdict falls."""
        stepper = optimizer(list(self.variables.values()), self.max_evaluations)
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
            self.enough = max(self.floor, min(self.tolerance, self.descent * float(misfit)))
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
        self.stop_reason = self._verdict(finite, float(misfit))
        if self.stop_reason:
            raise _Finished
        return loss.detach()

    def _verdict(self, finite, misfit):
        """The reason to stop now, or None."""
        if not finite:
            return "diverged"
        if misfit <= self.enough:
            return "converged"
        if len(self.losses) > self.patience and self.lowest[-1] > 0.95 * self.lowest[-1 - self.patience]:
            return "diverged" if statistics.median(self.losses[-self.patience :]) > 10 * self.loss else "stalled"
        return "budget" if len(self.losses) >= self.max_evaluations else None

    def _copy(self):
        return {name: variable.detach().clone() for name, variable in self.variables.items()}


def _unit(distance, update, k0):
    """The distance at which g is as far from the update as the update is long, so that misfit/unit is relative.

    distance(-d, d)/4 gives it for all: ‖d‖² for the squares, 1/2 for the cosine, whose small angles count as θ²/2.
    """
    k = () if k0 is None else (torch.tensor(float(k0), dtype=update[0].dtype, device=update[0].device),)
    return float(distance([-layer * (k0 or 1.0) for layer in update], update, *k)) / 4


def known_labels(seen, labels, num_images, steps=1):
    """The labels where they are told or inferred (as after ``steps`` local steps), None where they are to be optimised."""
    if not isinstance(labels, torch.Tensor):
        check.one_of("labels", labels, ("inferred", "optimised"))
        return label_inference.infer(seen, num_images, steps=steps) if labels == "inferred" else None
    if labels.shape != (num_images,) or labels.is_floating_point():
        raise ValueError(
            f"labels has shape {list(labels.shape)} and dtype {labels.dtype}; it takes {num_images} class indices"
        )
    if labels.min() < 0 or labels.max() >= seen.num_classes:
        raise ValueError(f"labels is {labels.tolist()}; the model has classes 0 to {seen.num_classes - 1}")
    return labels.to(next(seen.model.parameters()).device)
