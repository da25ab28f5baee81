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
from typing import Annotated, Any, NamedTuple

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from dlm_core import check, models, records
from dlm_core.arrays import ImageShape
from dlm_core.beyond import inputs
from dlm_core.harness import files, registry  # noqa: F401, the registry fills the tables
from dlm_core.harness.belief import AGREED, EXPLAINED, PARTLY, Audit, Belief, believe, twice
from dlm_core.harness.look import Look, first_look, sentence
from dlm_core.observation import Unchanged, observe
from dlm_core.results import Explains, Reconstruction, SearchEvidence
from dlm_core.threads import one_thread
from dlm_core.weights import StateDict, rounded

GRADES = ("explains little of the update", "explains the update in part", "explains the update")
# Images that are looked for unasked.
MOST_IMAGES = 16
# Of a pixel outside [0, 1] which rounding may explain.
BEYOND = 0.02
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
    out
        Picture to write, enlarged; its suffix says in which format.

    Returns
    -------
    Audit
        The verdict, and what each attack found.

    Raises
    ------
    ValueError
        Before any attack, for arguments out of range and snapshots that do not fit.
    """
    _check_asked(model, image_shape, num_images, attack, client)
    _check_out(Path(out))
    read = _read(before, after, model, image_shape, num_classes)
    try:
        seen = observe(read.network, read.network.state_dict(), read.after, image_shape)
    except Unchanged:
        raise _unchanged(read) from None
    except ValueError as why:
        return _without_head(f"{why}{read.where}", read, image_shape, out)
    if num_classes not in (None, seen.num_classes):
        raise ValueError(
            f"num_classes is {num_classes}; the network has {seen.num_classes} outputs"
        )
    look, coarse = first_look(seen, num_images, read.coarse), read.coarse
    print(*read.notes, *look.sentences, sep="\n")
    plan = _plan(num_images, look) if attack == "all" else [(attack, num_images)]
    options: dict[str, dict[str, Any]] = {
        "division": {"transmitted": coarse},
        "exact": {"transmitted": coarse, "weight_decay": look.optimizer == "sgd with decay"},
        "dlm_plus": {"restarts": 2},
        "unrolled_dlm": {"client_optimizer": client or look.kin},
    }
    runs = [
        (
            name,
            count,
            partial(records.ATTACKS[name], seen, num_images=count, **options.get(name, {})),
        )
        for name, count in plan
    ]
    found = _tried_in_turn(runs, look, num_images, only=attack != "all")
    if not found:
        print("no attack applies, which is no proof that nothing leaks")
        return found
    best = max(found.beliefs, key=found.beliefs.__getitem__)  # the first of equals
    _show(found, best, out, attack)
    return found


Run = tuple[str, int, Callable[..., Reconstruction]]  # an attack, how many images, what runs it


def _tried_in_turn(runs: Sequence[Run], look: Look, told: int, *, only: bool) -> Audit:
    """What attacks find, one after the other until one explains the update; ValueError where the
    ``only`` one does not apply.
    """
    found = Audit(results={}, beliefs={}, look=look, notes=[])
    for name, count, run in runs:
        record = records.ATTACKS[name]
        key = name if name not in found else f"{name}, {count} image{'s' * (count > 1)}"
        many = f"; {count} image{'s' * (count > 1)}" if count != told else ""
        print(f"{name} ({record.client}{many}) ...", flush=True)
        try:
            # searches side by side on several threads each slow down tenfold; the fused kernels of
            # attention have no second derivative
            with one_thread(), sdpa_kernel(SDPBackend.MATH):
                result, agreement = twice(run, record)
        except Exception as why:  # whatever a user's network or attack raises
            if only:
                raise ValueError(f"attack {name} does not apply: {sentence(why)}") from None
            print(f"    does not apply: {sentence(why)}")
            found.notes.append(f"{name} does not apply: {sentence(why)}")
            continue
        belief = believe(result, agreement, look)
        found.results[key], found.beliefs[key] = result, belief
        lines = _lines(result, agreement, belief)
        print(*(f"    {line}" for line in lines), sep="\n", flush=True)
        if belief.grade is Explains.FULLY:
            break
    return found


def _show(found: Audit, best: str, out: str | Path, attack: str) -> None:
    """Write the picture, and conclude."""
    for line in _save(found[best].images.float(), out):
        print(line)
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


def _plan(num_images: int, look: Look) -> list[tuple[str, int]]:
    """The attacks that suit what was seen at the first look, each with the images it looks for:
    those told, or the more that passed through the first layer; then as many as a later layer's
    directions, which may be steps as well, or as few as told.
    """
    told = max(num_images, look.images)
    plan = [(name, told) for name in _suitable(told, look)]
    others = [look.directions] if told < look.directions <= MOST_IMAGES else []
    # an update whose entries were changed one by one may have more directions than images
    others += [num_images] if told > num_images else []
    for count in others:
        more = [name for name in _suitable(count, look) if name != "unrolled_dlm"]
        plan += [(name, count) for name in more]
    return plan


def _suitable(num_images: int, look: Look) -> list[str]:
    left_out = {"exact_batch"} if num_images == 1 else {"division", "exact"}
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
        Half precision to which these are rounded, or None.
    where
        What to add to an error of the network's.
    notes
        What was done to the files, in sentences.
    """

    network: nn.Module
    after: StateDict
    coarse: torch.dtype | None
    where: str
    notes: list[str]


def _read(
    before: Any,
    after: Any,
    model: str | nn.Module,
    image_shape: Sequence[int],
    num_classes: int | None,
) -> _Read:
    where = ""
    expected: Any
    if isinstance(model, nn.Module):
        model = _copied(model)
    if isinstance(model, str):
        where = f" (image_shape is {image_shape}, num_classes {num_classes or 'as in before'})"
        expected = partial(_shapes_for, model, image_shape, num_classes)
    else:
        expected = model.state_dict(keep_vars=True)  # in which parameters are marked as such
    try:
        before, after, notes = files.snapshots(before, after, expected)
    except files.Unfit as why:
        raise ValueError(f"{why}{where}") from None
    if isinstance(model, str):
        model = models.build(
            model, image_shape, num_classes or _classes_of(model, image_shape, before)
        )
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
    network = model.to(dtype)
    network.load_state_dict(before)
    if coarse:
        notes.append(f"the weights that came back are rounded to {coarse}")
    return _Read(network, after, coarse, where, notes)


def _copied(model: nn.Module) -> nn.Module:
    """A copy of a user's network; ValueError, in one sentence, where there is none."""
    kind = type(model).__name__
    if any(nn.parameter.is_lazy(w) for w in (*model.parameters(), *model.buffers())):
        raise ValueError(
            f"the model ({kind}) has lazy layers without weights; call it once on an image"
        )
    try:
        return copy.deepcopy(model)
    except Exception as why:  # a lock, an open file, a tensor kept from a forward pass
        raise ValueError(
            f"the model ({kind}) cannot be copied ({sentence(why)}); "
            "give one that has not been called yet, and no more than its layers"
        ) from None


def _unchanged(read: _Read) -> Unchanged:
    """What to say where no parameter moved."""
    before = dict(read.network.named_buffers())
    moved = [
        name
        for name, w in before.items()
        if w.is_floating_point() and not torch.equal(w, read.after[name].to(w))
    ]
    if not moved:
        return Unchanged("no weight changed: the client has not trained, or sent what it received")
    return Unchanged(
        f"no parameter changed, but {len(moved)} running statistics did, {moved[0]!r} first: they "
        "are means of what passed through the network, and leak as much of the client's images; "
        "no attack here reads them alone"
    )


def _without_head(why: str, read: _Read, image_shape: Sequence[int], out: str | Path) -> Audit:
    """What the layers of a network show that no Observation takes; ValueError with ``why`` where
    they show nothing.
    """
    try:
        layers = inputs.read(read.network, read.after, image_shape, read.coarse)
    except Exception:  # whatever a user's network raises
        layers = []
    look = Look(layers=layers, unread=why, num_parameters=len(list(read.network.parameters())))
    if not look.shown:
        raise ValueError(why) from None
    print(*read.notes, *look.sentences, sep="\n")
    print("no other attack was tried: each needs what the network has not")
    results: dict[str, Reconstruction] = {}
    beliefs: dict[str, Belief] = {}
    try:
        results["division"] = inputs.shown(layers)
        beliefs["division"] = believe(results["division"], None, look)
    except ValueError as none:
        print(none)
    found = Audit(results=results, beliefs=beliefs, look=look, notes=[why])
    if results:
        _show(found, "division", out, "all")
    return found


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
            f"classes ({sentence(why)})"
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


def _lines(found: Reconstruction, agreement: float | None, belief: Belief) -> Iterator[str]:
    """What to print of a result."""
    if found.evidence.verdict is not None:  # its loss is the chi2/N that the verdict names
        yield found.evidence.verdict
        if belief.grade is Explains.LITTLE:
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
    if belief.doubt is not None:
        yield f"not believed: {belief.doubt}"


def _agreed(agreement: float | None) -> str:
    if agreement is None:
        return "it has one start: no search from another one speaks for its picture"
    which = "the same" if agreement >= AGREED else "another"
    between = f"({agreement:.0f} dB between the two)"
    return f"a search from another start ends at {which} picture {between}"


def _save(images: torch.Tensor, out: str | Path) -> Iterator[str]:
    """Write the picture; what to say of its range."""
    from torchvision.utils import save_image

    low, high = float(images.min()), float(images.max())
    if low < -BEYOND or high > 1 + BEYOND:
        yield (
            f"its values run from {low:.2g} to {high:.2g}: the client normalised its images, "
            "perhaps, and the picture is stretched to that range"
        )
        images = (images - low) / (high - low)
    if images.shape[1] not in (1, 3):  # a picture each of its channels
        images = images.reshape(-1, 1, *images.shape[2:])
    factor = max(1, SIDE // images.shape[-1])
    save_image(
        images.repeat_interleave(factor, -1).repeat_interleave(factor, -2), out, padding=factor
    )


def _conclude(found: Audit, belief: Belief, attack: str, num_images: int) -> None:
    if belief.grade is Explains.FULLY:
        print("it explains the update: what it shows has leaked")
        return
    mixed = [each for each in found.look.shown if each not in found.look.leaked]
    if found.leaks:
        print(f"what stands in the update has leaked: {'; '.join(found.leaks)}")
    if mixed:
        print(f"what stands in it, of one image or mixed of several: {'; '.join(mixed)}")
    print(
        "that is no proof of a leak, nor a proof that nothing leaks: look at the picture. "
        "Each attack is for one kind of client,"
    )
    print(
        f"here with {num_images} image{'s' * (num_images > 1)} in the step "
        "(--num-images, num_images), and some need an nn.Sequential; searches look for pixels in "
        "[0, 1], so that a client that normalises its images is not reached by them"
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
