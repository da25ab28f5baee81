"""Does this client leak? Attacks on two weight files of one's own, and what their results mean, in words.

There is no truth to compare with. An exact attack judges itself; a search is made twice, from different starts: that both
end at the same images, which explain the update, is the evidence. A small loss alone is none: where an image moves the
weights little, as from PyTorch's own initial weights, others explain the update nearly as well.
"""

import math
from functools import partial
from pathlib import Path

import torch

from dlm_core import check, federated, metrics, models
from dlm_core.beyond import clients, recognise
from dlm_core.harness import trials

ATTACKS = {  # of trials.ATTACKS, those that need be told nothing, in the order in which they are tried: when to use each
    "interval_dlm": "one step of Adam, AdamW or RMSprop on one image",
    "exact": "one step of SGD on one image, convolution and linear layers: every pixel, and a verdict",
    "exact_batch": "several images, a network that begins with Linear and ReLU",
    "dlm_plus": "one step of SGD, with momentum or not",
    "unrolled_dlm": "several local steps; takes a minute or more",
}
EXPLAINED, PARTLY = 1e-3, 0.1  # an attack's loss up to which its images explain the update, all of it or some
AGREED = 25.0  # dB between the images of two searches that found the same: right ones 40 and more, wrong ones below 20
GRADES = ("explains little of the update", "explains the update in part", "explains the update")
ENDS = {
    "converged": "as closely as the weights' rounding allows or was asked for",
    "stalled": "it came to rest there, as most searches do",
    "budget": "it was still falling at its last evaluation",
    "diverged": "past its best point it diverged",
}
CLOSER = {"tolerance": 0.0, "patience": 200, "max_evaluations": 1000}  # of unrolled searches once their steps are known
SIDE = 256  # pixels of the picture's width, about


def audit(
    before,
    after,
    *,
    model="lenet",
    image_shape=(3, 32, 32),
    num_classes=None,
    num_images=1,
    attack="all",
    client=None,
    out="reconstruction.png",
):
    """Print what two snapshots of a client show, and write the picture. Returns {attack: its Reconstruction}.

    before, after  W_t and W_{t+1}: files, or state dicts.
    model          network of your own with these weights' names, or a name of ``models.build`` for images [C, H, W] of
                   ``image_shape`` and ``num_classes`` outputs (None: as in ``before``).
    num_images     in the client's step.
    attack         one of ATTACKS, or "all": one after the other until one explains the update.
    client         that ``unrolled_dlm`` simulates, of ``clients.OPTIMIZERS``; None goes by what the update looks like.
    out            picture to write, enlarged.

    Raises ValueError, before any attack, for arguments out of range and snapshots that do not fit.
    """
    check.one_of("attack", attack, ["all", *ATTACKS])
    check.at_least("num_images", num_images, 1)
    check.one_of("client", client or "sgd", clients.OPTIMIZERS)
    if not Path(out).absolute().parent.is_dir():
        raise ValueError(f"out is {str(out)!r}; its folder does not exist")
    seen, coarse = _read(before, after, model, image_shape, num_classes)
    optimizer, kin, swapped = _first_look(seen, num_images, coarse)
    left_out = {"exact_batch" if num_images == 1 else "exact"}
    if kin != "adam" or optimizer == "several steps":
        left_out.add("interval_dlm")
    names = [name for name in ATTACKS if name not in left_out] if attack == "all" else [attack]
    options = {"exact": {"transmitted": coarse}, "dlm_plus": {"restarts": 2}, "unrolled_dlm": {"client": client or kin}}
    results, ranks = {}, {}
    for name in names:
        print(f"{name} ({ATTACKS[name]}) ...", flush=True)
        try:
            with trials.one_thread():  # as trials run; searches side by side on several threads each slow down tenfold
                run = partial(trials.ATTACKS[name], seen, num_images=num_images, **options.get(name, {}))
                found, agreement = _twice(run)
        except (ValueError, torch.linalg.LinAlgError) as why:
            if attack != "all":
                raise ValueError(str(why)) from None
            print(f"    does not apply: {why}")
            continue
        grade = _grade(found, agreement)
        results[name], ranks[name] = found, (grade, agreement or 0)
        print(*(f"    {line}" for line in _lines(found, agreement, grade)), sep="\n", flush=True)
        if grade == 2:
            break
    if not results:
        print("no attack applies, which is no proof that nothing leaks")
        return results
    best = max(ranks, key=ranks.get)  # the first of equals
    _save(results[best].images.float(), out)
    print(f"{out} shows what {best} found")
    _conclude(ranks[best][0], attack, num_images, swapped)
    return results


def _read(before, after, model, image_shape, num_classes):
    """(Observation, dtype of half precision to which the weights that came back are rounded, or None)."""
    named = isinstance(model, str)
    if named:
        network = models.build(model, image_shape)
    snapshots = [
        federated.load_weights(given) if isinstance(given, (str, Path)) else federated.check_weights(argument, given)
        for argument, given in (("before", before), ("after", after))
    ]
    if named:
        last = snapshots[0].get(federated.last_layer(network)[1][1])
        num_classes = num_classes or (100 if last is None else len(last))  # the file knows
        model = models.build(model, image_shape, num_classes)
    coarse = _half_precision(snapshots[1])
    if coarse:
        print(f"the weights that came back are rounded to {coarse}")
        snapshots = [{name: w.float() if w.is_floating_point() else w for name, w in each.items()} for each in snapshots]
    try:
        return federated.observe(model, *snapshots, image_shape), coarse
    except federated.Unchanged:
        raise
    except ValueError as why:
        if not named:
            raise
        raise ValueError(f"{why} (image_shape is {tuple(image_shape)}, num_classes {num_classes})") from None


def _half_precision(weights):
    """The dtype of half precision to which all ``weights`` are rounded, whatever they are held in; else None."""

    def fits(dtype):
        return all(torch.equal(w, weights[name]) for name, w in federated.rounded(weights, dtype).items())

    return next((dtype for dtype in (torch.bfloat16, torch.float16) if fits(dtype)), None)  # the coarser first


def _first_look(seen, num_images, coarse):
    """Print what the update says at once; return the optimizer's name, whose kin it is, and whether the files look swapped."""
    bias = federated.last_layer_update(seen)[2]
    swapped = bool((bias > 0).sum() <= num_images < (bias < 0).sum())  # the labels' classes fall in Δ, all others rise
    if swapped:
        print("have the two files changed places? the last layer moved away from its labels")
    found = recognise.recognise(seen)
    kin = "adam" if found.share >= recognise.SIGN_LIKE else "sgd"
    if found.optimizer == "several steps":
        unread = (
            "one step of which rounding leaves too little" if coarse else "one step whose gradients are too large to read"
        )
        more = f" or {unread}" if coarse or kin == "adam" else ""
        print(f"the update looks like {kin} or its kin: several steps or several images{more}")
    else:
        print(f"the update looks like one step of {found.optimizer} on one image, learning rate {found.learning_rate:.3g}")
    return found.optimizer, kin, swapped


def _twice(run):
    """(Reconstruction, PSNR in dB between its images and those of a search from another start; None for exact attacks)."""
    found = run()
    if hasattr(found, "verdict"):
        return found, None
    if hasattr(found, "local_steps"):
        run = partial(run, steps=found.local_steps, **CLOSER)
        found = run()
    again = run(seed=1)
    images, others = (each.images.double().cpu().clamp(0, 1) for each in (found, again))
    return found, float(metrics.psnr(images[metrics.match(images, others)], others, data_range=1.0, per_image=True).median())


def _grade(found, agreement):
    """2 where the images explain the update and nothing else does, 1 where they do in part, else 0."""
    if hasattr(found, "recovered"):
        return 2 if found.recovered.all() else int(found.recovered.any())
    if hasattr(found, "verdict"):
        return 2 if found.verdict.startswith("determined") else int(found.verdict.startswith("partly"))
    return 2 if found.loss <= EXPLAINED and agreement >= AGREED else int(found.loss <= PARTLY or agreement >= AGREED)


def _lines(found, agreement, grade):
    """What to print of a result."""
    if hasattr(found, "verdict"):  # its loss is the chi2/N that the verdict names
        yield found.verdict
        if grade == 0:
            return
    else:
        size = int(found.loss <= EXPLAINED) + int(found.loss <= PARTLY)
        yield f"{GRADES[size]}: loss {found.loss:.3g} after {found.evaluations} evaluations; {ENDS[found.stop_reason]}"
        which = "the same" if agreement >= AGREED else "another"
        yield f"a search from another start ends at {which} picture ({agreement:.0f} dB between the two)"
    if (found.labels >= 0).all():
        yield f"labels {found.labels.tolist()}"
    if getattr(found, "learning_rate", math.nan) > 0:
        yield f"learning rate {found.learning_rate:.6g}"
    if hasattr(found, "local_steps"):
        yield f"local steps {found.local_steps} (where later ones hardly move the weights, other numbers explain it as well)"


def _save(images, out):
    from torchvision.utils import save_image

    factor = max(1, SIDE // images.shape[-1])
    save_image(images.repeat_interleave(factor, -1).repeat_interleave(factor, -2), out, padding=factor)


def _conclude(grade, attack, num_images, swapped):
    if grade == 2:
        print("it explains the update: what it shows has leaked")
        return
    print(
        "that is no proof of a leak, nor a proof that nothing leaks: look at the picture. Each attack is for one kind of client,"
    )
    print(
        f"here with {num_images} image{'s' * (num_images > 1)} in the step (--images, num_images), and some need an nn.Sequential"
    )
    if swapped:
        print("and the files look as if they had changed places")
    if attack != "all":
        print("others to try, by what the client did:")
        print(*(f"  --attack {name:13} {about}" for name, about in ATTACKS.items() if name != attack), sep="\n")
