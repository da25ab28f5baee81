"""Does this client leak? Attacks on two weight files of one's own, and what their results mean, in
words.

There is no truth to compare with. An exact attack judges itself; a search is made twice, from
different starts: that both end at the same images, which explain the update, is the evidence. A
small loss alone is none: where an image moves the weights little, as from PyTorch's own initial
weights, others explain the update nearly as well.
"""

import copy
import io
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
from torch import nn

from dlm_core import check, metrics, models, records
from dlm_core.arrays import ImageShape
from dlm_core.beyond import recognise
from dlm_core.harness import files, registry  # noqa: F401, the registry fills the tables
from dlm_core.observation import Observation, Unchanged, observe
from dlm_core.results import Explains, Reconstruction, SearchEvidence
from dlm_core.threads import one_thread
from dlm_core.weights import StateDict, rounded

# An attack's loss up to which its images explain the update: all of it, some of it.
EXPLAINED, PARTLY = 1e-3, 0.1
# dB between the images of two searches that found the same: right ones 40 and more, wrong below 20.
AGREED = 25.0
GRADES = ("explains little of the update", "explains the update in part", "explains the update")
# Of unrolled searches once their steps are known.
CLOSER = {"tolerance": 0.0, "patience": 200, "max_evaluations": 1000}
# Pixels of the picture's width, about.
SIDE = 256
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
    out: str | Path = "reconstruction.png",
) -> dict[str, Reconstruction]:
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
        In the client's step.
    attack
        A key of ``tried``, or "all": one after the other until one explains the update.
    client
        That ``unrolled_dlm`` simulates, of ``records.CLIENT_OPTIMIZERS``; None goes by what the
        update looks like.
    out
        Picture to write, enlarged; its suffix says in which format.

    Returns
    -------
    dict of str to Reconstruction
        What each attack found.

    Raises
    ------
    ValueError
        Before any attack, for arguments out of range and snapshots that do not fit.
    """
    _check_asked(model, image_shape, num_images, attack, client)
    _check_out(Path(out))
    seen, coarse = _read(before, after, model, image_shape, num_classes)
    optimizer, kin, swapped = _first_look(seen, num_images, coarse)
    names = _chosen(num_images, kin, optimizer) if attack == "all" else [attack]
    options: dict[str, dict[str, Any]] = {
        "exact": {"transmitted": coarse},
        "dlm_plus": {"restarts": 2},
        "unrolled_dlm": {"client_optimizer": client or kin},
    }
    results, ranks = {}, {}
    for name in names:
        record = records.ATTACKS[name]
        print(f"{name} ({record.client}) ...", flush=True)
        run = partial(record, seen, num_images=num_images, **options.get(name, {}))
        try:
            with one_thread():  # searches side by side on several threads each slow down tenfold
                found, agreement = _twice(run, record.seeded)
        except Exception as why:  # whatever a user's network or attack raises
            if attack != "all":
                raise ValueError(f"attack {name} does not apply: {_sentence(why)}") from None
            print(f"    does not apply: {_sentence(why)}")
            continue
        grade = _grade(found, agreement)
        results[name], ranks[name] = found, (grade, agreement or 0)
        print(*(f"    {line}" for line in _lines(found, agreement, grade)), sep="\n", flush=True)
        if grade is Explains.FULLY:
            break
    if not results:
        print("no attack applies, which is no proof that nothing leaks")
        return results
    best = max(ranks, key=ranks.__getitem__)  # the first of equals
    _save(results[best].images.float(), out)
    print(f"{out} shows what {best} found")
    _conclude(ranks[best][0], attack, num_images, swapped)
    return results


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


def _sentence(error: Exception) -> str:
    """An error in one line; its kind too, where it is none of ours."""
    line = next(iter(str(error).splitlines()), "")
    if isinstance(error, (ValueError, torch.linalg.LinAlgError)) and line:
        return line
    return f"{type(error).__name__}: {line}" if line else type(error).__name__


def _check_out(out: Path) -> None:
    """Raise ValueError unless the picture can be written to ``out``, in a known format."""
    from PIL import Image

    if not out.absolute().parent.is_dir():
        raise ValueError(f"out is {str(out)!r}; its folder does not exist")
    if out.is_dir():
        raise ValueError(f"out is {str(out)!r}, a folder; it takes the picture's file")
    existed = out.exists()
    try:
        open(out, "ab").close()
        if not existed:
            out.unlink()
    except OSError as error:
        raise ValueError(
            f"out is {str(out)!r}, which cannot be written ({error.strerror})"
        ) from None
    try:
        known = Image.registered_extensions()[out.suffix.lower()]
        Image.new("RGB", (8, 8)).save(io.BytesIO(), known)
    except (KeyError, ValueError, OSError):
        raise ValueError(
            f"out is {str(out)!r}; it takes the suffix of a format of pictures, such as .png"
        ) from None


def _chosen(num_images: int, kin: str, optimizer: str) -> list[str]:
    """The attacks that suit what was seen at the first look."""
    left_out = {"exact_batch" if num_images == 1 else "exact"}
    if kin != "adam" or optimizer == "several steps":
        left_out.add("interval_dlm")
    return [name for name in tried() if name not in left_out]


def _read(
    before: Any,
    after: Any,
    model: str | nn.Module,
    image_shape: Sequence[int],
    num_classes: int | None,
) -> tuple[Observation, torch.dtype | None]:
    """(Observation, dtype of half precision to which the weights that came back are rounded, or
    None).
    """
    where = ""
    expected: Any
    if isinstance(model, str):
        where = f" (image_shape is {image_shape}, num_classes {num_classes or 'as in before'})"
        expected = partial(_shapes_for, model, image_shape, num_classes)
    else:
        expected = model.state_dict(keep_vars=True)  # in which parameters are marked as such
    try:
        before, after, notes = files.snapshots(before, after, expected)
    except files.Unfit as why:
        raise ValueError(f"{why}{where}") from None
    try:
        if isinstance(model, str):
            count = num_classes or _classes_of(model, image_shape, before)
            model = models.build(model, image_shape, count)
        names = {name for name, _ in model.named_parameters()}
        sent = {name: w for name, w in after.items() if name in names}
        coarse = _half_precision(sent)
        # All in one, as networks compute; float32 held in float64 has the rounding of float32.
        single = all(torch.equal(w.float().double(), w.double()) for w in sent.values())
        dtype = torch.float32 if single else torch.float64
        before, after = (
            {name: w.to(dtype) if w.is_floating_point() else w for name, w in each.items()}
            for each in (before, after)
        )
        seen = observe(copy.deepcopy(model).to(dtype), before, after, image_shape)
    except Unchanged:
        raise
    except ValueError as why:
        raise ValueError(f"{why}{where}") from None
    if coarse:
        notes.append(f"the weights that came back are rounded to {coarse}")
    print(*notes, sep="\n", end="\n" * bool(notes))
    if num_classes not in (None, seen.num_classes):
        raise ValueError(
            f"num_classes is {num_classes}; the network has {seen.num_classes} outputs"
        )
    return seen, coarse


def _shapes_for(
    model: str, image_shape: Sequence[int], num_classes: int | None, known: Mapping[str, Any]
) -> StateDict:
    """The same as ``_shapes``, with the number of classes that ``known`` entries show."""
    return _shapes(model, image_shape, num_classes or _classes_of(model, image_shape, dict(known)))


def _shapes(model: str, image_shape: Sequence[int], num_classes: int) -> StateDict:
    """The state dict of a network by name, without its numbers where the network allows."""
    try:
        try:
            with torch.device("meta"):
                return models.build(model, image_shape, num_classes).state_dict()
        except (NotImplementedError, RuntimeError):  # a user's network may need the numbers
            return models.build(model, image_shape, num_classes).state_dict()
    except ValueError:
        raise
    except Exception as why:
        raise ValueError(
            f"model {model!r} cannot be made for image_shape {image_shape} and {num_classes} "
            f"classes ({_sentence(why)})"
        ) from None


def _classes_of(model: str, image_shape: Sequence[int], before: StateDict) -> int:
    """The number of classes in a snapshot: where networks of more of them are larger."""
    one, more = (_shapes(model, image_shape, count) for count in (100, 101))
    for name, shape in ((name, w.shape) for name, w in one.items() if name in before):
        for axis, (size, larger) in enumerate(zip(shape, more[name].shape)):
            if size != larger and before[name].ndim > axis:
                return before[name].shape[axis]
    return 100


def _half_precision(weights: StateDict) -> torch.dtype | None:
    """The dtype of half precision to which all ``weights`` are rounded, whatever they are held in;
    else None.
    """

    def fits(dtype: torch.dtype) -> bool:
        return all(torch.equal(w, weights[name]) for name, w in rounded(weights, dtype).items())

    # The coarser first.
    return next((dtype for dtype in (torch.bfloat16, torch.float16) if fits(dtype)), None)


def _first_look(
    seen: Observation, num_images: int, coarse: torch.dtype | None
) -> tuple[str, str, bool]:
    """Print what the update says at once; return the optimizer's name, whose kin it is, and whether
    the files look swapped.
    """
    bias = seen.head.delta_bias
    # The labels' classes fall in Δ, all others rise.
    swapped = bool((bias > 0).sum() <= num_images < (bias < 0).sum())
    if swapped:
        print("have the two files changed places? the last layer moved away from its labels")
    try:
        found = recognise.recognise(seen)
    except Exception as why:  # whatever a user's network raises
        print(f"the update cannot be read at a first look: {_sentence(why)}")
        return "several steps", "sgd", swapped
    kin = "adam" if found.share >= recognise.SIGN_LIKE else "sgd"
    if found.optimizer == "several steps":
        unread = (
            "one step of which rounding leaves too little"
            if coarse
            else "one step whose gradients are too large to read"
        )
        more = f" or {unread}" if coarse or kin == "adam" else ""
        print(f"the update looks like {kin} or its kin: several steps or several images{more}")
    else:
        print(
            f"the update looks like one step of {found.optimizer} on one image, "
            f"learning rate {found.learning_rate:.3g}"
        )
    return found.optimizer, kin, swapped


def _twice(run: Callable[..., Reconstruction], seeded: bool) -> tuple[Reconstruction, float | None]:
    """(the result, PSNR in dB between its images and those of a search from another start; None for
    exact attacks, and for those that have one start).
    """
    found = run()
    if not isinstance(found.evidence, SearchEvidence):
        return found, None
    if found.local_steps is not None:
        run = partial(run, local_steps=found.local_steps, **CLOSER)
        found = run()
    if not seeded:
        return found, None
    again = run(seed=1)
    images, others = (each.images.double().cpu().clamp(0, 1) for each in (found, again))
    matched = images[metrics.match(images, others)]
    return found, float(metrics.psnr(matched, others, data_range=1.0, per_image=True).median())


def _grade(found: Reconstruction, agreement: float | None) -> Explains:
    """How much the images explain, and for a search whether nothing else does as well."""
    if found.evidence.explains is not None:
        return found.evidence.explains
    agreed = agreement is not None and agreement >= AGREED
    if found.evidence.loss <= EXPLAINED and agreed:
        return Explains.FULLY
    return Explains.PARTLY if found.evidence.loss <= PARTLY or agreed else Explains.LITTLE


def _lines(found: Reconstruction, agreement: float | None, grade: Explains) -> Iterator[str]:
    """What to print of a result."""
    if found.evidence.verdict is not None:  # its loss is the chi2/N that the verdict names
        yield found.evidence.verdict
        if grade is Explains.LITTLE:
            return
    searched = isinstance(found.evidence, SearchEvidence)
    if searched:
        loss = found.evidence.loss
        size = int(loss <= EXPLAINED) + int(loss <= PARTLY)
        yield (
            f"{GRADES[size]}: loss {loss:.3g} after {found.evaluations} evaluations; "
            f"{found.status.sentence}"
        )
        yield _agreed(agreement)
    if (found.labels >= 0).all():
        yield f"labels {found.labels.tolist()}"
    simulated = searched and found.local_steps is not None
    if found.learning_rate and (simulated or found.evidence.verdict is not None):
        yield f"learning rate {found.learning_rate:.6g}"
    if simulated:
        yield (
            f"local steps {found.local_steps} (where later ones hardly move the weights, "
            "other numbers explain it as well)"
        )


def _agreed(agreement: float | None) -> str:
    if agreement is None:
        return "it has one start: no search from another one speaks for its picture"
    which = "the same" if agreement >= AGREED else "another"
    between = f"({agreement:.0f} dB between the two)"
    return f"a search from another start ends at {which} picture {between}"


def _save(images: torch.Tensor, out: str | Path) -> None:
    from torchvision.utils import save_image

    if images.shape[1] not in (1, 3):  # a picture each of its channels
        images = images.reshape(-1, 1, *images.shape[2:])
    factor = max(1, SIDE // images.shape[-1])
    save_image(
        images.repeat_interleave(factor, -1).repeat_interleave(factor, -2), out, padding=factor
    )


def _conclude(grade: Explains, attack: str, num_images: int, swapped: bool) -> None:
    if grade is Explains.FULLY:
        print("it explains the update: what it shows has leaked")
        return
    print(
        "that is no proof of a leak, nor a proof that nothing leaks: look at the picture. "
        "Each attack is for one kind of client,"
    )
    print(
        f"here with {num_images} image{'s' * (num_images > 1)} in the step "
        "(--num-images, num_images), and some need an nn.Sequential"
    )
    if swapped:
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
