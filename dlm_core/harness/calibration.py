"""May an audit's word be taken? Audits of many clients, judged by the truth, as values that
``sweeps.sweep`` runs.

Truth enters here and in ``judge``; the audit has the two snapshots and the network.
"""

import contextlib
import io
import math
import random
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from dlm_core import check, federated, records
from dlm_core.beyond.attention import plain_attention
from dlm_core.coordinates import cosines
from dlm_core.harness import belief, kinds, pairs
from dlm_core.harness.audit import audit
from dlm_core.harness.belief import Audit
from dlm_core.harness.keys import result_key
from dlm_core.harness.kinds import Client
from dlm_core.harness.leaks import Leak
from dlm_core.harness.look import Look
from dlm_core.observation import Observation, observe
from dlm_core.results import Explains, Reconstruction
from dlm_core.threads import one_thread

RIGHT = 20.0  # dB from which a picture, or a layer's input, is the client's
SPLIT = 17  # the seed of the two halves, chosen before any audit was looked at
RATE = 0.01  # of the steps on pictures of nobody


@dataclass(frozen=True)
class Case:
    """An audit of one client.

    Attributes
    ----------
    kind
        Key of ``kinds.KINDS``.
    index
        Which of its clients.
    compared
        Whether each search is made on a picture of nobody too, and from a second start near the
        first: for what agreement is worth.

    Raises
    ------
    ValueError
        For a kind that is unknown.
    """

    kind: str
    index: check.Whole = 0
    compared: bool = True

    def __post_init__(self) -> None:
        check.fields(self)
        check.one_of("kind", self.kind, kinds.KINDS)

    @property
    def key(self) -> str:
        """The name of the result."""
        dataset = kinds.KINDS[self.kind].dataset
        return result_key(self, ["dlm_core.harness.calibration"], [], dataset, "bundled")

    @property
    def half(self) -> str:
        """ "calibration" or "test": of two clients that follow each other, one each."""
        first = random.Random(f"{SPLIT} {self.kind} {self.index // 2}").randrange(2)
        return "calibration" if self.index % 2 == first else "test"

    def run(self) -> dict[str, Any]:
        """The record: the verdict, each leak that was told and whether it is right, each search,
        and what does leak.
        """
        client = kinds.make(self.kind, self.index)
        began = time.process_time()
        found = _audited(client)
        seconds = time.process_time() - began
        pictures = [quality(each.images, client) for each in found.values()]
        best = max(found.beliefs, key=found.beliefs.__getitem__, default=None)
        shown = {} if best is None else {"found": found[best].images.float().cpu().contiguous()}
        found_by_search = searches(found, client, compared=self.compared)
        return {
            "verdict": str(found.verdict),
            "leaks": [_judged(each, found, client) for each in found.leaks],
            "searches": found_by_search,
            "reached": max(map(max, pictures), default=-math.inf),
            "algebra": by_algebra(client),
            "notes": found.notes,
            "seconds": seconds,
            "arrays": {"truth": client.images.contiguous(), **shown},
        }


@check.arguments
def cases(n: check.Count, of: Sequence[str] = (), compared: bool = True) -> list[Case]:
    """Return as many clients of each kind.

    Parameters
    ----------
    n
        Of each; an even one gives both halves as many.
    of
        Keys of ``kinds.KINDS``; none named takes all.
    compared
        As in ``Case``.
    """
    return [Case(kind, i, compared) for kind in of or kinds.KINDS for i in range(n)]


def _audited(client: Client) -> Audit:
    """The audit, told the network and no more; one that refuses shows nothing."""
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        try:
            return audit(
                client.before,
                client.after,
                model=client.network,
                image_shape=tuple(client.images.shape[1:]),
                out=Path(folder) / "found.png",
                minutes=None,  # a record is the same on a busy machine
            )
        except ValueError as why:
            return Audit(results={}, beliefs={}, look=Look(), notes=[str(why)])


# --- truth


def quality(images: torch.Tensor, client: Client) -> list[float]:
    """PSNR in dB of each picture to the nearest of the client's images; black to white is what
    it is for the client.
    """
    apart = images.double().cpu()[:, None] - client.images.double()[None]
    nearest = apart.flatten(2).square().mean(2).min(1).values
    return _decibels(nearest / client.white**2)


def right(leak: Leak, found: Audit, client: Client) -> tuple[bool, float]:
    """(whether what an audit calls leaked is the client's, how near it is in dB or NaN).

    Parameters
    ----------
    leak
        One of ``found.leaks``.
    found, client
        The audit, and the truth.
    """
    if leak.what == "label":
        return set(leak.classes) <= client.classes, math.nan
    layer = next((e for e in found.look.layers if leak.what == f"input of layer {e.name!r}"), None)
    if layer is not None:
        assert layer.values is not None
        nearest = _nearest_input(layer.values, client.inputs[layer.name], layer.scaled)
    elif leak.attack in found:
        nearest = min(quality(found[leak.attack].images, client))
    else:
        raise ValueError(f"leak is {leak.what!r}; there is no truth to hold it against")
    return nearest >= RIGHT, nearest


def by_algebra(client: Client) -> float:
    """PSNR in dB of the client's nearest image to what one division shows, of a row of the first
    layer's weight by the bias: no audit's code takes part. -inf where no layer sees the pixels.
    """
    shown = [-math.inf]
    for name in client.inputs:
        weight, bias = (
            client.before[f"{name}.{each}"].double() - client.after[f"{name}.{each}"].double()
            for each in ("weight", "bias")
        )
        row = int(bias.abs().argmax())
        if weight.shape[1] == client.images[0].numel() and bias[row]:
            image = (weight[row] / bias[row]).view(client.images[:1].shape)
            shown += quality(image, client)
    return max(shown)


def _nearest_input(values: torch.Tensor, inputs: torch.Tensor, scaled: bool) -> float:
    """dB between the error and the size of a layer's input, the nearest of those that passed."""
    values, inputs = values.double().cpu(), inputs.double()
    if not scaled:  # its direction alone is told
        values, inputs = F.normalize(values, dim=0), F.normalize(inputs, dim=1)
        values = values * (inputs @ values).sign()[:, None]
    errors = (inputs - values).square().sum(1) / inputs.square().sum(1).clamp(min=1e-30)
    return max(_decibels(errors))


def _decibels(errors: torch.Tensor) -> list[float]:
    """Mean squared errors in dB; a search that diverged is infinitely far."""
    known = errors.nan_to_num(nan=math.inf, posinf=math.inf)
    return (-10 * known.clamp(min=1e-30).log10()).tolist()


def _judged(leak: Leak, found: Audit, client: Client) -> dict[str, Any]:
    holds, nearest = right(leak, found, client)
    return {"what": leak.what, "attack": leak.attack, "right": holds, "psnr": nearest}


# --- searches


def searches(found: Audit, client: Client, *, compared: bool = True) -> list[dict[str, Any]]:
    """Each search of an audit that was made twice: its loss and agreement, whether it was believed,
    and the PSNR of its worst picture to the client's nearest image.

    Parameters
    ----------
    found, client
        The audit, and the truth.
    compared
        As in ``Case``: adds "chance" and "near", dB.
    """
    rows = []
    # as the audit runs them
    with one_thread(), plain_attention():
        for key in (key for key, each in found.beliefs.items() if each.agreement is not None):
            more = _compared(key, found, client) if compared else {}
            rows.append(_search(key, found, client) | more)
    return rows


def _search(key: str, found: Audit, client: Client) -> dict[str, Any]:
    """What an audit knows of a search, what would speak against it if it were sure, and how near it
    came.
    """
    result, believed = found[key], found.beliefs[key]
    sure = replace(result, evidence=replace(result.evidence, loss=0.0))
    doubt = belief.believe(sure, math.inf, found.look).doubt
    doubt = doubt or pairs.against(_seen(client), result, found.look)
    return {
        "attack": key,
        "loss": believed.loss,
        "agreement": believed.agreement,
        "believed": believed.grade is Explains.FULLY,
        "doubted": doubt is not None,
        "psnr": min(quality(result.images, client)),
    }


def _seen(client: Client) -> Observation:
    return observe(client.network, client.before, client.after, tuple(client.images.shape[1:]))


def _compared(key: str, found: Audit, client: Client) -> dict[str, Any]:
    """What the same search shows of a picture of nobody on the same network, and from a second
    start near the first: PSNR in dB to what it showed of this client.
    """
    record, result = records.ATTACKS[belief.attack_of(key)], found[key]
    seen = _seen(client)
    steps = {} if result.local_steps is None else {"local_steps": result.local_steps}
    options = {"num_images": len(result.images), **steps}
    compared = {}
    for name, seed in (("chance", 0), ("near", 1)):
        try:
            other = seen if name == "near" else _of_nobody(seen, result)
            again = record(other, seed=seed, **options)
            compared[name] = belief.likeness(result.images, again.images)
        except (ValueError, RuntimeError):  # with one output there is no step to make
            compared[name] = math.nan
    return compared


def _of_nobody(seen: Observation, result: Reconstruction) -> Observation:
    """One step on pictures that nobody has, on the same network."""
    draw = torch.Generator().manual_seed(SPLIT)
    start, to_images = cosines(result.images.shape, torch.zeros(()), draw)
    images = to_images(belief.FAR * start)
    labels = torch.randint(seen.num_classes, (len(images),), generator=draw)
    return federated.train_locally(seen.model, images, labels, learning_rate=RATE)
