"""Several local steps: DLM+ with the client's training simulated inside the objective.

    min over x, log η:  Σ_layers ‖Δ(x, y, η, E) - Δ‖²/n(Δ)²,    E by the lowest loss

Where DLM+ takes the update for one gradient, this takes it for E steps of a named optimizer, and η
and E are found on the way. DLM+ divides the simulated side by its own norm, since it has no η; here
its length is the best evidence of η there is, and keeps it from running away. A wrong E still finds
most of the image, so each E tried starts where the best one so far ended.
"""

import copy
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from scipy.optimize import minimize_scalar
from torch import nn

from dlm_core import check, label_inference, objectives, records
from dlm_core.arrays import Labels
from dlm_core.beyond import clients
from dlm_core.beyond.chance import draws_from_seed
from dlm_core.federated import loss as training_loss
from dlm_core.observation import Observation
from dlm_core.results import ClientEstimate, Reconstruction, SearchEvidence, Status
from dlm_core.search import known_labels, reconstruct
from dlm_core.stopping import by_loss
from dlm_core.threads import for_network

FIRST = 2  # E of the first search
FINEST = 8  # the first climb leaves out neighbours closer than E/8
SHORT = 40  # evaluations that tell two values of E apart
HURRY = 20  # patience of these searches
MOST = 60  # searches, about; cut short, each may end a little lower at another E, and so for ever
LOWER = 0.999  # of its loss that a longer search must reach, or the search for E ends
# E for which ``label_inference.infer`` assumes several steps; it does not matter how many.
HEAD_STEPS = 16
TOLERANCE = 2e-7  # η takes a closer fit than the image does
RATE_TOLERANCE = 0.02  # of log η, to start from
FINE_RATE = 1e-4  # to compare objectives by

Tensors = Sequence[torch.Tensor]
Search = Callable[..., Reconstruction]


@records.attack(
    "unrolled_dlm",
    title="unrolled DLM+",
    colour=5,
    marker="X",
    assumes=("the kind of optimizer and its options", "the batch size, where it is not all images"),
    client="several local steps; takes a minute or more",
    audited=6,
)
@check.renamed(
    steps="local_steps",
    client="client_optimizer",
    client_options="optimizer_options",
    max_steps="max_local_steps",
)
@records.passes_on_to(reconstruct, fixed=["distance", "update_of", "unknowns", "resume", "scale"])
@check.arguments
@draws_from_seed
def unrolled_dlm(
    seen: Observation,
    *,
    client_optimizer: str = "sgd",
    optimizer_options: Mapping[str, Any] | None = None,
    local_steps: check.Count | None = None,
    max_local_steps: check.Count = 64,
    batch_size: check.Count | None = None,
    num_images: check.Count = 1,
    labels: str | Labels = "inferred",
    seed: check.Whole = 0,
    max_evaluations: check.Count = 400,
    **options: Any,
) -> Reconstruction:
    """DLM+ on a simulated client: the image, the learning rate and the number of local steps.

    Parameters
    ----------
    seen
        What the observer sees. Told: the kind of optimizer and its options, but not the learning
        rate; E only if given.
    client_optimizer
        Key of ``records.CLIENT_OPTIMIZERS``, one with a ``step``.
    optimizer_options
        Its further arguments, e.g. {"momentum": 0.9}.
    local_steps
        E >= 1; None searches it.
    max_local_steps
        Largest E that is tried, at least 1.
    batch_size
        Images per local step, at least 1, taken in order; None takes all in each.
    num_images, labels, seed
        Of ``search.reconstruct``.
    max_evaluations
        Of each search at the E that fits best, at least 1. Of the searches for E the first takes up
        to as many, the others forty each.
    **options
        Of ``search.reconstruct``.

    Returns
    -------
    Reconstruction
        Its ``client`` has η and E; ``tried`` has (E, lowest loss) of every search.

    Raises
    ------
    ValueError
        For arguments out of range.

    Notes
    -----
    Where the steps hardly change the gradient only η·E is determined, and E is the first that fits.
    """
    step = clients.step_of("client_optimizer", client_optimizer)
    clients.check_options("optimizer_options", step, optimizer_options or {})
    head_steps = 1 if local_steps == 1 else HEAD_STEPS
    known = known_labels(seen, labels, num_images, local_steps=head_steps)
    told = {"num_images": num_images, "labels": labels if known is None else known}
    settings = {"tolerance": TOLERANCE, **options, **told, "seed": seed}
    simulated = _Client(step, optimizer_options, batch_size)

    def search(
        steps: int,
        best: Reconstruction | None = None,
        *,
        evaluations: int = max_evaluations,
        **patience: int,
    ) -> Reconstruction:
        budget = {"max_evaluations": min(evaluations, max_evaluations), **patience}
        return _search(seen, simulated, steps, best, {**settings, **budget})

    with for_network(seen.model):
        if local_steps is not None:
            searches = [search(local_steps)]
        else:
            searches = find_steps(search, max_local_steps)
    return _joined(searches, client_optimizer)


def _steps(found: Reconstruction) -> int:
    """E of a search, which simulated so many."""
    assert found.local_steps is not None
    return found.local_steps


def _joined(searches: Sequence[Reconstruction], client: str) -> Reconstruction:
    """The best of several searches, with the trace of all of them."""
    best = _best(searches)
    assert isinstance(best.evidence, SearchEvidence)
    evidence = replace(
        best.evidence,
        losses=[loss for each in searches for loss in each.losses],
        tried=[(_steps(each), each.loss) for each in searches],
    )
    return replace(
        best,
        evidence=evidence,
        client=replace(best.client, optimizer=client),
        seconds=sum(each.seconds for each in searches),
    )


@check.renamed(max_steps="max_local_steps")
@check.arguments
def next_steps(
    losses: Mapping[check.Count, float],
    max_local_steps: check.Count,
    finest: float = math.inf,
) -> int | None:
    """The number of local steps to try next, given the losses of those tried so far.

    It is twice the best E until that is worse, then halfway to the nearest E tried on either side,
    above first.

    Parameters
    ----------
    losses
        {E: lowest loss}, at least one; the first of equals counts as the best. An infinite loss
        marks an E that need not be tried.
    max_local_steps
        Largest E that may be tried.
    finest
        Neighbours closer than E/``finest`` are left out; at least 1.

    Returns
    -------
    int or None
        None where no E is left.

    Raises
    ------
    ValueError
        Where no loss is given, or ``finest`` is less than 1.
    """
    if not losses or not finest >= 1:
        raise ValueError(
            f"losses is {check.shown(losses)} and finest {finest}; they take one or more, "
            "and a number of at least 1"
        )
    best = min(losses, key=lambda steps: by_loss(losses[steps]))
    above = min((steps for steps in losses if steps > best), default=3 * best)
    below = max((steps for steps in losses if steps < best), default=0)
    halfway_up = min((best + above) // 2, max_local_steps)
    halfway_down = (best + below + 1) // 2
    for steps in (halfway_up, halfway_down):
        if steps not in losses and abs(steps - best) * finest >= best:
            return steps
    return None


@check.renamed(max_steps="max_local_steps")
def find_steps(search: Search, max_local_steps: int) -> list[Reconstruction]:
    """Search for E: all searches made, in their order.

    Parameters
    ----------
    search
        Makes one: (E, the search to go on from or None, evaluations=…, patience=…), of which the
        last two bound it.
    max_local_steps
        Largest E that is tried.

    Notes
    -----
    A first climb over E goes by short searches. Then the best E is searched at full length, and its
    neighbours but one shortly from where that ended, until E stays or the loss hardly falls.
    """
    first = min(FIRST, max_local_steps)
    searches = [search(first, patience=HURRY)]
    best = _climb(search, searches, {first: searches[0].loss}, max_local_steps, FINEST)
    while best.status is not Status.CONVERGED and len(searches) < MOST:
        here, loss = _steps(best), best.loss
        searches.append(search(here, best))
        two_away = (steps for steps in (here - 2, here + 2) if steps > 0)
        losses = {here: _best(searches).loss, **dict.fromkeys(two_away, math.inf)}
        best = _climb(search, searches, losses, max_local_steps)
        if _steps(best) == here or best.loss > LOWER * loss:
            break
    return searches


def _climb(
    search: Search,
    searches: list[Reconstruction],
    losses: dict[int, float],
    max_local_steps: int,
    finest: float = math.inf,
) -> Reconstruction:
    """Search shortly at every E that ``next_steps`` names, add to ``searches``, return the best."""
    while (best := _best(searches)).status is not Status.CONVERGED:
        steps = next_steps(losses, max_local_steps, finest)
        if steps is None:
            break
        searches.append(search(steps, best, evaluations=SHORT, patience=HURRY))
        losses = {**losses, steps: searches[-1].loss}
    return best


def _best(searches: Sequence[Reconstruction]) -> Reconstruction:
    """The first of lowest loss."""
    return min(searches, key=lambda each: by_loss(each.loss))


@dataclass(frozen=True)
class _Client:
    """The client that is simulated, but for its learning rate and its number of steps."""

    step: clients.Step
    options: Mapping[str, Any] | None
    batch_size: int | None

    def update(
        self,
        model: nn.Module,
        images: torch.Tensor,
        labels: torch.Tensor,
        learning_rate: clients.Rate,
        local_steps: int,
    ) -> list[torch.Tensor]:
        """Its Δ."""
        return clients.simulate(
            model,
            training_loss,
            images,
            labels,
            learning_rate=learning_rate,
            local_steps=local_steps,
            batch_size=self.batch_size,
            client_optimizer=self.step,
            optimizer_options=self.options,
        )


def _search(
    seen: Observation,
    client: _Client,
    steps: int,
    best: Reconstruction | None,
    options: dict[str, Any],
) -> Reconstruction:
    """One search at a fixed E, from the search ``best`` on if there is one."""
    began = time.perf_counter()

    def update_of(model, loss, images, labels, log_rate):
        return client.update(model, images, labels, log_rate.exp(), steps)

    if best is None or not math.isfinite(best.loss):
        rate = _first_rate(seen, client, steps, options)
        resume: dict[str, torch.Tensor] = {}
    else:
        rate = _rate_at(seen, client, steps, best)
        options = {**options, "restarts": 1}
        resume = {name: value for name, value in best.point.items() if name != "log_rate"}
    found = reconstruct(
        seen,
        _relative_distance,
        update_of=update_of,
        unknowns={"log_rate": math.log(rate)},
        resume=resume,
        **options,
    )
    rate = float(found.point["log_rate"].exp())
    estimate = ClientEstimate(learning_rate=rate, local_steps=steps)
    return replace(found, client=estimate, seconds=time.perf_counter() - began)


def loss_at(seen: Observation, found: Reconstruction, images: torch.Tensor) -> float:
    """The objective of a search at other images than those it found, with η as suits them best.

    Parameters
    ----------
    seen
        What the observer sees.
    found
        Of ``unrolled_dlm``, without ``optimizer_options`` and ``batch_size``.
    images
        [B, C, H, W], with the labels that were found.
    """
    name = found.client.optimizer
    assert name is not None  # ``_joined`` says it
    client, steps = _Client(clients.step_of("client_optimizer", name), None, None), _steps(found)
    there = replace(found, images=images)
    rate = _rate_at(seen, client, steps, there, tolerance=FINE_RATE)
    model = copy.deepcopy(seen.model).double()
    simulated = client.update(model, images.double(), found.labels, rate, steps)
    return float(_relative_distance(simulated, seen.delta).detach())


def _relative_distance(simulated: Tensors, update: Tensors) -> torch.Tensor:
    return objectives.squared_distance(simulated, update) / objectives.mean_norm(update) ** 2


def _first_rate(
    seen: Observation, client: _Client, steps: int, options: Mapping[str, Any]
) -> float:
    """η from the last layer alone.

    Its input is the ratio of its weight's update to its bias's, and is taken to stay the same. Adam
    and its kin leave no such ratio, but move no weight by much more than η in a step, and some by
    as much.
    """
    if client.step is not clients.sgd:
        return max(float(layer.abs().max()) for layer in seen.delta) / steps
    d_weight, d_bias = seen.head.delta_weight, seen.head.delta_bias
    layer = copy.deepcopy(seen.head.layer).double()
    features = label_inference.features(d_weight, d_bias)[None]
    labels = options["labels"]
    if not isinstance(labels, torch.Tensor):  # to be optimised along with the images
        labels = label_inference.infer(seen, options["num_images"], local_steps=steps)
    counts = torch.bincount(labels, minlength=seen.num_classes).double()
    shares = counts[None] / len(labels)
    slope = (layer(features).detach().softmax(1) - shares)[0]
    one_step = max(float(d_bias @ slope / slope.square().sum()), 1e-30)
    return _nearest_rate(
        lambda rate: replace(client, batch_size=None).update(layer, features, shares, rate, steps),
        [d_weight, d_bias],
        low=one_step / steps / 10,
        high=2 * one_step,
    )


def _rate_at(
    seen: Observation,
    client: _Client,
    steps: int,
    best: Reconstruction,
    tolerance: float = RATE_TOLERANCE,
) -> float:
    """η that fits the update best for E = ``steps`` and the images of the search ``best``."""
    model = copy.deepcopy(seen.model).double()
    images, rate = best.images.double(), best.learning_rate
    assert rate is not None  # ``_search`` finds one
    return _nearest_rate(
        lambda tried: client.update(model, images, best.labels, tried, steps),
        seen.delta,
        low=rate / 4,
        high=rate * 4,
        tolerance=tolerance,
    )


def _nearest_rate(
    simulate: Callable[[float], Tensors],
    update: Tensors,
    low: float,
    high: float,
    tolerance: float = RATE_TOLERANCE,
) -> float:
    """η in [low, high] whose simulated update is nearest to ``update``."""

    def misfit(log_rate: float) -> float:
        simulated = simulate(math.exp(log_rate))
        return float(objectives.squared_distance(simulated, update).detach())

    bounds = (math.log(low), math.log(high))
    options = {"xatol": tolerance}
    found = minimize_scalar(misfit, bounds=bounds, method="bounded", options=options)
    return math.exp(found.x)
