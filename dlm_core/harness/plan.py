"""Which attacks an audit tries, in which order, and for how many images."""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

from dlm_core import records
from dlm_core.beyond import weighted
from dlm_core.harness import (
    clues,
    leaks,
    levels,
    registry,  # noqa: F401, it fills the tables
)
from dlm_core.harness.belief import Audit, attack_of
from dlm_core.harness.foretell import SEARCHES, STARTS
from dlm_core.harness.leaks import Untried
from dlm_core.harness.look import Look
from dlm_core.harness.received import Received
from dlm_core.harness.tables import counted
from dlm_core.observation import Observation
from dlm_core.results import Explains, Reconstruction

# Images that are looked for unasked.
MOST_IMAGES = 16


def tried() -> dict[str, records.Attack]:
    """The registered attacks that an audit tries, in their order: they need be told nothing."""
    every = records.ATTACKS.values()
    placed = [(each.audited, each) for each in every if each.audited is not None]
    return {record.key: record for _, record in sorted(placed, key=lambda pair: pair[0])}


class Run(NamedTuple):
    """An attack, how many images it looks for, and what runs it."""

    attack: str
    num_images: int
    call: partial[Reconstruction]

    def named(self, told: int) -> str:
        """The attack, and how many images it looks for where that is not the number told."""
        images = counted(self.num_images, "image")
        return self.attack if self.num_images == told else f"{self.attack}, {images}"


def runs(
    read: Received,
    seen: Observation,
    look: Look,
    *,
    attack: str,
    num_images: int,
    client: str | None,
) -> list[Run]:
    """What an audit runs, in its order.

    Parameters
    ----------
    read, seen, look
        What was read, is seen, and showed at the first look.
    attack
        A key of ``tried``, or "all": those that suit the look.
    num_images, client
        As ``audit`` takes them.
    """
    planned = _planned(num_images, look) if attack == "all" else [(attack, num_images)]
    options = _options(read, look, seen.image_shape, client)
    return [
        Run(name, count, _call(read, seen, name, count, options.get(name, {})))
        for name, count in planned
    ]


def left_out(planned: Sequence[Run], found: Audit, attack: str) -> Iterator[Untried]:
    """What was not tried beside what did not apply.

    Parameters
    ----------
    planned, attack
        What was to run, and the attack that was asked for.
    found
        What was found.
    """
    met = {each.what for each in found.untried} | found.results.keys()
    best = next((name for name, each in found.beliefs.items() if each.grade is Explains.FULLY), "")
    names = {run.attack for run in planned}
    for name in tried():
        if attack not in ("all", name):
            yield Untried(name, f"not asked for, but {attack} alone")
        elif name not in names:
            client = records.ATTACKS[name].client
            yield Untried(name, f"what was told or seen does not fit its client: {client}")
        elif best and not any(attack_of(each) == name for each in met):
            yield Untried(name, f"not needed: {best} explains the update")
    yield from leaks.missing()


def none_tried(why: str) -> list[Untried]:
    """All attacks, where none could be tried.

    Parameters
    ----------
    why
        In words.
    """
    return [*(Untried(name, why) for name in tried()), *leaks.missing()]


def _planned(num_images: int, look: Look) -> list[tuple[str, int]]:
    """The attacks that suit what was seen at the first look, each with the images it looks for:
    those told, or the more that passed through the first layer, and one first where a layer tells
    of one input; then as many as a later layer's directions, which may be steps as well, or as few
    as told.
    """
    told = max(num_images, look.images)
    counts = [1, told] if told > 1 and look.one_input else [told]
    planned = [(name, count) for count in counts for name in _suitable(count, look)]
    if any(each.images is not None for each in look.layers) and ("division", 1) not in planned:
        planned.insert(0, ("division", 1))
    others = [look.directions] if told < look.directions <= MOST_IMAGES else []
    # an update whose entries were changed one by one may have more directions than images
    others += [num_images] if told > num_images else []
    for count in others:
        more = [name for name in _suitable(count, look) if name != "unrolled_dlm"]
        planned += [(name, count) for name in more]
    return planned


def _suitable(num_images: int, look: Look) -> list[str]:
    if look.num_classes == 1:
        return ["division"] if num_images == 1 else ["exact_batch"]
    unsuited = {"exact_batch"} if num_images == 1 else {"division", "exact", "weighted"}
    if look.last_alone:
        unsuited |= {"exact", "exact_batch", "unrolled_dlm"}
    if look.kin != "adam" or look.optimizer == "several steps":
        unsuited.add("interval_dlm")
    return [name for name in tried() if name not in unsuited]


def _options(
    read: Received, look: Look, image_shape: Sequence[int], client: str | None
) -> dict[str, dict[str, Any]]:
    """What attacks are told of what was read and seen."""
    options: dict[str, dict[str, Any]] = {
        "division": {"transmitted": read.coarse, "layers": look.layers},
        "exact": {
            "transmitted": read.coarse,
            "weight_decay": look.optimizer == "sgd with decay",
        },
        "weighted": {"restarts": max(1, weighted.affordable(image_shape) // STARTS)},
        "dlm_plus": {"restarts": 2},
        "unrolled_dlm": {"client_optimizer": client or look.kin},
    }
    if clues.insists(read.network, image_shape):  # searches compute in float64 elsewhere
        own = next(w.dtype for w in read.network.parameters() if w.is_floating_point())
        for name in SEARCHES:
            options.setdefault(name, {})["dtype"] = own
    return options


def _call(
    read: Received, seen: Observation, name: str, count: int, options: Mapping[str, Any]
) -> partial[Reconstruction]:
    """What runs an attack for so many images."""
    run = partial(records.ATTACKS[name], seen, num_images=count, **options)
    return partial(levels.either, run, read.lost) if name == "exact" and read.lost else run
