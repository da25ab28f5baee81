"""What fixes the length of a layer's input, beside its bias.

The ratio of the updates of a layer's weight and bias is its input where both moved at one rate. Of
a client that sets the rate of each tensor (LARS, LAMB), clips tensor by tensor, or trains biases
faster, it is a multiple of the input. A multiple leads to other scores, and to inputs of later
layers that are no multiples of the right ones, since biases are added on the way. So two things
tell, whatever the rates are:

- the last layer's δ over the classes that are no label, which follows the scores as softmax,
  sigmoid or squared distance make it;
- the direction of a later layer's input, which that layer's weight alone shows.

Over several steps both combine those at W_t, at W_{t+1} and halfway.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch

from dlm_core.beyond.tracing import Traced

# Multiples of an input that are compared: only the first may fit, and none beside it much better.
FACTORS = (1.0, 0.8, 1.25)
BESIDE = tuple(1 + 0.005 * step for step in range(-20, 21) if step)
SHARES = (0.0, 0.5, 1.0)  # of the way from W_t to W_{t+1}
FITS, SHARPLY = 1e-2, 1e-4  # how nearly: with equations to spare, and with few
EXACTLY = 1e-5  # of one step on one image, which every layer's one direction speaks of
SPARE = 3
DEPENDENT = 1e-9  # of columns
BACKWARDS = 0.3  # of a sum, what interpolation may take from one of its points
WORSE = 5.0  # by how much the others have to fit worse
ALIKE = 1e-3  # how nearly scores are multiples

Link = Callable[[torch.Tensor], torch.Tensor]


def _softmax(scores: torch.Tensor) -> torch.Tensor:
    return scores.softmax(-1)


def _itself(scores: torch.Tensor) -> torch.Tensor:
    return scores


def fixed(
    traced: Traced,
    after: Mapping[str, torch.Tensor],
    name: str,
    values: torch.Tensor,
    updates: Mapping[str, torch.Tensor],
    signals: Sequence[torch.Tensor],
    limit: float = FITS,
) -> bool | None:
    """Whether the length of a layer's input is that of which others speak; None where none does.
    Where chance stands behind it (dropout, noise), the scores cannot; the next layer's input can,
    by the numbers of it that dropout left.

    Parameters
    ----------
    traced
        The network, at W_t.
    after
        W_{t+1}.
    name, values
        The layer, and its input [features].
    updates
        {layer: its weight's update [outputs, features]}; those behind this one are taken.
    signals
        [K] each, what δ of the last layer may be, up to a positive factor.
    limit
        How nearly they have to follow, relative; ``FITS`` at most.
    """
    factors = torch.tensor([*FACTORS, *BESIDE], dtype=values.dtype, device=values.device)
    given = values * factors[:, None]
    chance = False
    try:
        one, other = (traced.passed_behind(name, given, train=True, seed=s).scores for s in (0, 1))
        chance = not torch.equal(one, other)
    except Exception:  # one image in batch norm
        pass
    try:
        behind = traced.behind(name, values)
        way = []
        for share in SHARES:
            with traced.holding(after, share):
                way.append(traced.passed_behind(name, given))
        scores = torch.stack([each.scores for each in way], 1)
        # with biases of 0 another loss may follow the scores of a multiple nearly as well
        sharply = _multiples(scores[: len(FACTORS), 0])
        if not chance and any(_by_scores(scores, signal, sharply, limit) for signal in signals):
            return True
        told = any(
            _by_direction(torch.stack([one.inputs[each] for one in way], 1), update, chance, limit)
            for each, update in updates.items()
            if each in behind and traced.rows[each] == 1
        )
    except Exception:  # whatever a user's network raises
        return None
    scored = any(len(signal) == scores.shape[2] for signal in signals)
    return told or (False if scored and not chance else None)


def _by_direction(way: torch.Tensor, update: torch.Tensor, dropped: bool, limit: float) -> bool:
    """Whether a later layer's update combines its inputs [factors, shares, features] for the first
    factor alone; where numbers may be ``dropped``, by those that moved its weights.
    """
    if dropped:
        left = update.any(0)
        way, update = way[..., left], update[:, left]
    if not update.any():
        return False
    return any(
        _first_alone([_left(each[:taken].T, update.T) for each in way], limit)
        for taken in (1, len(SHARES))  # of one step, of several
        if update.shape[1] >= taken + SPARE
    )


def _multiples(scores: torch.Tensor) -> bool:
    """Whether the scores [factors, K] are those of the first times the factors."""
    factors = torch.tensor(FACTORS).to(scores)[:, None]
    away = (scores - factors * scores[0]).norm(dim=1)
    return bool((away <= ALIKE * scores[0].norm()).all())


def _by_scores(way: torch.Tensor, signal: torch.Tensor, sharply: bool, limit: float) -> bool:
    """Whether δ follows the scores [factors, shares, K] of the first factor alone."""
    if way.shape[2] != len(signal):
        return False
    rising = signal > 0
    but_label = torch.arange(len(signal), device=signal.device) != signal.argmin()
    links: list[tuple[Link, torch.Tensor]]
    links = [(_softmax, rising), (torch.sigmoid, rising), (_itself, but_label)]
    for link, others in links:
        target = signal[others]
        for each in zip(*(_columns(link(one), link is _softmax) for one in way)):
            columns = each[0].shape[1]
            spare = len(target) - columns
            if spare < (1 if columns == 1 else SPARE):
                continue
            nearly = min(limit, SHARPLY) if sharply or spare < SPARE else limit
            alone = _first_alone([_left(one[others], target) for one in each], nearly)
            if alone and _on_the_way(each[0][others], target):
                return True
    return False


def _columns(way: torch.Tensor, smoothed: bool) -> Iterator[torch.Tensor]:
    """What δ may combine of [shares, K]: of one step, of several, and of smoothed labels."""
    for taken in (way[:1], way):
        yield taken.T
        if smoothed:
            yield torch.cat([taken, torch.ones_like(way[:1])]).T


def _on_the_way(columns: torch.Tensor, target: torch.Tensor) -> bool:
    """Whether the target is a sum over the way, [n, shares (+ 1)]. Differences between its points
    are the step itself, which fits δ whatever the input.
    """
    taken = torch.linalg.lstsq(columns, target[:, None]).solution[: len(SHARES), 0]
    if columns.shape[1] < len(SHARES):  # of one step
        return bool(taken[0] > 0)
    return bool(taken.sum() > 0 and (taken > -BACKWARDS * taken.sum()).all())


def _first_alone(left: Sequence[float], limit: float) -> bool:
    first, others, beside = left[0], left[1 : len(FACTORS)], left[len(FACTORS) :]
    return first <= limit and min(others) > WORSE * first and WORSE * min(beside) >= first


def _left(columns: torch.Tensor, target: torch.Tensor) -> float:
    """What of the target, [n] or [n, several], no columns combine to, relative to its size."""
    lengths = columns.norm(dim=0)
    if not len(target) or not bool((lengths > 0).all()):
        return 1.0
    basis = torch.linalg.svd(columns / lengths, full_matrices=False)
    kept = basis.U[:, basis.S / basis.S[0] > DEPENDENT]
    return float((target - kept @ (kept.T @ target)).norm() / target.norm())
