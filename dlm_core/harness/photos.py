"""A client's images and labels, from the files in which their owner keeps them; no file is run."""

import math
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from dlm_core import check
from dlm_core.arrays import ClassIndices, ImageShape, Pixels

IMAGES, LABELS = ("images", "x", "data"), ("labels", "y", "targets")  # names of entries
LARGEST = 2**29  # bytes that an archive may unpack to
WHITE = (255, 255, 255, 255)
TAKEN = (
    "it takes a picture, a .npz or .npy of arrays, a .safetensors file, or a torch file of tensors "
    "alone"
)


@check.arguments
def read(
    paths: Sequence[str | Path], image_shape: ImageShape
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Read images, all files one after the other.

    Parameters
    ----------
    paths
        Pictures of the images' own size, read as by ``picture``; or files of arrays: [N, C, H, W],
        [N, H, W, C] or, of one channel, [N, H, W], one image without N, as 8-bit values or in
        [0, 1]. Of several arrays in a file the one named "images", "x" or "data" is taken, and
        "labels", "y" or "targets".
    image_shape
        (C, H, W).

    Returns
    -------
    tuple
        The images [N, C, H, W] in [0, 1], and their labels [N] int64; None where a file has none.

    Raises
    ------
    ValueError
        In one sentence that names the file.
    """
    if not paths:
        raise ValueError("images has no file; it takes at least one")
    read = [_of_file(Path(path), tuple(image_shape)) for path in paths]
    images = torch.cat([images for images, _ in read])
    labels = [labels for _, labels in read if labels is not None]
    return images, torch.cat(labels) if len(labels) == len(read) else None


@check.arguments
def picture(
    path: str | Path, *, channels: check.Count = 3, size: check.Count | None = None
) -> torch.Tensor:
    """Read one picture, upright, as people see it.

    Parameters
    ----------
    path
        Of 8 or 16 bits, grey or in colour. It is turned as its EXIF data say, and what is
        transparent is white.
    channels
        C: 1 for grey, 3 for colour.
    size
        Pixels of a side: the centre square is taken and reduced; None: the picture as it is.

    Returns
    -------
    torch.Tensor
        [C, H, W] float32 in [0, 1].

    Raises
    ------
    ValueError
        In one sentence, for a file that is no such picture.
    """
    if channels not in (1, 3):
        raise ValueError(f"channels is {channels}; it takes 1 for grey or 3 for colour")
    if not _is_picture(Path(path)):
        raise ValueError(f"path is {str(path)!r}; it takes a picture, such as a PNG or JPEG file")
    held = _held(Path(path), channels, f"picture {str(path)!r}")
    return held if size is None else _square(held, size)


def _square(image: torch.Tensor, size: int) -> torch.Tensor:
    height, width = image.shape[1:]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    square = image[None, :, top : top + side, left : left + side]
    reduced = nn.functional.interpolate(square, (size, size), mode="bilinear", antialias=True)
    return reduced[0].clamp(0, 1)


def _of_file(path: Path, image_shape: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor | None]:
    called = f"images {str(path)!r}"
    held = _held(path, image_shape[0], called)
    entries = held if isinstance(held, Mapping) else {"images": held}
    name, labels = _named(entries, IMAGES), _named(entries, LABELS)
    if name is None and len(entries) == 1:
        (name,) = entries
    if name is None:
        found = ", ".join(map(repr, entries))
        raise ValueError(f"{called} has {found or 'nothing'}; it takes an entry named 'images'")
    try:
        pixels = Pixels()
        images = pixels.check(_arranged(pixels.convert(_tensor(entries[name])), image_shape))
        indices = ClassIndices()
        of = None if labels is None else indices.check(indices.convert(_tensor(entries[labels])))
    except check.Wrong as wrong:
        raise ValueError(f"{called} takes {wrong}") from None
    if of is not None and len(of) != len(images):
        raise ValueError(f"{called} has {len(images)} images and {len(of)} labels")
    return images, of


def _held(path: Path, channels: int, called: str) -> Any:
    """A picture [C, H, W], an array or tensor, or several by name."""
    if not path.is_file():
        raise ValueError(f"{called} does not exist, or is no file")
    try:
        return _picture(path, channels) if _is_picture(path) else _arrays(path)
    except check.Wrong as wrong:
        raise ValueError(f"{called} takes {wrong}") from None
    except Exception as error:  # whatever a damaged file makes of its reader
        raise ValueError(f"{called} cannot be read ({type(error).__name__}); {TAKEN}") from None


def _named(entries: Mapping[str, Any], names: Sequence[str]) -> str | None:
    return next((name for name in names if name in entries), None)


def _is_picture(path: Path) -> bool:
    from PIL import Image

    return path.suffix.lower() in Image.registered_extensions()


def _picture(path: Path, channels: int) -> torch.Tensor:
    """[C, H, W] in [0, 1]."""
    from PIL import Image, ImageOps

    with Image.open(path) as file:
        upright = ImageOps.exif_transpose(file)
    if upright.mode.startswith("I;16"):  # Pillow would cut it off at 255: nearly all of it white
        values = np.array(upright, dtype=np.float32)[..., None].repeat(channels, -1) / 65535
    elif upright.mode in ("I", "F"):
        raise check.Wrong("pictures of 8 or 16 bits, and not of 32; give the numbers as an array")
    else:
        if upright.has_transparency_data:
            upright = Image.alpha_composite(
                Image.new("RGBA", upright.size, WHITE), upright.convert("RGBA")
            )
        values = np.array(upright.convert("L" if channels == 1 else "RGB"), dtype=np.float32) / 255
    return torch.from_numpy(values).reshape(*values.shape[:2], -1).movedim(2, 0)


def _arrays(path: Path) -> Any:
    """An array or tensor, or several by name."""
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            if sum(entry.file_size for entry in archive.infolist()) > LARGEST:
                raise MemoryError
    if path.suffix not in (".npz", ".npy"):
        return torch.load(path, weights_only=True, map_location="cpu")
    loaded = np.load(path, allow_pickle=False)
    return loaded if isinstance(loaded, np.ndarray) else {n: loaded[n] for n in loaded.files}


def _tensor(value: Any) -> torch.Tensor:
    if isinstance(value, np.ndarray):
        return torch.from_numpy(np.ascontiguousarray(value))
    if not isinstance(value, torch.Tensor):
        raise check.Wrong(f"arrays, and not {check.shown(value)}")
    return value


def _arranged(images: torch.Tensor, image_shape: tuple[int, ...]) -> torch.Tensor:
    """As [N, C, H, W]."""
    channels, height, width = image_shape
    last = (height, width, channels)
    for given, axis in ((image_shape, 0), (last, -1), *[((height, width), None)] * (channels == 1)):
        ndim = images.ndim - len(given)
        if ndim in (0, 1) and tuple(images.shape[ndim:]) == given:
            one = images.reshape(-1, *given)
            return one.movedim(-1, 1) if axis == -1 else one.reshape(-1, *image_shape)
    many = math.prod(image_shape)
    raise check.Wrong(
        f"images of (C, H, W) = {image_shape}, {many} numbers each, and not {list(images.shape)}"
    )
