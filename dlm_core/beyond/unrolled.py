"""Several local steps: DLM+ with the client's training simulated inside the objective, and η and E found on the way.

    min over x, log η:  Σ_layers ‖Δ(x, y, η, E) - Δ‖²/n(Δ)²,    E by the lowest loss

Where DLM+ takes the update for one gradient, this takes it for E steps of a named optimizer. DLM+ divides the simulated side
by its own norm, since it has no η; here its length is the best evidence of η there is, and keeps it from running away. A
wrong E still finds most of the image, so each E tried starts where the best one so far ended.
"""

import copy
import inspect
import math
import time
from dataclasses import replace
from functools import partial

import torch
from scipy.optimize import minimize_scalar

from dlm_core import check, label_inference, objectives, records
from dlm_core.beyond import clients
from dlm_core.federated import loss as training_loss
from dlm_core.results import ClientEstimate
from dlm_core.search import known_labels, reconstruct

FIRST = 2  # E of the first search
SHORT = 40  # evaluations that tell two values of E apart
HURRY = 20  # patience of these searches
MOST = 60  # searches, about; cut short, each may end a little lower at another E, and so on for ever
HEAD_STEPS = 16  # that a last layer takes in ``label_inference.infer``; where there were several it does not matter how many
TOLERANCE = 2e-7  # η takes a closer fit than the image does


@records.attack(
    "unrolled_dlm",
    title="unrolled DLM+",
    colour=5,
    marker="X",
    assumes=("the kind of optimizer and its options",),
    client="several local steps; takes a minute or more",
    audited=5,
)
@check.renamed(steps="local_steps")
@records.passes_on_to(reconstruct)
def unrolled_dlm(
    seen, *, local_steps=None, max_steps=64, client="sgd", client_options=None, batch_size=None, max_evaluations=400, **options
):
    """DLM+ on a simulated client. Told: the kind of optimizer and its options, but not the learning rate; E only if given.

    local_steps      E; None searches it from 1 to ``max_steps``.
    client           of ``clients.OPTIMIZERS``, with ``client_options``, e.g. {"momentum": 0.9}.
    batch_size       images per local step, taken in order; None takes all in each.
    max_evaluations  of each search at the E that fits best; the searches for E take forty each.
    options          of ``search.reconstruct``.

    Where the steps hardly change the gradient only η·E is determined, and E is the first that fits. The result's ``client``
    has η and E. Raises ValueError for arguments out of range.
    """
    check.one_of("client", client, clients.OPTIMIZERS)
    numbers = {"local_steps": 1 if local_steps is None else local_steps, "max_steps": max_steps, "max_evaluations": max_evaluations}
    labels, num_images = options.get("labels", "inferred"), options.get("num_images", 1)
    takes = list(inspect.signature(clients.OPTIMIZERS[client]).parameters)[4:]
    for name in client_options or {}:
        if name not in takes:
            raise ValueError(f"client_options has {name!r}; client {client!r} takes {', '.join(takes)}")
    for name, value in {**numbers, "batch_size": 1 if batch_size is None else batch_size, "num_images": num_images}.items():
        check.at_least(name, value, 1)
    known = known_labels(seen, labels, num_images, local_steps=1 if local_steps == 1 else HEAD_STEPS)
    options["labels"] = labels if known is None else known
    told = {
        "batch_size": batch_size,
        "client_optimizer": clients.OPTIMIZERS[client],
        "optimizer_options": client_options,
    }
    searches = []

    def search(steps, best=None, **limits):
        limits = {"tolerance": TOLERANCE, **options, "max_evaluations": max_evaluations, **limits}
        searches.append(_search(seen, told, steps, best, limits))
        return searches[-1]

    brief = partial(search, max_evaluations=min(SHORT, max_evaluations), patience=HURRY)
    if local_steps is not None:
        best = search(local_steps)
    else:
        best = search(min(FIRST, max_steps), patience=HURRY)
        best = _climb(brief, best, {best.local_steps}, max_steps, finest=8)
    while local_steps is None and best.stop_reason != "converged" and len(searches) < MOST:
        before, loss = best.local_steps, best.loss
        best = min(best, search(before, best), key=lambda each: each.loss)
        best = _climb(brief, best, {max(before - 2, 0), before, before + 2}, max_steps)
        if best.local_steps == before or best.loss > 0.999 * loss:
            break
    evidence = replace(
        best.evidence,
        losses=[loss for each in searches for loss in each.losses],
        tried=[(each.local_steps, each.loss) for each in searches],
    )
    found = replace(best.client, optimizer=client)
    return replace(best, evidence=evidence, client=found, seconds=sum(each.seconds for each in searches))


def _climb(search, best, tried, max_steps, finest=math.inf):
    """The best search over E: twice the best E until that is worse, then halfway to the nearest E tried on either side.

    Neighbours closer than E/``finest`` are left out.
    """
    while best.stop_reason != "converged":
        here = best.local_steps
        above, below = min((e for e in tried if e > here), default=3 * here), max((e for e in tried if e < here), default=0)
        halfway = [min((here + above) // 2, max_steps), (here + below + 1) // 2]
        left = [e for e in halfway if e not in tried and abs(e - here) * finest >= here]
        if not left:
            break
        tried.add(left[0])
        best = min(best, search(left[0], best), key=lambda each: each.loss)
    return best


def _search(seen, told, steps, best, options):
    """One search at a fixed E, from the search ``best`` on if there is one."""
    began = time.perf_counter()

    def update_of(model, loss, images, labels, log_rate):
        return clients.update(
            model, loss, images, labels, learning_rate=log_rate.exp(), local_steps=steps, **told
        )

    if best is None:
        rate, resume = _first_rate(seen, steps, told, options), {}
    else:
        rate, options = _rate_at(seen, steps, told, best), {**options, "restarts": 1}
        resume = {name: value for name, value in best.point.items() if name != "log_rate"}
    unknowns = {"log_rate": math.log(rate)}
    found = reconstruct(seen, _relative_distance, update_of=update_of, unknowns=unknowns, resume=resume, **options)
    rate = float(found.point["log_rate"].exp())
    client = ClientEstimate(learning_rate=rate, local_steps=steps)
    return replace(found, client=client, seconds=time.perf_counter() - began)


def _relative_distance(simulated, update):
    return objectives.squared_distance(simulated, update) / objectives.mean_norm(update) ** 2


def _first_rate(seen, steps, told, options):
    """η from the last layer alone, whose input is the ratio of its weight's update to its bias's and stays the same.

    Adam and its kin leave no such ratio, but move no weight by much more than η in a step, and some by as much.
    """
    if told["client_optimizer"] is not clients.sgd:
        return max(float(layer.abs().max()) for layer in seen.delta) / steps
    layer, d_weight, d_bias = seen.head.layer, seen.head.delta_weight, seen.head.delta_bias
    head, features = copy.deepcopy(layer).double(), label_inference.features(d_weight, d_bias)[None]
    labels = options["labels"]
    if not isinstance(labels, torch.Tensor):  # to be optimised along with the images
        labels = label_inference.infer(seen, options.get("num_images", 1), local_steps=steps)
    shares = torch.bincount(labels, minlength=seen.num_classes).double()[None] / len(labels)
    slope = (head(features).detach().softmax(1) - shares)[0]
    one_step = max(float(d_bias @ slope / slope.square().sum()), 1e-30)
    told = {**told, "batch_size": None}
    return _nearest_rate(head, features, shares, steps, told, [d_weight, d_bias], one_step / steps / 10, 2 * one_step)


def _rate_at(seen, steps, told, best):
    """η that fits the update best for E = ``steps`` and the images of the search ``best``."""
    model, low, high = copy.deepcopy(seen.model).double(), best.learning_rate / 4, best.learning_rate * 4
    return _nearest_rate(model, best.images.double(), best.labels, steps, told, seen.delta, low, high)


def _nearest_rate(model, images, labels, steps, told, update, low, high):
    def misfit(log_rate):
        simulated = clients.update(
            model, training_loss, images, labels, learning_rate=math.exp(log_rate), local_steps=steps, **told
        )
        return float(objectives.squared_distance(simulated, update).detach())

    found = minimize_scalar(misfit, bounds=(math.log(low), math.log(high)), method="bounded", options={"xatol": 0.02})
    return math.exp(found.x)
