"""PyTorch's L-BFGS for many lanes at once: each has its own history, step length and line search.

What a lane decides are numbers. They stand here as in PyTorch's code, one lane at a time, as a
generator that says what it wants next. The vectors of all lanes are computed together.
Sources: ``torch.optim.LBFGS``; for the direction as two triangular systems, Byrd, Nocedal and
Schnabel, Representations of quasi-Newton matrices (1994).
"""

import math
from collections.abc import Generator, Mapping, Sequence
from typing import Any, NamedTuple

import torch

CURVATURE = 1e-10  # y·s of a step that is remembered, as PyTorch has it
ARMIJO, WOLFE, NARROW = 1e-4, 0.9, 1e-9  # c1, c2 and the narrowest bracket, as PyTorch has them
SLOTS = 4  # of gradients: where the line search starts, its bracket's two ends, and the next one
START = 0  # the first of them

Triple = tuple[float, float, float]


class Request(NamedTuple):
    """What a lane wants next.

    Attributes
    ----------
    kind
        "evaluate" at a step of length t from where it stands, which is answered by (loss, slope
        along the direction, largest entry of the gradient); "move" by such a step; or "direct", a
        new direction after a step of length t, from the gradient kept in ``slot``, answered by
        (slope along it, its largest entry, sum of the gradient's absolute entries).
    t
        A step length, in directions.
    slot
        Where a gradient is kept.
    """

    kind: str
    t: float
    slot: int = START


Plan = Generator[Request, Triple, Any]


class Point(NamedTuple):
    """A step length that a line search has tried, what it found, and where the gradient is kept."""

    t: float
    loss: float
    slope: float
    largest: float
    slot: int


class Lanes:
    """L descents, one from each row of ``variables``.

    Parameters
    ----------
    variables
        {name: starts [L, …]}.
    settings
        Of ``torch.optim.LBFGS``: its ``param_groups[0]``.
    steps
        How many ``step`` each lane has, [L].
    """

    def __init__(
        self,
        variables: Mapping[str, torch.Tensor],
        settings: Mapping[str, Any],
        steps: Sequence[int],
    ) -> None:
        self.shapes = {name: each.shape[1:] for name, each in variables.items()}
        self.x = torch.cat([each.detach().flatten(1) for each in _columns(variables)], 1)
        self.d = torch.zeros_like(self.x)
        self.gradients = self.x.new_zeros(SLOTS, *self.x.shape)
        self.memory = _Memory(self.x, settings["history_size"])
        self.plans = [_descent(settings, count) for count in steps]
        self.requests: list[Request | None] = [next(plan) for plan in self.plans]

    def points(self) -> dict[str, torch.Tensor]:
        """{name: values [L, …]}: where each lane is to be evaluated."""
        at = self.x + self._lengths("evaluate") * self.d
        sizes = [shape.numel() for shape in self.shapes.values()]
        parts = zip(self.shapes.items(), at.split(sizes, 1))
        return {name: part.reshape(len(at), *shape) for (name, shape), part in parts}

    def take(
        self,
        losses: Sequence[float],
        gradient: Mapping[str, torch.Tensor],
        largest: Sequence[float],
    ) -> list[int]:
        """Go on from what was found at ``points``, and return the lanes whose steps are used up.

        Parameters
        ----------
        losses
            [L].
        gradient
            {name: [L, …]}.
        largest
            [L], the largest absolute entry of each lane's.
        """
        flat = torch.cat([each.flatten(1) for each in _columns(gradient)], 1)
        self.gradients[self._slots(), self._rows()] = flat
        found = zip(losses, (flat * self.d).sum(1).tolist(), largest)
        self._answer("evaluate", list(found))
        while True:
            if self._asked("move"):
                self.x = self.x + self._lengths("move") * self.d
                self._answer("move", [(0.0, 0.0, 0.0)] * len(self.x))
            elif self._asked("direct"):
                self._answer("direct", self._direct())
            else:
                return [lane for lane, each in enumerate(self.requests) if each is None]

    def keep(self, lanes: Sequence[int]) -> None:
        """Leave all others."""
        chosen = torch.tensor(lanes, device=self.x.device)
        self.x, self.d, self.gradients = self.x[chosen], self.d[chosen], self.gradients[:, chosen]
        self.memory.keep(chosen)
        self.plans = [self.plans[lane] for lane in lanes]
        self.requests = [self.requests[lane] for lane in lanes]

    def _direct(self) -> list[Triple]:
        """New directions of the lanes that ask for them."""
        asked = torch.tensor(self._asks("direct"), device=self.x.device)
        now = self.gradients[self._slots(), self._rows()]
        step = self._lengths("direct") * self.d
        found = self.memory.direction(asked, now, now - self.gradients[START], step)
        self.d = torch.where(asked[:, None], found, self.d)
        self.gradients[START] = torch.where(asked[:, None], now, self.gradients[START])
        sizes = ((now * found).sum(1), found.abs().amax(1), now.abs().sum(1))
        return [(a, b, c) for a, b, c in torch.stack(sizes, 1).tolist()]

    def _answer(self, kind: str, found: Sequence[Triple]) -> None:
        for lane, asks in enumerate(self._asks(kind)):
            if asks:
                try:
                    self.requests[lane] = self.plans[lane].send(found[lane])
                except StopIteration:
                    self.requests[lane] = None

    def _asks(self, kind: str) -> list[bool]:
        return [each is not None and each.kind == kind for each in self.requests]

    def _asked(self, kind: str) -> bool:
        return any(self._asks(kind))

    def _lengths(self, kind: str) -> torch.Tensor:
        """[L, 1], 0 of lanes that ask for something else."""
        t = [each.t if each is not None and each.kind == kind else 0.0 for each in self.requests]
        return self.x.new_tensor(t)[:, None]

    def _slots(self) -> torch.Tensor:
        slots = [SLOTS - 1 if each is None else each.slot for each in self.requests]
        return torch.tensor(slots, device=self.x.device)

    def _rows(self) -> torch.Tensor:
        return torch.arange(len(self.x), device=self.x.device)


class _Memory:
    """The last steps s and changes y of the gradient of each lane, and their inner products.

    They lie in rings: where one is full, its oldest entry makes room.
    """

    def __init__(self, like: torch.Tensor, size: int) -> None:
        lanes, n = like.shape
        self.size, self.used = size, 0
        self.steps, self.changes = (like.new_zeros(lanes, size, n) for _ in range(2))
        exact = like.new_zeros(0, dtype=torch.float64)
        # s_i·y_j and y_i·y_j
        self.crossed, self.squared = (exact.new_zeros(lanes, size, size) for _ in range(2))
        self.count = torch.zeros(lanes, dtype=torch.long, device=like.device)
        self.scale = exact.new_ones(lanes)

    def keep(self, chosen: torch.Tensor) -> None:
        """Leave all other lanes."""
        for name in ("steps", "changes", "crossed", "squared", "count", "scale"):
            setattr(self, name, getattr(self, name)[chosen])

    def direction(
        self, asked: torch.Tensor, g: torch.Tensor, y: torch.Tensor, s: torch.Tensor
    ) -> torch.Tensor:
        """-H g of each lane, [L, n], H with y and s of those that ``asked`` for it, [L]."""
        curvature = (y * s).sum(1)
        added = asked & (curvature > CURVATURE)
        place, rows = self.count % self.size, torch.arange(len(g), device=g.device)
        for kept, new in ((self.steps, s), (self.changes, y)):
            kept[rows, place] = torch.where(added[:, None], new, kept[rows, place])
        self.scale = torch.where(added, (curvature / (y * y).sum(1)).double(), self.scale)
        self.count = self.count + added
        self.used = min(self.used + 1, self.size)
        steps, changes = self.steps[:, : self.used], self.changes[:, : self.used]
        three = torch.stack([g, y, s], 2)
        on_steps, on_changes = (torch.bmm(each, three).double() for each in (steps, changes))
        here = (torch.arange(self.used, device=g.device) == place[:, None]) & added[:, None]
        column, row = here[:, None, :], here[:, :, None]
        crossed, squared = self._products()
        crossed[:] = torch.where(column, on_steps[..., 1:2], crossed)
        crossed[:] = torch.where(row, on_changes[..., 2][:, None, :], crossed)
        squared[:] = torch.where(column, on_changes[..., 1:2], squared)
        squared[:] = torch.where(row, on_changes[..., 1][:, None, :], squared)
        of_steps, of_changes = self._coefficients(on_steps[..., 0], on_changes[..., 0])
        found = self.scale[:, None] * g
        found += torch.einsum("lk,lkn->ln", of_steps.to(g), steps)
        found -= torch.einsum("lk,lkn->ln", of_changes.to(g), changes)
        return -found.to(g)

    def _products(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The part of the inner products that is used: views."""
        used = slice(self.used)
        return self.crossed[:, used, used], self.squared[:, used, used]

    def _coefficients(
        self, on_steps: torch.Tensor, on_changes: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What the two loops over the history, from the newest to the oldest and back, take of each
        step and of each change: two triangular systems, [L, used].

        Parameters
        ----------
        on_steps, on_changes
            s_i·g and y_i·g.
        """
        used = self.used
        oldest = torch.where(self.count > self.size, self.count % self.size, 0)
        by_age = (torch.arange(used, device=oldest.device) + oldest[:, None]) % used
        crossed, squared = (
            each.gather(1, by_age[:, :, None].expand(-1, -1, used)).gather(
                2, by_age[:, None, :].expand(-1, used, -1)
            )
            for each in self._products()
        )
        upper = crossed.triu()
        diagonal = upper.diagonal(dim1=1, dim2=2)
        diagonal += (diagonal == 0).to(diagonal)  # of places that are not used yet
        on_steps, on_changes = (
            each.gather(1, by_age)[..., None] for each in (on_steps, on_changes)
        )
        first = torch.linalg.solve_triangular(upper, on_steps, upper=True)
        scale = self.scale[:, None, None]
        rest = diagonal[..., None] * first - scale * (on_changes - squared @ first)
        second = torch.linalg.solve_triangular(upper.mT, rest, upper=False)
        places = torch.zeros_like(first[..., 0])
        both = (second[..., 0], (scale * first)[..., 0])
        return places.scatter(1, by_age, both[0]), places.scatter(1, by_age, both[1])


def _columns(variables: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
    """Each [L, n], of numbers too."""
    return [each.reshape(len(each), -1) for each in variables.values()]


def _descent(settings: Mapping[str, Any], steps: int) -> Plan:
    """``steps`` calls of ``torch.optim.LBFGS.step``."""
    flat, still = settings["tolerance_grad"], settings["tolerance_change"]
    t, is_first = 0.0, True
    for _ in range(steps):
        loss, _, largest = yield Request("evaluate", 0.0, 1)
        if largest <= flat:
            continue
        slot, evaluations = 1, 1
        for turn in range(settings["max_iter"]):
            slope, longest, total = yield Request("direct", t, slot)
            before = loss
            t = settings["lr"] * (min(1.0, 1.0 / total) if is_first else 1.0)
            is_first = False
            if slope > -still:
                break
            is_last = turn == settings["max_iter"] - 1
            if settings["line_search_fn"]:
                start = Point(0.0, loss, slope, largest, START)
                found, used = yield from _line_search(
                    start, t, longest, settings["max_eval"] - evaluations
                )
                _, loss, _, largest, slot = found
                t = found.t
                yield Request("move", t)
            else:
                yield Request("move", t)
                used = 0 if is_last else 1
                if not is_last:
                    loss, _, largest = yield Request("evaluate", 0.0, 1)
            evaluations += used
            if evaluations >= settings["max_eval"] or largest <= flat:
                break
            if longest * abs(t) <= still or abs(loss - before) < still:
                break


def _line_search(
    start: Point, t: float, longest: float, most: int
) -> Generator[Request, Triple, tuple[Point, int]]:
    """The strong-Wolfe line search of ``torch.optim.LBFGS``: (where it ends, its evaluations).

    Parameters
    ----------
    start
        Of step length 0.
    t
        The first length to try.
    longest
        The direction's largest entry.
    most
        Evaluations after the first.
    """
    new = yield from _tried(t, 1)
    before, turns = start, 0
    while turns < most:
        high = new.loss > start.loss + ARMIJO * new.t * start.slope
        if high or (turns > 1 and new.loss >= before.loss):
            bracket = [before, new]
            break
        if abs(new.slope) <= -WOLFE * start.slope:
            return new, turns + 1
        if new.slope >= 0:
            bracket = [before, new]
            break
        bounds = (new.t + 0.01 * (new.t - before.t), new.t * 10)
        t = _cubic_minimum(before, new, bounds)
        before = new
        new = yield from _tried(t, _free(before))
        turns += 1
    else:
        bracket = [start, new]
    return (yield from _zoom(start, bracket, longest, turns, most))


def _zoom(
    start: Point, bracket: list[Point], longest: float, turns: int, most: int
) -> Generator[Request, Triple, tuple[Point, int]]:
    """The second part: it narrows a bracket."""
    stuck, done = False, False
    low = 0 if bracket[0].loss <= bracket[1].loss else 1
    while not done and turns < most:
        left, right = sorted(each.t for each in bracket)
        if (right - left) * longest < NARROW:
            break
        t = _cubic_minimum(bracket[0], bracket[1], (left, right))
        margin = 0.1 * (right - left)
        if min(right - t, t - left) < margin:
            if stuck or t >= right or t <= left:
                t = right - margin if abs(t - right) < abs(t - left) else left + margin
                stuck = False
            else:
                stuck = True
        else:
            stuck = False
        new = yield from _tried(t, _free(*bracket))
        turns += 1
        high = 1 - low
        if new.loss > start.loss + ARMIJO * t * start.slope or new.loss >= bracket[low].loss:
            bracket[high] = new
            low = 0 if bracket[0].loss <= bracket[1].loss else 1
        else:
            done = abs(new.slope) <= -WOLFE * start.slope
            if not done and new.slope * (bracket[high].t - bracket[low].t) >= 0:
                bracket[high] = bracket[low]
            bracket[low] = new
    return bracket[low], turns + 1


def _tried(t: float, slot: int) -> Generator[Request, Triple, Point]:
    return Point(t, *(yield Request("evaluate", t, slot)), slot)


def _free(*held: Point) -> int:
    """A slot that none of these is kept in."""
    return next(slot for slot in range(1, SLOTS) if slot not in [each.slot for each in held])


def _cubic_minimum(one: Point, other: Point, bounds: tuple[float, float]) -> float:
    """Where the cubic through two points with their slopes is least, within bounds."""
    low, high = bounds
    if one.t > other.t:
        one, other = other, one
    try:
        d1 = one.slope + other.slope - 3 * (one.loss - other.loss) / (one.t - other.t)
        square = d1 * d1 - one.slope * other.slope
        if not square >= 0:
            return (low + high) / 2
        d2 = math.sqrt(square)
        share = (other.slope + d2 - d1) / (other.slope - one.slope + 2 * d2)
    except ZeroDivisionError:
        return (low + high) / 2
    return min(max(other.t - (other.t - one.t) * share, low), high)
