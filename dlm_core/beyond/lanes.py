"""Many searches as one: each is a lane of a batch, with its own network, update, start, history and
verdict.

``attacks.dlm_plus([one, another], seed=[0, 1])`` comes here. Searches of one architecture share a
batch. What a lane is told, meets and finds is what ``search`` says of a search by itself, and
agrees with it to rounding.
"""

import math
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.func import vmap

from dlm_core import objectives
from dlm_core.beyond import lbfgs
from dlm_core.beyond.stacked import Networks
from dlm_core.federated import loss as training_loss
from dlm_core.optimizers import SignedAdam
from dlm_core.results import Reconstruction, Status
from dlm_core.search import Prepared
from dlm_core.threads import for_network

# By so much, relatively, may the first loss of a batch differ from that of the search by itself.
AGREE = 1e-3
# Lanes that have ended leave once they are such a part of the batch: to leave is to copy the rest.
LEAVING = 1 / 16
# Optimizers that treat every number by itself, so that those of many lanes can be put together; a
# class derived from them may do otherwise.
ELEMENTWISE = (
    *(torch.optim.Adam, torch.optim.SGD, torch.optim.RMSprop, torch.optim.Adagrad),
    SignedAdam,
)

Variables = Mapping[str, torch.Tensor]


class _Apart(Exception):
    """Searches cannot be computed as one; its text says why."""


def run(searches: Sequence[Prepared]) -> list[Reconstruction]:
    """Run them, and return their results in order.

    Parameters
    ----------
    searches
        Of any networks and settings. What cannot be computed together, such as a client of several
        steps, is computed one after the other.

    Notes
    -----
    Restarts are lanes, too; those after the first that converges are not used. A result's seconds
    are those from the beginning to the end of its last lane.

    On one core, 16 lanes of the paper's LeNet in float32 were 1.3 to 1.7 times as fast as one
    search after the other; a lane by itself takes twice as long as its search, and lanes of the
    MLP do not pay there. On one H100, 1,024 lanes were 236 times as fast on LeNet, and 135 times
    on the MLP (docs/gpu.md).
    """
    found: dict[int, Reconstruction] = {}
    for group in _groups(searches):
        with for_network(group[0].seen.model):
            try:
                results = _Batch(group).run()
            except _Apart as why:
                if str(why):
                    warnings.warn(f"{why}: one search after the other", stacklevel=3)
                results = [search.run() for search in group]
        found |= {id(search): result for search, result in zip(group, results)}
    return [found[id(search)] for search in searches]


def _groups(searches: Sequence[Prepared]) -> list[list[Prepared]]:
    """Those that may share a batch, together."""
    groups: list[list[Prepared]] = []
    for search in searches:
        group = next((each for each in groups if _alike(each[0], search)), None)
        if group is None:
            groups.append([search])
        else:
            group.append(search)
    return groups


def _alike(one: Prepared, other: Prepared) -> bool:
    """Whether they differ in numbers and tensors alone."""
    return _look(one) == _look(other) and _same_network(one.seen.model, other.seen.model)


def _look(search: Prepared) -> tuple:
    names = ("num_images", "dtype", "coordinates", "optimizer", "update_of")
    own = tuple(getattr(search, name) for name in names)
    shape, device = search.seen.image_shape, search.target.update[0].device
    known, trained = search.known is None, search.target.factor is None
    variables = (*search.unknowns, *search.resume)
    frame = _frame(search.distance, [])
    return (*own, shape, device, known, trained, variables, frame, search.rule.max_evaluations)


def _same_network(one: nn.Module, other: nn.Module) -> bool:
    """Whether two networks are the same but for their weights."""
    if one is other:
        return True
    pairs = list(zip(one.modules(), other.modules()))
    shapes = [[(n, w.shape) for n, w in each.state_dict().items()] for each in (one, other)]
    frozen = [[p.requires_grad for p in each.parameters()] for each in (one, other)]
    if shapes[0] != shapes[1] or frozen[0] != frozen[1] or len(pairs) != len([*one.modules()]):
        return False
    return all(type(a) is type(b) and _same_settings(vars(a), vars(b)) for a, b in pairs)


def _same_settings(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    if one.keys() != other.keys():
        return False
    for name in one.keys() - {"_parameters", "_buffers", "_modules"}:
        a, b = one[name], other[name]
        try:
            if not (a is b or bool(a == b)):
                return False
        except (RuntimeError, ValueError, TypeError):  # such as of two tensors
            return False
    return True


class _Lane:
    """One descent: of a search, from one of its starts."""

    def __init__(self, search: Prepared, restart: int) -> None:
        self.search = search
        self.start, self.to_images = search.start(restart)
        self.trace = search.trace()
        self.is_last = False  # its steps are used up, and its last point is to be evaluated
        self.ended = False
        self.seconds = 0.0

    def take(
        self, loss: float, misfit: float, finite: bool, growth: float | None, images: torch.Tensor
    ) -> bool:
        """Note an evaluation; return whether its point is the best."""
        rule, trace = self.search.rule, self.trace
        if self.is_last:
            self.ended = True
        else:
            keep_every, factor = self.search.keep_every, self.search.target.factor
            if keep_every and len(trace.losses) % keep_every == 0:
                trace.history.append((len(trace.losses), images.detach().clone()))
            if growth is not None and factor is not None:
                trace.ks.append(factor * growth)
            before = trace.loss
            self.ended = trace.add(loss, misfit, finite, dict)
            if not (rule.whole_budget and self.ended):
                return trace.loss < before
        trace.loss = loss
        return True


class _Batch:
    """Searches that differ in numbers and tensors alone, with all their restarts."""

    def __init__(self, searches: Sequence[Prepared]) -> None:
        if searches[0].update_of is not objectives.gradient:
            raise _Apart
        self.began = time.perf_counter()
        self.searches = searches
        self.every = [_Lane(each, i) for each in searches for i in range(each.restarts)]
        self.lanes = list(self.every)
        names = self.lanes[0].start
        self.best = {n: torch.stack([lane.start[n] for lane in self.lanes]) for n in names}
        self.stepper = _stepper(self.lanes, self.best)
        self.problem = _Together(self.lanes)

    def run(self) -> list[Reconstruction]:
        """Descend until the verdict has fallen on every lane."""
        while self.lanes:
            self._evaluate()
            ended = sum(lane.ended for lane in self.lanes)
            if ended and ended >= LEAVING * len(self.lanes):
                self._leave()
        return [self._result(search) for search in self.searches]

    def _evaluate(self) -> None:
        """One evaluation of every lane, and what each makes of it."""
        points = {n: each.detach().requires_grad_() for n, each in self.stepper.points().items()}
        relative, loss, images = self.problem.evaluate(points)
        found = torch.autograd.grad(loss.sum(), list(points.values()))
        largest = [each.abs().reshape(len(each), -1).amax(1) for each in found]
        columns = [loss.detach(), relative, torch.stack(largest).amax(0)]
        growth = points["growth"].detach() if "growth" in points else torch.zeros_like(loss)
        numbers = torch.stack([*columns, growth]).double().tolist()
        better = [
            i
            for i, (lane, a, b, size, k) in enumerate(zip(self.lanes, *numbers))
            if not lane.ended and lane.take(a, b, math.isfinite(size), k, images[i])
        ]
        at = torch.tensor(better, dtype=torch.long, device=loss.device)
        for name, best in self.best.items():
            best[at] = points[name].detach()[at]
        for i in self.stepper.take(numbers[0], dict(zip(points, found)), numbers[2]):
            lane = self.lanes[i]
            lane.is_last = lane.search.rule.whole_budget
            lane.ended = lane.ended or not lane.is_last
        for lane in self.lanes:
            if not lane.ended:
                lane.seconds = time.perf_counter() - self.began

    def _leave(self) -> None:
        """Leave the lanes that have ended."""
        for i, lane in enumerate(self.lanes):
            if lane.ended:
                lane.trace.best = {name: best[i].clone() for name, best in self.best.items()}
        staying = [i for i, lane in enumerate(self.lanes) if not lane.ended]
        self.lanes = [self.lanes[i] for i in staying]
        if staying:
            self.best = {name: best[staying] for name, best in self.best.items()}
            self.stepper.keep(staying)
            self.problem.keep(staying)

    def _result(self, search: Prepared) -> Reconstruction:
        """Of its restarts up to the first that has converged, as one after the other."""
        lanes = []
        for lane in self.every:
            if lane.search is search:
                lanes.append(lane)
                if lane.trace.status is Status.CONVERGED:
                    break
        ends = [(lane.trace, lane.to_images) for lane in lanes]
        return search.result(ends, max(lane.seconds for lane in lanes))


def _stepper(lanes: Sequence[_Lane], starts: Variables) -> "lbfgs.Lanes | _Elementwise":
    """The searches' optimizer, for all lanes."""
    rules = [lane.search.rule for lane in lanes]
    steps = [each.max_iterations or each.max_evaluations for each in rules]
    variables = {name: each.clone().requires_grad_() for name, each in starts.items()}
    optimizer = lanes[0].search.optimizer(list(variables.values()), rules[0].max_evaluations)
    if type(optimizer) is torch.optim.LBFGS:
        return lbfgs.Lanes(variables, optimizer.param_groups[0], steps)
    if type(optimizer) in ELEMENTWISE:
        return _Elementwise(variables, optimizer, steps)
    raise _Apart(f"{type(optimizer).__name__} is no optimizer of many searches at once")


class _Elementwise:
    """PyTorch's own optimizer, with all lanes in its variables. Methods as of ``lbfgs.Lanes``."""

    def __init__(
        self,
        variables: Mapping[str, torch.Tensor],
        optimizer: torch.optim.Optimizer,
        steps: Sequence[int],
    ) -> None:
        self.variables, self.optimizer, self.steps, self.taken = variables, optimizer, steps, 0

    def points(self) -> Variables:
        return self.variables

    def take(
        self, losses: Sequence[float], gradient: Variables, largest: Sequence[float]
    ) -> list[int]:
        for name, variable in self.variables.items():
            variable.grad = gradient[name]
        self.optimizer.step(lambda: 0.0)
        self.taken += 1
        return [lane for lane, most in enumerate(self.steps) if most <= self.taken]

    def keep(self, lanes: Sequence[int]) -> None:
        self.steps = [self.steps[lane] for lane in lanes]
        for variable in self.variables.values():
            state = self.optimizer.state[variable]
            for name, kept in state.items():
                if isinstance(kept, torch.Tensor) and kept.shape == variable.shape:
                    state[name] = kept[lanes]
            variable.grad, variable.data = None, variable.detach()[lanes]


class _Together:
    """The objective of all lanes: ``search.Problem`` of each, mapped over stacked tensors.

    Raises
    ------
    _Apart
        Where the network cannot be mapped, or is another one than by itself.
    """

    def __init__(self, lanes: Sequence[_Lane]) -> None:
        first = lanes[0]
        searches = [lane.search for lane in lanes]
        self.problem, self.to_images = first.search.problem, first.to_images
        like = first.search.target.update[0]
        numbers = [
            (each.target.unit, each.target.start, each.target.factor or 1.0, each.total_variation)
            for each in searches
        ]
        bound: list[list[Any]] = [[] for _ in searches]
        for search, found in zip(searches, bound):
            _frame(search.distance, found)
        self.own: dict[str, Any] = {
            "update": [torch.stack(layers) for layers in zip(*(s.target.update for s in searches))],
            "numbers": like.new_tensor(numbers),
            "bound": [_stacked(each, like) for each in zip(*bound)],
        }
        known = [each.known for each in searches if each.known is not None]
        self.known = torch.stack(known) if known else None
        name = type(self.problem.model).__name__
        try:
            self.network = Networks(self.problem.model, [each.seen.model for each in searches])
            agrees = self._agrees(lanes)
        except torch.OutOfMemoryError:  # of fewer it may be computed
            raise
        except (RuntimeError, NotImplementedError, KeyError) as error:
            said = str(error).split(". ")[0].split("\n")[0]
            raise _Apart(f"{name} cannot be computed for many searches at once ({said})") from None
        if not agrees:
            raise _Apart(f"{name} computes another loss for many searches at once")

    def evaluate(self, variables: Variables) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(relative misfits [L], losses [L], images [L, B, C, H, W])."""
        images = vmap(self.to_images)(variables["images"])
        labels = variables["logits"].softmax(2) if self.known is None else self.known
        g = objectives.gradient(self.network, _summed_loss, images, labels)
        relative, loss = vmap(self._compare)(g, dict(variables), images, self.own)
        return relative, loss, images

    def _compare(self, g, variables, images, own):
        """``Problem.compare`` of one lane."""
        unit, start, factor, total_variation = own["numbers"]
        target = replace(
            self.problem.target,
            distance=_filled(self.problem.target.distance, iter(own["bound"])),
            update=own["update"],
            unit=unit,
            start=start,
            factor=None if self.problem.target.factor is None else factor,
        )
        problem = replace(self.problem, target=target, total_variation=total_variation)
        return problem.compare(g, variables, images)

    def keep(self, lanes: Sequence[int]) -> None:
        """Leave all others."""
        self.network.keep(lanes)
        self.known = None if self.known is None else self.known[lanes]
        self.own = {
            name: each[lanes] if isinstance(each, torch.Tensor) else [one[lanes] for one in each]
            for name, each in self.own.items()
        }

    def _agrees(self, lanes: Sequence[_Lane]) -> bool:
        """Whether the first loss of the first and of the last lane is theirs by themselves."""
        starts = {n: torch.stack([lane.start[n] for lane in lanes]) for n in lanes[0].start}
        _, losses, _ = self.evaluate(starts)
        for i in (0, -1):
            _, alone, _ = lanes[i].search.problem.evaluate(lanes[i].start, lanes[i].to_images)
            if not torch.isclose(losses[i], alone, rtol=AGREE, equal_nan=True):
                return False
        return True


def _summed_loss(scores: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Of all lanes: each one's gradient is its own."""
    return vmap(training_loss)(scores, labels).sum()


def _frame(value: Any, found: list[Any]) -> Any:
    """What a distance is apart from its tensors and numbers, which go to ``found``.

    A distance that has some of its own is a ``functools.partial`` of a function of them.
    """
    if isinstance(value, partial):
        parts = (value.func, value.args, value.keywords)
        return (partial, *(_frame(each, found) for each in parts))
    if isinstance(value, Mapping):
        return tuple((name, _frame(each, found)) for name, each in value.items())
    if isinstance(value, (list, tuple)):
        return tuple(_frame(each, found) for each in value)
    if isinstance(value, (torch.Tensor, float)):
        found.append(value)
        return tuple(value.shape) if isinstance(value, torch.Tensor) else float
    return value


def _filled(value: Any, found: Iterator[Any]) -> Any:
    """A distance like ``value``, with the tensors of ``found``."""
    if isinstance(value, partial):
        function, given = _filled(value.func, found), _filled(value.args, found)
        return partial(function, *given, **_filled(value.keywords, found))
    if isinstance(value, Mapping):
        return {name: _filled(each, found) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return tuple(_filled(each, found) for each in value)
    return next(found) if isinstance(value, (torch.Tensor, float)) else value


def _stacked(values: Sequence[Any], like: torch.Tensor) -> torch.Tensor:
    if isinstance(values[0], torch.Tensor):
        return torch.stack(list(values))
    return like.new_tensor(values)
