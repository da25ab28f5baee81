"""The one loop behind every attack: descend from a start, remember the best point, start again.

Several searches at once, of one architecture, are ``beyond.lanes``: they share the problem, the
start and the verdict of those here.
"""

import contextlib
import copy
import functools
import importlib
import itertools
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any, TypeVar, cast

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
from dlm_core.stopping import DESCENT, StopRule, Trace, rank
from dlm_core.threads import for_network, own_generator

OWN = ("images", "logits", "growth")  # names of the variables that are not the client's
Tensors = Sequence[torch.Tensor]
LISTS = (list, tuple, range)  # what has an entry for each of several searches
F = TypeVar("F", bound=Callable[..., Any])

# Whether ``reconstruct`` is to return the search instead of running it.
_PREPARING: ContextVar[bool] = ContextVar("preparing", default=False)


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


def in_lanes(attack: F) -> F:
    """Decorator of an attack that ends in ``reconstruct``: given a list of Observations, or of
    seeds, it searches for all at once and returns a list.

    An option that is a list has an entry for each, such as ``learning_rate=[0.01, 0.1]``; the rest
    is the same for all. One search's own lists, ``labels`` of whole numbers and lists of tensors,
    are the same for all, too; a list of them has one for each.

    Raises
    ------
    ValueError
        For an empty list, and for one of another length.

    Notes
    -----
    ``beyond.lanes`` has what becomes of them. The function's attribute ``in_lanes`` is True.
    """

    @functools.wraps(attack)
    def called(*given: Any, **named: Any) -> Any:
        seen, *more = given if given else (named.get("seen"),)
        if not any(isinstance(each, LISTS) for each in (seen, named.get("seed"))):
            return attack(*given, **named)
        calls = _calls(seen, {name: each for name, each in named.items() if name != "seen"})
        with preparing():
            searches = [attack(one, *more, **options) for one, options in calls]
        # By name: what many at once take part in is no part of a single search's code.
        return importlib.import_module("dlm_core.beyond.lanes").run(searches)

    noted: Any = called
    noted.in_lanes = True
    return cast(F, called)


@contextlib.contextmanager
def preparing() -> Iterator[None]:
    """Within it, ``reconstruct`` returns the search, ``Prepared``, instead of running it."""
    token = _PREPARING.set(True)
    try:
        yield
    finally:
        _PREPARING.reset(token)


def _calls(seen: Any, options: Mapping[str, Any]) -> list[tuple[Any, dict[str, Any]]]:
    """(Observation, options) of each lane."""
    own = {name: value for name, value in options.items() if _one_for_each(name, value)}
    lists = {**({"seen": seen} if isinstance(seen, LISTS) else {}), **own}
    first, count = next((name, len(value)) for name, value in lists.items())
    for name, value in lists.items():
        if not value:
            raise ValueError(f"{name} is empty; it takes at least one entry")
        if len(value) != count:
            raise ValueError(f"{name} has {len(value)} entries; {first} has {count}")
    return [
        (
            lists["seen"][lane] if "seen" in lists else seen,
            {name: own[name][lane] if name in own else value for name, value in options.items()},
        )
        for lane in range(count)
    ]


def _one_for_each(name: str, value: Any) -> bool:
    """Whether an option has an entry for each lane."""
    if not isinstance(value, LISTS):
        return False
    if name == "labels":
        return not all(isinstance(each, int) for each in value)
    return not value or not all(isinstance(each, torch.Tensor) for each in value)


@passes_on_to(StopRule)
@in_lanes
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
        What the observer sees. A list of them, or of seeds, is searched at once (``in_lanes``).
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
        Independent starts. The first that converges ends the search and is returned; where none
        does, the one of lowest loss, NaN counted as the highest.
    keep_every
        Keep the images of every so many evaluations in ``history``.
    update_of
        The client that is assumed: ``(model, loss, images, labels, **unknowns)`` -> g, its update.
    unknowns
        {name: number} of that client that are optimised along with the images, from the value
        given; "images", "logits" and "growth" are the search's own.
    resume
        The ``point`` of an earlier search to go on from, or a part of it; it replaces the start,
        and is no yardstick for convergence. ``growth`` in it is k over the k₀ of that search, or k
        itself where the scale is not ``relative``. Restarts from a whole point differ in what the
        network draws by itself, and in nothing else.
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
    prepared = Prepared(
        seen=seen,
        distance=distance,
        num_images=num_images,
        labels=labels,
        seed=seed,
        dtype=dtype,
        scale=scale,
        total_variation=total_variation,
        coordinates=coordinates,
        optimizer=optimizer,
        restarts=restarts,
        keep_every=keep_every,
        update_of=update_of,
        unknowns=dict(unknowns or {}),
        resume=dict(resume or {}),
        rule=rule,
    )
    # who is preparing knows what it gets
    return cast(Reconstruction, prepared) if _PREPARING.get() else prepared.run()


@dataclass(frozen=True, kw_only=True, eq=False)
class Prepared:
    """A search before it begins: what it was given, and what follows from it.

    Attributes
    ----------
    seen, distance, num_images, labels, seed, dtype, scale, total_variation, coordinates, optimizer,
    restarts, keep_every, update_of, unknowns, resume
        Of ``reconstruct``.
    rule
        When it ends.
    """

    seen: Observation
    distance: Callable[..., torch.Tensor]
    num_images: int
    labels: str | torch.Tensor
    seed: int
    dtype: torch.dtype
    scale: float | Trained
    total_variation: float
    coordinates: Callable[..., Any]
    optimizer: Callable[..., torch.optim.Optimizer]
    restarts: int
    keep_every: int | None
    update_of: Callable[..., Tensors]
    unknowns: Mapping[str, float]
    resume: Mapping[str, torch.Tensor]
    rule: StopRule

    def run(self) -> Reconstruction:
        """Search, by itself."""
        began = time.perf_counter()
        device = next(self.seen.model.parameters()).device
        # what the network draws itself on a CPU, as dropout does, follows from the seed as well
        with for_network(self.seen.model), own_generator(self.seed, device):
            problem, searches = self.problem, []
            for restart in range(self.restarts):
                variables, to_images = self.start(restart)
                objective = partial(problem.evaluate, to_images=to_images)
                search = _Search(variables, objective, self.trace(), self.keep_every, problem)
                search.run(self.optimizer)
                searches.append((search.trace, to_images))
                if search.trace.status is Status.CONVERGED:
                    break
            return self.result(searches, time.perf_counter() - began)

    @cached_property
    def known(self) -> torch.Tensor | None:
        """The labels [B], None where they are optimised."""
        return known_labels(self.seen, self.labels, self.num_images)

    @cached_property
    def target(self) -> "Target":
        """What is to be met."""
        return Target.of(self.seen, self.distance, self.scale, self.dtype)

    @cached_property
    def problem(self) -> "Problem":
        """The objective, with a copy of the network in the attacker's precision."""
        known, target = self.known, self.target
        model = copy.deepcopy(self.seen.model).to(self.dtype)
        names = tuple(self.unknowns)
        return Problem(model, target, known, self.update_of, names, self.total_variation)

    def start(self, restart: int) -> tuple[dict[str, torch.Tensor], Callable]:
        """(variables at the start, the map from coordinates to images)."""
        generator = torch.Generator().manual_seed(self.seed + 10_007 * restart)
        seen, like = self.seen, self.target.update[0]
        shape = (self.num_images, *seen.image_shape)
        start, to_images = self.coordinates(shape, like, generator)
        variables = {"images": start}
        if self.known is None:
            shape = (self.num_images, seen.num_classes)
            logits = torch.randn(shape, generator=generator, dtype=torch.float64)
            variables["logits"] = logits.to(like)
        numbers = {**self.unknowns, **self.target.unknowns}
        variables |= {name: torch.full_like(like.sum(), value) for name, value in numbers.items()}
        self._check_resumed(variables)
        variables |= {name: each.detach().to(like).clone() for name, each in self.resume.items()}
        return variables, to_images

    def _check_resumed(self, variables: Mapping[str, torch.Tensor]) -> None:
        """An unknown of the client's may go on as a tensor of any shape."""
        for name, tensor in self.resume.items():
            check.one_of("variable in resume", name, variables)
            expected = list(variables[name].shape)
            if name in OWN and list(tensor.shape) != expected:
                raise ValueError(
                    f"resume has {name!r} of shape {list(tensor.shape)}; it takes {expected}"
                )

    def trace(self) -> Trace:
        """An empty one."""
        descent = math.inf if self.resume else DESCENT
        return Trace(self.rule, self.seen.rounding_share, descent)

    def result(self, searches: Sequence[tuple[Trace, Callable]], seconds: float) -> Reconstruction:
        """The best of searches that have ended, with the maps from coordinates to images."""
        trace, to_images = min(searches, key=lambda each: rank(each[0].status, each[0].loss))
        k = self.target.k_at(trace.best)
        # A factor that has not settled, or collapsed to nothing, is no learning rate.
        settled = trace.status is Status.CONVERGED
        rate = 1 / k if settled and k is not None and k > 0 else None
        images = to_images(trace.best["images"])
        evidence = SearchEvidence(
            losses=trace.losses,
            loss=trace.loss,
            k=k,
            ks=trace.ks,
            history=trace.history,
            point=trace.best,
        )
        labels = trace.best["logits"].argmax(1) if self.known is None else self.known
        return Reconstruction(
            images=images,
            labels=labels,
            status=trace.status,
            vouched=torch.zeros(len(images), dtype=torch.bool, device=images.device),
            evidence=evidence,
            client=ClientEstimate(learning_rate=rate),
            seconds=seconds,
        )


@dataclass(frozen=True)
class Target:
    """scale · Δ in the attacker's precision, and the unit in which distances are counted.

    Attributes
    ----------
    distance
        Of ``reconstruct``.
    update
        Δ times a scale that is told, one tensor per layer.
    unit
        The distance at which g is as far from Δ as Δ is long.
    start
        A trained scale's first value, else 1.
    factor
        A trained scale over its variable, None for a scale that is told.
    unknowns
        {name: start} of the variable that a trained scale adds to the search.
    """

    distance: Callable[..., torch.Tensor]
    update: Tensors
    unit: float
    start: float = 1.0
    factor: float | None = None
    unknowns: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def of(
        cls, seen: Observation, distance: Callable, scale: float | Trained, dtype: torch.dtype
    ) -> "Target":
        """The target of a search."""
        if isinstance(scale, Trained):
            update = [layer.to(dtype) for layer in seen.delta]
            trained = (scale.start, scale.factor, {"growth": scale.variable})
            target = cls(distance, update, math.nan, *trained)
        else:
            target = cls(distance, [scale * layer.to(dtype) for layer in seen.delta], math.nan)
        # distance(-d, d)/4 is where g is as far from d as d is long, for all: ‖d‖² for the squares,
        # 1/2 for the cosine, whose small angles count as θ²/2
        one = torch.ones_like(target.update[0].sum())
        first = {name: one * value for name, value in target.unknowns.items()}
        opposite = [-layer * target.start for layer in target.update]
        return replace(target, unit=float(target._distance_from(opposite, first)) / 4)

    def scale(self, variables: Mapping[str, torch.Tensor]) -> torch.Tensor | None:
        """A trained scale at ``variables``, else None."""
        return None if self.factor is None else self.factor * variables["growth"]

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
class Problem:
    """The objective as a function of the search's variables.

    Attributes
    ----------
    model
        With the weights W_t, in the attacker's precision.
    target
        What its update is to meet.
    known
        The labels [B], None where the variables have their logits.
    update_of
        Of ``reconstruct``.
    of_client
        Names of the client's unknowns among the variables.
    total_variation
        Weight of that prior.
    """

    model: nn.Module
    target: Target
    known: torch.Tensor | None
    update_of: Callable
    of_client: tuple[str, ...]
    total_variation: float

    def evaluate(
        self, variables: Mapping[str, torch.Tensor], to_images: Callable
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(relative misfit, loss, images) at ``variables``."""
        images = to_images(variables["images"])
        labels = variables["logits"].softmax(1) if self.known is None else self.known
        client = {name: variables[name] for name in self.of_client}
        g = self.update_of(self.model, training_loss, images, labels, **client)
        return *self.compare(g, variables, images), images

    def compare(
        self, g: Tensors, variables: Mapping[str, torch.Tensor], images: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(relative misfit, loss) of images whose update is ``g``."""
        misfit, relative = self.target.misfit(g, variables)
        return relative, misfit + self.total_variation * objectives.total_variation(images)


class _Finished(Exception):
    """Raised inside the optimizer's closure to leave its loop at once."""


class _Search:
    """One descent over a dict of variables; ``objective(variables)`` returns (relative misfit,
    loss, images).
    """

    def __init__(self, variables, objective, trace: Trace, keep_every: int | None, problem):
        self.variables = {name: start.requires_grad_() for name, start in variables.items()}
        self.objective = objective
        self.trace = trace
        self.keep_every = keep_every
        self.k_of = problem.target.k_at
        trace.best = self._copy()

    def run(self, optimizer) -> None:
        """Descend until the verdict falls."""
        rule = self.trace.rule
        stepper = optimizer(list(self.variables.values()), rule.max_evaluations)
        steps = itertools.repeat(None, rule.max_iterations or rule.max_evaluations)
        try:
            for _ in steps:
                stepper.step(self._closure)
        except _Finished:
            pass
        if rule.whole_budget:
            self.trace.loss, self.trace.best = self._last(), self._copy()

    def _last(self) -> float:
        """The loss where the search has ended: its optimizer's last step is not evaluated."""
        _, loss, _ = self.objective(self.variables)
        return float(loss.detach())

    def _closure(self):
        misfit, loss, images = self.objective(self.variables)
        gradients = torch.autograd.grad(loss, list(self.variables.values()))
        for variable, gradient in zip(self.variables.values(), gradients):
            variable.grad = gradient
        trace = self.trace
        if self.keep_every and len(trace.losses) % self.keep_every == 0:
            trace.history.append((len(trace.losses), images.detach().clone()))
        k = self.k_of(self.variables)
        if k is not None:
            trace.ks.append(k)
        finite = all(gradient.isfinite().all() for gradient in gradients)
        if trace.add(float(loss.detach()), float(misfit), finite, self._copy):
            raise _Finished
        return loss.detach()

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
    return labels.to(next(seen.model.parameters()).device).clone()
