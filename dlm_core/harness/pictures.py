"""The picture that an audit writes, what is said of values outside [0, 1], and what they tell of
the client's preprocessing.
"""

import io
from collections.abc import Iterator
from pathlib import Path

import torch

from dlm_core.beyond.preprocessing import KNOWN, Normalisation
from dlm_core.harness import written

SIDE = 256  # pixels of the picture's width, about
HALF_LEVEL = 0.5 / 255  # what rounding to 8 bits takes away in any picture
BEYOND = 0.02  # of a pixel outside [0, 1], which an error of the attack may explain
SPREAD = 4.0  # standard errors by which a pixel may be off
WHOLE = 0.1  # root mean square distance from whole grey levels, in levels; at random 0.29
FILLED = 0.25  # of [0, 1], by the pixels of nearly any photograph
FEW = 8  # grey levels, below which any values may be whole by chance


def check_out(out: Path) -> None:
    """Raise ValueError unless the picture can be written to ``out``, in a known format."""
    from PIL import Image

    written.check_writable("out", out)
    try:
        known = Image.registered_extensions()[out.suffix.lower()]
        Image.new("RGB", (8, 8)).save(io.BytesIO(), known)
    except (KeyError, ValueError, OSError):
        raise ValueError(
            f"out is {str(out)!r}; it takes the suffix of a format of pictures, such as .png"
        ) from None


def write(images: torch.Tensor, out: str | Path) -> Iterator[str]:
    """Write images [B, C, H, W], enlarged; yield what is to be said of their range."""
    from torchvision.utils import save_image

    said = shown_as(images)
    images = in_range(images)
    if said is not None:
        yield said
    if images.shape[1] not in (1, 3):  # a picture each of its channels
        images = images.reshape(-1, 1, *images.shape[2:])
    factor = max(1, SIDE // images.shape[-1])
    save_image(
        images.repeat_interleave(factor, -1).repeat_interleave(factor, -2), out, padding=factor
    )


def in_range(images: torch.Tensor) -> torch.Tensor:
    """The images as a picture shows them: in [0, 1], rescaled all alike where they leave it by more
    than an attack's error.
    """
    low, high = _ends(images)
    if _outside(low, high):
        images = (images - low) / _width(low, high)
    return images.clamp(0, 1)


def shown_as(images: torch.Tensor) -> str | None:
    """How much of the images lies outside [0, 1], and how a picture shows it; None for nothing that
    8 bits could show.
    """
    low, high = _ends(images)
    out = (images < -HALF_LEVEL) | (images > 1 + HALF_LEVEL)
    if not out.any():
        return None
    share = f"{100 * float(out.double().mean()):.3g} % of its values lie outside [0, 1]"
    if not _outside(low, high):
        by = max(-low, high - 1)
        return f"{share}, by {by:.2g} at most: they are shown as black and white"
    moved = f"value {'-' if low > 0 else '+'} {abs(low):.3g}"
    return (
        f"{share}, from {low:.3g} to {high:.3g}: the picture shows "
        f"({moved}) / {_width(low, high):.3g}, the results hold the values themselves"
    )


def suspicion(
    images: torch.Tensor,
    told: Normalisation | None,
    *,
    error: float = 0.0,
    mixed: bool = False,
) -> str | None:
    """What the values of recovered images say against the preprocessing that was told, or against
    none; None for nothing.

    Pixels of 8 bits are whole grey levels under the client's own preprocessing, and under no other.

    Parameters
    ----------
    images, told
        [B, C, H, W] as recovered, and the preprocessing that was told.
    error
        Root mean square error of a value, which may bring it outside [0, 1].
    mixed
        Whether they may be means of several images, whose weights can have both signs.
    """
    images = images.detach().double().cpu()
    if _whole(images):
        return None
    values = images if told is None else told.values(images)
    if told is not None and _whole(values):
        return (
            f"normalise is {told}, but the pixels are whole grey levels of 8 bits without it: the "
            "client did not normalise its images, it seems"
        )
    if told is not None and not mixed and _as_it_is(values, told, SPREAD * error):
        return (
            f"normalise is {told}, but what the network saw lies in [0, 1] without it, from "
            f"{float(values.min()):.3g} to {float(values.max()):.3g}: the client did not normalise "
            "its images, perhaps"
        )
    count = images.shape[1]
    known = [each for each in KNOWN.values() if len(each.mean) in (1, count)]
    sure = [each for each in known if _whole(each.pixels(values))]
    if sure:
        return (
            f"the client normalised its images as {sure[0]}, it seems: so undone, all pixels are "
            f"whole grey levels of 8 bits; {_advice(sure[0])}"
        )
    low, high = _ends(images)
    if not _outside(low + SPREAD * error, high - SPREAD * error):
        return None
    if mixed:
        return (
            f"the pixels run from {low:.3g} to {high:.3g}, outside [0, 1], as those of a mean of "
            f"several images may, or of a client that normalises: {_advice(None)}"
        )
    perhaps = "otherwise" if told is not None else "its images"
    return (
        f"the pixels run from {low:.3g} to {high:.3g}, outside [0, 1]: the client normalised "
        f"{perhaps}, perhaps; {_advice(_likely(known, values))}"
    )


def _advice(known: Normalisation | None) -> str:
    if known is None:
        return "--normalise (normalise) takes mean and std, or a range"
    return f"--normalise {known} (normalise={known.name!r}) shows them in [0, 1]"


def _likely(known: list[Normalisation], values: torch.Tensor) -> Normalisation | None:
    """The one that brings all values into [0, 1] and fills it best."""
    ends = {each: _ends(each.pixels(values)) for each in known}
    widths = {each: high - low for each, (low, high) in ends.items() if not _outside(low, high)}
    best = max(widths, key=lambda each: widths[each], default=None)
    return best if best is not None and widths[best] > FILLED else None


def _as_it_is(values: torch.Tensor, told: Normalisation, error: float) -> bool:
    """Whether values that would leave [0, 1] if so normalised fill a good part of it instead."""
    low, high = _ends(values)
    black, white = _ends(
        told.values(torch.stack([torch.zeros_like(values), torch.ones_like(values)]))
    )
    leaves = _outside(black, white)
    return leaves and not _outside(low + error, high - error) and high - low > FILLED


def _whole(pixels: torch.Tensor) -> bool:
    """Whether pixels in [0, 1] are whole grey levels of 8 bits, more than a few of them, in each
    image; one of a single value, such as the grey in place of an image not found, says nothing.
    """
    if _outside(*_ends(pixels)):
        return False
    levels = 255 * pixels.flatten(1)
    levels = levels[levels.amax(1) > levels.amin(1)]
    away = (levels - levels.round()).square().mean(1).sqrt()
    return len(levels.round().unique()) >= FEW and bool((away < WHOLE).all())


def _ends(images: torch.Tensor) -> tuple[float, float]:
    return float(images.min()), float(images.max())


def _outside(low: float, high: float) -> bool:
    return low < -BEYOND or high > 1 + BEYOND


def _width(low: float, high: float) -> float:
    """Of the values, 1 where all are the same."""
    return high - low or 1.0
