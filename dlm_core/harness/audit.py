"""Does this client leak? Attacks on two weight files of one's own, and what their results mean, in
words.

There is no truth to compare with. An exact attack judges itself, as does ``weighted`` where it
meets all of the update; another search is made twice, from different starts: that both end at the
same images, which explain the update, is the evidence. A small loss alone is none: where an image
moves the weights little, as from PyTorch's own initial weights, others explain the update nearly as
well.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
from torch import nn

from dlm_core import check, records
from dlm_core.arrays import ImageShape
from dlm_core.beyond import inputs, preprocessing
from dlm_core.harness import (
    brightness,
    clusters,
    devices,
    files,
    leaks,
    levels,
    many_starts,
    pictures,
    plan,
    wording,
    written,
)
from dlm_core.harness.about import About
from dlm_core.harness.about import of as about_audit
from dlm_core.harness.attempt import Attempt, attempt
from dlm_core.harness.belief import Audit, Belief, believe, settled
from dlm_core.harness.foretell import MINUTES, SEARCHES, STEPPED, Budget, NoTime
from dlm_core.harness.leaks import Untried
from dlm_core.harness.look import Look, first_look, sentence
from dlm_core.harness.plan import Run, tried
from dlm_core.harness.received import Received, receive
from dlm_core.harness.tables import counted
from dlm_core.observation import Observation, Unchanged, find_head, observe
from dlm_core.results import Explains, Reconstruction

NO_RESULT = "no attack came to a result, which is no proof that nothing leaks"
# Cosine of W_t and W_{t+1} below which these are no weights before and after training.
NEAR = 0.2
# How far from 1 a decay is that leaves something of the weights.
APART = 0.1
# Pixels of all images together, up to which an audit is tried: half a gigabyte in float64.
PIXELS = 2**26


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
        That the audit may take after its first look, above 0: searches are shortened or left out
        where it is too little, and it is said. None for as many as they need.
    device
        Where attacks compute, "cpu" or "cuda"; None: where the network lies.

    Returns
    -------
    Audit
        The verdict, "nothing was sent" where both snapshots are equal and the second holds no
        other numbers, and what each attack found.
        Where the user interrupts an attack, what was found until then; ``interrupted`` says so.

    Raises
    ------
    ValueError
        Before any attack, for arguments out of range and snapshots that do not fit; and where the
        one attack that was asked for does not apply.
    """
    placed = None if device is None else devices.named(device)
    _check_asked(model, image_shape, num_images, attack, client)
    if normalise is not None:
        preprocessing.check_channels(normalise, image_shape[0])
    pictures.check_out(Path(out))
    read = receive(before, after, model, image_shape, num_classes, normalise, placed)
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
    known = leaks.of_embeddings(read.network, read.after, read.coarse)
    known += filter(None, [leaks.of_label(seen, look)])
    print(*read.notes, *look.sentences, *known, sep="\n")
    runs = plan.runs(read, seen, look, attack=attack, num_images=num_images, client=client)
    budget = Budget(minutes)  # the look, and what it shows, is given whatever time it takes
    found = _tried_in_turn(runs, seen, look, num_images, budget, only=attack != "all")
    found.notes[:0] = read.notes
    found.known.extend(known)
    found.untried.extend(plan.left_out(runs, found, attack))
    if found:
        best = max(found.beliefs, key=found.beliefs.__getitem__)  # the first of equals
        _show(found, best, out, attack)
    else:
        print(NO_RESULT)
    return _printed(found, about, read)


def _printed(found: Audit, about: About, read: Received) -> Audit:
    """Print the verdict; the audit with what was asked, and what may hide more."""
    found = replace(found, about=about, caution=levels.HIDES if read.lost else None)
    if found.sentence != found.verdict.sentence:
        print(found.caution)
    kinds = f"{len(found.untried)} kinds of attack"
    print(f"verdict: {found.verdict}; {kinds} were not tried (--json, --report, .untried say why)")
    return found


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
    for line in wording.of_result(went.result, went.belief):
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
    wording.conclude(found, best, attack)


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


def _unchanged(read: Received, why: Unchanged) -> Audit:
    """What to say where no parameter moved."""
    every = dict(read.network.named_parameters())
    look = Look(unmoved=list(every), num_parameters=len(every), unread="no parameter changed")
    found = Audit(results={}, beliefs={}, look=look, notes=read.notes)
    found.untried.extend(plan.none_tried("no parameter changed"))
    if why.statistics:
        found.known.append(leaks.of_statistics(why))
    else:
        found.known.extend(leaks.of_counts(read.network, read.after))
    if read.beside:
        many = counted(len(read.beside), "array")
        found.notes.append(
            f"no weight changed, but the second snapshot holds {many} beside them that the first "
            f"has not, {read.beside[0]!r} first; no attack reads them"
        )
        print(found.notes[-1])
    if found.known or read.beside:
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


def _check_near(read: Received, look: Look) -> None:
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


def _without_head(why: str, read: Received, image_shape: Sequence[int], out: str | Path) -> Audit:
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
    rows = leaks.of_embeddings(read.network, read.after, read.coarse)
    if not rows and not any(each.sentence for each in layers):
        _check_near(read, look)
        raise ValueError(why) from None
    label = leaks.of_rows(layers, read.network, image_shape)
    known = [*rows, *filter(None, [label])]
    print(*read.notes, *look.sentences, *known, sep="\n")
    print("no other attack was tried: each needs what the network has not")
    results: dict[str, Reconstruction] = {}
    beliefs: dict[str, Belief] = {}
    try:
        results["division"] = inputs.shown(layers)
        beliefs["division"] = believe(results["division"], None, look)
    except ValueError as none:
        print(none)
    found = Audit(results=results, beliefs=beliefs, look=look, notes=[*read.notes, why])
    found.known.extend(known)
    others = plan.none_tried(f"it needs what the network has not ({why})")
    found.untried.extend(each for each in others if each.what not in results)
    if results:
        _show(found, "division", out, "all")
    else:
        print(NO_RESULT)
    return found
