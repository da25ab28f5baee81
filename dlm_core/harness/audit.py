"""Does this client leak? Attacks on two weight files of one's own, and what their results mean, in
words.

There is no truth to compare with. An exact attack judges itself, as does ``weighted`` where it
meets all of the update; another search is made twice, from different starts: that both end at the
same images, which explain the update, is the evidence. A small loss alone is none: where an image
moves the weights little, as from PyTorch's own initial weights, others explain the update nearly as
well.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
from torch import nn

from dlm_core import check, records
from dlm_core.arrays import ImageShape
from dlm_core.beyond import inputs, layer_input, preprocessing, weighted
from dlm_core.harness import (
    brightness,
    clues,
    clusters,
    devices,
    files,
    leaks,
    levels,
    many_starts,
    networks,
    pictures,
    registry,  # noqa: F401, it fills the tables
    written,
)
from dlm_core.harness.about import About
from dlm_core.harness.about import of as about_audit
from dlm_core.harness.attempt import Attempt, attempt
from dlm_core.harness.belief import (
    AGREED,
    EXPLAINED,
    PARTLY,
    Audit,
    Belief,
    attack_of,
    believe,
    settled,
)
from dlm_core.harness.foretell import MINUTES, SEARCHES, STARTS, STEPPED, Budget, NoTime
from dlm_core.harness.leaks import Untried
from dlm_core.harness.look import Look, first_look, sentence
from dlm_core.harness.tables import counted
from dlm_core.observation import Observation, Unchanged, find_head, observe
from dlm_core.results import Explains, Reconstruction, SearchEvidence
from dlm_core.weights import StateDict, check_finite

GRADES = ("explains little of the update", "explains the update in part", "explains the update")
NO_RESULT = "no attack came to a result, which is no proof that nothing leaks"
# Images that are looked for unasked.
MOST_IMAGES = 16
# Cosine of W_t and W_{t+1} below which these are no weights before and after training.
NEAR = 0.2
# How far from 1 a decay is that leaves something of the weights.
APART = 0.1
# Pixels of all images together, up to which an audit is tried: half a gigabyte in float64.
PIXELS = 2**26


def tried() -> dict[str, records.Attack]:
    """The registered attacks that an audit tries, in their order: they need be told nothing."""
    every = records.ATTACKS.values()
    placed = [(each.audited, each) for each in every if each.audited is not None]
    return {record.key: record for _, record in sorted(placed, key=lambda pair: pair[0])}


@check.arguments
def audit(
    before: files.Given,
    after: files.Given,
    *,
    model: str | nn.Module = "lenet",
    image_shape: ImageShape = (3, 32, 32),
    num_classes: Annotated[int, check.Range(2, PIXELS)] | None = None,
    num_images: check.Count = 1,
    attack: str = "all",
    client: str | None = None,
    normalise: preprocessing.Told | None = None,
    out: str | Path = "reconstruction.png",
    minutes: check.Positive | None = MINUTES,
    device: str | None = None,
) -> Audit:
    """Print what two snapshots of a client show, and write the picture.

    Parameters
    ----------
    before, after
        W_t and W_{t+1}: files, state dicts, or what else ``files.snapshots`` takes.
    model
        A network of your own with these weights' names, or a name of ``models.build``.
    image_shape
        (C, H, W).
    num_classes
        Outputs of the network; None: as in ``before``.
    num_images
        In the client's step, as far as known: where the update speaks of more, more are looked for.
    attack
        A key of ``tried``, or "all": one after the other until one explains the update.
    client
        That ``unrolled_dlm`` simulates, of ``records.CLIENT_OPTIMIZERS``; None goes by what the
        update looks like.
    normalise
        What the client makes of pixels in [0, 1] before its network sees them, as
        ``preprocessing.normalised`` takes it; images are then found and shown in [0, 1]. None:
        nothing, or unknown; it is suspected where the update shows it.
    out
        Picture to write, enlarged; its suffix says in which format.
    minutes
        That the audit may take, above 0: searches are shortened or left out where it is too little,
        and it is said. None for as many as they need.
    device
        Where attacks compute, "cpu" or "cuda"; None: where the network lies.

    Returns
    -------
    Audit
        The verdict, "nothing was sent" where both snapshots are equal, and what each attack found.
        Where the user interrupts an attack, what was found until then; ``interrupted`` says so.

    Raises
    ------
    ValueError
        Before any attack, for arguments out of range and snapshots that do not fit; and where the
        one attack that was asked for does not apply.
    """
    budget = Budget(minutes)
    placed = None if device is None else devices.named(device)
    _check_asked(model, image_shape, num_images, attack, client)
    if normalise is not None:
        preprocessing.check_channels(normalise, image_shape[0])
    pictures.check_out(Path(out))
    read = _read(before, after, model, image_shape, num_classes, normalise, placed)
    asked: dict[str, Any] = {"model": model, "image_shape": image_shape, "num_classes": num_classes}
    asked |= {"num_images": num_images, "attack": attack, "client": client}
    asked |= {"normalise": normalise, "minutes": minutes, "device": device}
    about = about_audit(before, after, **asked)
    try:
        seen = observe(read.network, read.network.state_dict(), read.after, image_shape)
    except Unchanged as why:
        return _printed(_unchanged(read, why), about, read)
    except ValueError as why:
        return _printed(_without_head(f"{why}{read.where}", read, image_shape, out), about, read)
    made = _made_head(seen)
    if made is not None:
        return _printed(_without_head(made, read, image_shape, out), about, read)
    if num_classes not in (None, seen.num_classes):
        raise ValueError(
            f"num_classes is {num_classes}; the network has {seen.num_classes} outputs"
        )
    invented = _untrained_head(seen)
    if invented is not None:
        return _printed(_without_head(invented, read, image_shape, out), about, read)
    look = first_look(seen, num_images, read.coarse)
    _check_near(read, look)
    label = leaks.of_label(seen, look)
    print(*read.notes, *look.sentences, *filter(None, [label]), sep="\n")
    plan = _plan(num_images, look) if attack == "all" else [(attack, num_images)]
    options = _options(read, look, image_shape, client)
    runs = [
        Run(name, count, _call(read, seen, name, count, options.get(name, {})))
        for name, count in plan
    ]
    found = _tried_in_turn(runs, seen, look, num_images, budget, only=attack != "all")
    found.notes[:0] = read.notes
    found.known.extend(filter(None, [label]))
    found.untried.extend(_left_out(plan, found, attack))
    if found:
        best = max(found.beliefs, key=found.beliefs.__getitem__)  # the first of equals
        _show(found, best, out, attack)
    else:
        print(NO_RESULT)
    return _printed(found, about, read)


def _printed(found: Audit, about: About, read: "_Read") -> Audit:
    """Print the verdict; the audit with what was asked, and what may hide more."""
    found = replace(found, about=about, caution=levels.HIDES if read.lost else None)
    if found.sentence != found.verdict.sentence:
        print(found.caution)
    kinds = f"{len(found.untried)} kinds of attack"
    print(f"verdict: {found.verdict}; {kinds} were not tried (--json, --report, .untried say why)")
    return found


class Run(NamedTuple):
    """An attack, how many images it looks for, and what runs it."""

    attack: str
    num_images: int
    call: partial[Reconstruction]

    def named(self, told: int) -> str:
        """The attack, and how many images it looks for where that is not the number told."""
        images = counted(self.num_images, "image")
        return self.attack if self.num_images == told else f"{self.attack}, {images}"


def _tried_in_turn(
    runs: Sequence[Run], seen: Observation, look: Look, told: int, budget: Budget, *, only: bool
) -> Audit:
    """What attacks find, one after the other until one explains the update or the user ends it;
    what has too little time is tried again in what the others leave. ValueError where the ``only``
    one does not apply.
    """
    found, interrupted = Audit(results={}, beliefs={}, look=look, notes=[]), False
    put_off: list[Run] = []
    for run, later in _in_turn(runs, put_off):
        asked, record = run.named(told), records.ATTACKS[run.attack]
        needless = "the audit was interrupted" if interrupted else _needless(run, found)
        if needless:
            found.untried.append(Untried(asked, needless))
            print(f"not tried: {found.untried[-1]}")
            continue
        until = budget.until(run.attack, later)
        times: list[str] = []
        print(f"{asked} ({record.client}) ...", flush=True)
        try:
            went = attempt(run.call, record, until, partial(_noted, times), seen, look)
        except NoTime as why:
            if later:
                put_off.append(run)
                _indented(f"put off: {why}")
            else:
                _indented(f"left out: {why}")
                found.untried.append(Untried(asked, str(why)))
            continue
        except Exception as why:  # whatever a user's network or attack raises
            if only:
                raise ValueError(f"attack {run.attack} does not apply: {sentence(why)}") from None
            said = f"does not apply: {sentence(why)}"
            _indented(said)
            found.notes.append(f"{asked} {said}")
            found.untried.append(Untried(asked, said))
            continue
        found.notes.extend(f"{asked}: {limit}" for limit in times[1:])  # behind how long it takes
        interrupted = _entered(found, run, asked, went, seen, until)
        if any(each.grade is Explains.FULLY for each in found.beliefs.values()):
            break
    return replace(found, interrupted=interrupted)


def _in_turn(runs: Sequence[Run], put_off: Sequence[Run]) -> Iterator[tuple[Run, list[str]]]:
    """Each run, with the attacks that follow; then those that were put off meanwhile, with none."""
    for place, run in enumerate(runs):
        yield run, [each.attack for each in runs[place + 1 :]]
    for run in put_off:
        yield run, []


def _needless(run: Run, found: Audit) -> str | None:
    """Why a search cannot find more than what was found; None where it may, and for no search."""
    searches = run.attack in (*SEARCHES, *STEPPED)
    return settled(found, run.num_images) if searches else None


def _entered(
    found: Audit, run: Run, asked: str, went: Attempt, seen: Observation, until: float
) -> bool:
    """Enter and print how an attack went; whether the user has ended the audit."""
    if went.stopped:
        _indented(went.stopped)
        found.notes.append(f"{asked} was {went.stopped}")
    if went.result is None or went.belief is None:
        found.untried.append(Untried(asked, went.stopped or ""))
        return went.interrupted
    again = run.attack in found
    key = f"{run.attack}, {counted(run.num_images, 'image')}" if again else run.attack
    found.results[key], found.beliefs[key] = went.result, went.belief
    for line in _lines(went.result, went.belief):
        _indented(line)
    if went.stopped:
        return went.interrupted
    try:
        for said in _further(found, key, run, seen, until):
            _indented(said)
            found.notes.append(f"{asked}: {said}")
    except KeyboardInterrupt:
        return True
    return False


def _further(found: Audit, key: str, run: Run, seen: Observation, until: float) -> Iterator[str]:
    """What many starts say of a search where a GPU runs them, which may take belief in it away, and
    what stays open of its brightness.
    """
    result, record = found.results[key], records.ATTACKS[run.attack]
    try:
        ends = many_starts.survey_where_fast(run.call, record, result, until)
    except Exception as why:  # whatever a user's network raises
        yield f"many starts were not made: {sentence(why)}"
    else:
        if ends is not None:
            found.beliefs[key] = found.beliefs[key].less(many_starts.against(ends))
            yield clusters.sentence(ends)
    try:
        said = brightness.unfixed(run.attack, seen, result)
    except Exception as why:
        said = f"whether its brightness is fixed was not computed: {sentence(why)}"
    if said:
        yield said


def _indented(line: str) -> None:
    print(f"    {line}", flush=True)


def _noted(lines: list[str], line: str) -> None:
    lines.append(line)
    _indented(line)


def _show(found: Audit, best: str, out: str | Path, attack: str) -> None:
    """Write the picture, and conclude."""
    images = found[best].images

    def save(path: str | Path) -> None:
        for line in pictures.write(images.float(), path):
            print(line)

    kept = written.keep("out", out, save)
    mixed = found.beliefs[best].judged and not found[best].vouched.any()
    suspicion = pictures.suspicion(images, found.look.normalisation, mixed=bool(mixed))
    judged = found.look.suspicion is not None or best == "division"  # at the first look
    if suspicion and not judged and found.beliefs[best].grade is not Explains.LITTLE:
        print(suspicion)
    if kept:
        print(f"{out} shows what {best} found")
    _conclude(found, found.beliefs[best], attack, len(found[best].images))


def _check_asked(
    model: str | nn.Module,
    image_shape: Sequence[int],
    num_images: int,
    attack: str,
    client: str | None,
) -> None:
    """Raise ValueError for arguments of ``audit`` that are unknown or do not fit each other."""
    if attack in records.ATTACKS and attack not in tried():
        raise ValueError(
            f"attack {attack!r} is registered, but no audit tries it: its record has no audited=…"
        )
    check.one_of("attack", attack, ["all", *tried()])
    if isinstance(model, str):
        check.one_of("model", model, records.NETWORKS)
    if attack != "all" and num_images > 1 and not records.ATTACKS[attack].several:
        raise ValueError(f"num_images is {num_images}; attack {attack} takes one image")
    if client is not None:
        check.one_of("client", client, records.CLIENT_OPTIMIZERS)
        if attack not in ("all", "unrolled_dlm"):
            raise ValueError(f"client is {client!r}; it is simulated by unrolled_dlm, not {attack}")
    if num_images * math.prod(image_shape) > PIXELS:
        raise ValueError(
            f"image_shape is {image_shape} and num_images {num_images}; "
            f"an audit takes up to {PIXELS:,} pixels in all"
        )


def _plan(num_images: int, look: Look) -> list[tuple[str, int]]:
    """The attacks that suit what was seen at the first look, each with the images it looks for:
    those told, or the more that passed through the first layer, and one first where a layer tells
    of one input; then as many as a later layer's directions, which may be steps as well, or as few
    as told.
    """
    told = max(num_images, look.images)
    counts = [1, told] if told > 1 and look.one_input else [told]
    plan = [(name, count) for count in counts for name in _suitable(count, look)]
    if any(each.images is not None for each in look.layers) and ("division", 1) not in plan:
        plan.insert(0, ("division", 1))
    others = [look.directions] if told < look.directions <= MOST_IMAGES else []
    # an update whose entries were changed one by one may have more directions than images
    others += [num_images] if told > num_images else []
    for count in others:
        more = [name for name in _suitable(count, look) if name != "unrolled_dlm"]
        plan += [(name, count) for name in more]
    return plan


def _left_out(plan: Sequence[tuple[str, int]], found: Audit, attack: str) -> Iterator[Untried]:
    """What was not tried beside what did not apply."""
    met = {each.what for each in found.untried} | found.results.keys()
    best = next((name for name, each in found.beliefs.items() if each.grade is Explains.FULLY), "")
    planned = {name for name, _ in plan}
    for name in tried():
        if attack not in ("all", name):
            yield Untried(name, f"not asked for, but {attack} alone")
        elif name not in planned:
            client = records.ATTACKS[name].client
            yield Untried(name, f"what was told or seen does not fit its client: {client}")
        elif best and not any(attack_of(each) == name for each in met):
            yield Untried(name, f"not needed: {best} explains the update")
    yield from leaks.missing()


def _none_tried(why: str) -> list[Untried]:
    """All attacks, where none could be tried."""
    return [*(Untried(name, why) for name in tried()), *leaks.missing()]


def _suitable(num_images: int, look: Look) -> list[str]:
    if look.num_classes == 1:
        return ["division"] if num_images == 1 else ["exact_batch"]
    left_out = {"exact_batch"} if num_images == 1 else {"division", "exact", "weighted"}
    if look.last_alone:
        left_out |= {"exact", "exact_batch", "unrolled_dlm"}
    if look.kin != "adam" or look.optimizer == "several steps":
        left_out.add("interval_dlm")
    return [name for name in tried() if name not in left_out]


class _Read(NamedTuple):
    """What was read of two snapshots.

    Attributes
    ----------
    network
        With the weights W_t.
    after
        W_{t+1}.
    coarse
        {name: half precision that a tensor of these is rounded to}.
    lost
        Variance of what W_t may have lost to rounding, one tensor for each parameter; empty where
        it was not rounded.
    where
        What to add to an error of the network's.
    notes
        What was done to the files, in sentences.
    """

    network: nn.Module
    after: StateDict
    coarse: dict[str, torch.dtype]
    lost: list[torch.Tensor]
    where: str
    notes: list[str]


def _options(
    read: _Read, look: Look, image_shape: Sequence[int], client: str | None
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
    read: _Read, seen: Observation, name: str, count: int, options: Mapping[str, Any]
) -> partial[Reconstruction]:
    """What runs an attack for so many images."""
    run = partial(records.ATTACKS[name], seen, num_images=count, **options)
    return partial(levels.either, run, read.lost) if name == "exact" and read.lost else run


def _read(
    before: Any,
    after: Any,
    model: str | nn.Module,
    image_shape: Sequence[int],
    num_classes: int | None,
    normalise: preprocessing.Normalisation | None,
    device: torch.device | None,
) -> _Read:
    model, before, after, notes, where = networks.fitted(
        before, after, model, image_shape, num_classes
    )
    for argument, state in (("before", before), ("after", after)):
        check_finite(argument, state)
    names = {name for name, _ in model.named_parameters()}
    sent = {name: w for name, w in after.items() if name in names}
    moved = {
        name: w for name, w in sent.items() if not torch.equal(w.double(), before[name].double())
    }
    halves = {name: levels.half_of(w) for name, w in moved.items()}
    coarse = {name: half for name, half in halves.items() if half is not None}
    # All in one, as networks compute; float32 held in float64 has the rounding of float32.
    single = all(torch.equal(w.float().double(), w.double()) for w in sent.values())
    dtype = torch.float32 if single else torch.float64
    before, after = (
        {n: w.to(device=device, dtype=dtype if w.is_floating_point() else None) for n, w in each}
        for each in (before.items(), after.items())
    )
    network = model.to(device=device, dtype=dtype)
    network.load_state_dict(before)
    for name, w in network.named_parameters():  # searches leave out what did not move
        w.requires_grad_(w.requires_grad and name in moved)
    if coarse:
        which = ", ".join(sorted({str(dtype) for dtype in coarse.values()}))
        many = "the" if len(coarse) == len(moved) else f"{len(coarse)} of {len(moved)} tensors of"
        notes.append(f"{many} weights that came back are rounded to {which}")
    lost, said = levels.lost(network)
    notes += said
    notes += clues.of_network(network, image_shape)
    network.register_forward_hook(lambda _, __, returned: clues.alone(returned))
    if normalise is not None:
        network = preprocessing.normalised(network, normalise)
        notes.append(f"images are looked for in [0, 1], as they were before {normalise}")
    return _Read(network, after, coarse, lost, where, notes)


def _unchanged(read: _Read, why: Unchanged) -> Audit:
    """What to say where no parameter moved."""
    every = dict(read.network.named_parameters())
    look = Look(unmoved=list(every), num_parameters=len(every), unread="no parameter changed")
    found = Audit(results={}, beliefs={}, look=look, notes=read.notes)
    found.untried.extend(_none_tried("no parameter changed"))
    if why.statistics:
        found.known.append(leaks.of_statistics(why))
        print(*found.known, sep="\n")
        return found
    print(
        "nothing was sent: no weight changed, the client has not trained or sent what it received"
    )
    return replace(found, unchanged=True)


def _made_head(seen: Observation) -> str | None:
    """What to say where the last layer's weight or bias is no parameter, but made of others."""
    name, layer = find_head(seen.model, seen.image_shape)
    own = {id(w) for w in seen.model.parameters()}
    if id(layer.weight) in own and id(layer.bias) in own:
        return None
    return (
        f"the last layer {name!r} makes its weight or bias of other parameters, as weight norm and "
        "spectral norm do; attacks here read the labels off its own"
    )


def _untrained_head(seen: Observation) -> str | None:
    """What to say where the last bias, from which attacks read the labels, stood still alone."""
    head = seen.head
    if head.delta_bias.any() or not head.delta_weight.any():
        return None
    return (
        f"the last layer's bias {head.names[1]!r} did not move, though its weight did: the client "
        "did not train it, or it was invented to fit the network; give the network that the client "
        "trains, with bias=False there"
    )


def _check_near(read: _Read, look: Look) -> None:
    """Raise ValueError where W_{t+1} is nowhere near W_t, and no layer tells of a step that led so
    far: of a gradient in its place Δ has all of W_t in it, like a decay of 1.
    """
    speaking = [each for each in look.layers if each.values is not None or each.directions]
    if any(abs(each.decay - 1) > APART for each in speaking):
        return
    named = read.network.named_parameters()
    both = [(w.detach().double(), read.after[n].to(w.device)) for n, w in named]
    old, new = (torch.cat([each.double().flatten() for each in one]) for one in zip(*both))
    cosine = float(nn.functional.cosine_similarity(old, new, 0))
    if abs(cosine) < NEAR and old.any():
        raise ValueError(
            f"after is not near before (their cosine is {cosine:.2f}), as trained weights are: if "
            "it is a gradient or an update, give before minus it, "
            "{name: before[name] - after[name]}; else the weights that this client was sent"
        )


def _without_head(why: str, read: _Read, image_shape: Sequence[int], out: str | Path) -> Audit:
    """What the layers of a network show that no Observation takes; ValueError with ``why`` where
    they show nothing.
    """
    try:
        layers = inputs.read(read.network, read.after, image_shape, read.coarse)
    except Exception:  # whatever a user's network raises
        layers = []
    count = len(list(read.network.parameters()))
    look = Look(
        layers=layers,
        unread=why,
        num_parameters=count,
        normalisation=preprocessing.told_to(read.network),
    )
    if not any(each.sentence for each in layers):
        _check_near(read, look)
        raise ValueError(why) from None
    label = leaks.of_rows(layers, read.network, image_shape)
    print(*read.notes, *look.sentences, *filter(None, [label]), sep="\n")
    print("no other attack was tried: each needs what the network has not")
    results: dict[str, Reconstruction] = {}
    beliefs: dict[str, Belief] = {}
    try:
        results["division"] = inputs.shown(layers)
        beliefs["division"] = believe(results["division"], None, look)
    except ValueError as none:
        print(none)
    found = Audit(results=results, beliefs=beliefs, look=look, notes=[*read.notes, why])
    found.known.extend(filter(None, [label]))
    others = _none_tried(f"it needs what the network has not ({why})")
    found.untried.extend(each for each in others if each.what not in results)
    if results:
        _show(found, "division", out, "all")
    else:
        print(NO_RESULT)
    return found


def _lines(found: Reconstruction, belief: Belief) -> Iterator[str]:
    """What to print of a result."""
    if found.evidence.verdict is not None:  # its loss is the chi2/N that the verdict names
        yield found.evidence.verdict
        if belief.grade is Explains.LITTLE:
            return
        if belief.judged and not found.vouched.any():
            yield "it vouches for none of its pictures: none need be an image of the client"
    searched = isinstance(found.evidence, SearchEvidence)
    if searched:
        loss = found.evidence.loss
        size = int(loss <= EXPLAINED) + int(loss <= PARTLY)
        yield (
            f"{GRADES[size]}: loss {loss:.3g} after {found.evaluations} evaluations; "
            f"{found.status.sentence}"
        )
        if belief.agreement is not None or not isinstance(found.evidence, weighted.Told):
            yield _agreed(belief.agreement)
    if isinstance(found.evidence, weighted.Told) and belief.grade is not Explains.LITTLE:
        yield _worth(found, belief)
    # what explains little of the update is no estimate of the client
    little = searched and found.evidence.loss > PARTLY
    unsure = little or (belief.judged and belief.doubt is not None)
    if (found.labels >= 0).all() and not unsure:
        yield f"labels {found.labels.tolist()}"
    simulated = searched and not unsure and found.local_steps is not None
    if found.learning_rate and (simulated or found.evidence.verdict is not None):
        yield f"learning rate {found.learning_rate:.6g}, {_resting_on(found, belief)}"
    if found.weight_decay and found.evidence.verdict is not None:
        yield _decay(found.weight_decay, found.learning_rate)
    if simulated:
        yield (
            f"local steps {found.local_steps} (where later ones hardly move the weights, "
            "other numbers explain it as well)"
        )
    if belief.doubt is not None:
        yield f"not believed: {belief.doubt}"


def _resting_on(found: Reconstruction, belief: Belief) -> str:
    """What a learning rate rests on: the loss, whose factor is one of it, and the images in a step,
    of whose losses the client takes the mean, where there may be more than were found.
    """
    count = len(found.images)
    said = "if the loss is plain cross-entropy"
    sure = count == 1 and belief.grade is Explains.FULLY
    return said if sure else f"{said} and a step had {counted(count, 'image')} and no more"


def _decay(weight_decay: float, learning_rate: float | None) -> str:
    """λ; or the factor of all weights, where that is none that decay leaves."""
    shrunk = weight_decay * (learning_rate or 0.0)
    if 0 <= shrunk < layer_input.SHRUNK:
        return f"weight decay {weight_decay:.3g}"
    return f"beside the step all weights were scaled by {1 - shrunk:.3g}, which is no weight decay"


def _agreed(agreement: float | None) -> str:
    if agreement is None:
        return "no search from another start speaks for its picture"
    which = "the same" if agreement >= AGREED else "another"
    between = f"({agreement:.0f} dB between the two)"
    return f"a search from another start ends at {which} picture {between}"


def _worth(found: Reconstruction, belief: Belief) -> str:
    """What a picture is worth that the update tells in part: up to 8 dB less where its search had
    stalled, on 20 images of CIFAR-100 and the tutorials' network.
    """
    open_ = found.evidence.loss > EXPLAINED
    astray = f", less if its search went astray, which a loss above {EXPLAINED:g} leaves open"
    return (
        f"the update tells about {found.directions:,.0f} of the {found.images.numel():,} "
        "directions of an image there, smooth images' mean fills in the rest: about "
        f"{belief.expected:.0f} dB are expected of its picture{astray if open_ else ''}"
    )


def _conclude(found: Audit, belief: Belief, attack: str, num_images: int) -> None:
    if belief.grade is Explains.FULLY:
        print("it explains the update: what it shows has leaked")
        return
    mixed = [each for each in found.look.shown if each not in found.look.leaked]
    if found.leaks:
        print(f"what stands in the update has leaked: {'; '.join(map(str, found.leaks))}")
    if mixed:
        print(f"what stands in it, of one image or mixed of several: {'; '.join(mixed)}")
    print(
        "of an image that is no proof, nor a proof that none leaks: look at the picture. "
        "Each attack is for one kind of client,"
    )
    print(
        f"here with {counted(num_images, 'image')} in the step "
        f"(--num-images, num_images), and some need an nn.Sequential; {_range(found.look)}"
    )
    if found.look.swapped:
        print("and the files look as if they had changed places")
    if attack != "all":
        print("others to try, by what the client did:")
        print(
            *(
                f"  --attack {name:13} {record.client}"
                for name, record in tried().items()
                if name != attack
            ),
            sep="\n",
        )


def _range(look: Look) -> str:
    """What the searches assume of the client's pixels."""
    if look.normalisation is not None:
        return f"searches look for pixels in [0, 1] before {look.normalisation}, as told"
    return (
        "searches look for pixels in [0, 1] that go into the network as they are: a client that "
        "normalises them is not reached unless --normalise (normalise) tells how"
    )
