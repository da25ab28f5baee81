"""A client's images and labels, from the files in which their owner keeps them; no file is run."""

import math
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dlm_core import check
from dlm_core.arrays import ClassIndices, Pixels

IMAGES, LABELS = ("images", "x", "data"), ("labels", "y", "targets")  # names of entries
LARGEST = 2**29  # bytes that an archive may unpack to
TAKEN = (
    "it takes a picture, a .npz or .npy of arrays, a .safetensors file, or a torch file of tensors "
    "alone"
)


@check.arguments
def read(
    paths: Sequence[str | Path], image_shape: Sequence[int]
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Read images, all files one after the other.

    Parameters
    ----------
    paths
        Pictures of the images' own size; or files of arrays: [N, C, H, W], [N, H, W, C] or, of one
        channel, [N, H, W], one image without N, as 8-bit values or in [0, 1]. Of several arrays in
        a file the one named "images", "x" or "data" is taken, and "labels", "y" or "targets".
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


def _of_file(path: Path, image_shape: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor | None]:
    called = f"images {str(path)!r}"
    if not path.is_file():
        raise ValueError(f"{called} does not exist, or is no file")
    try:
        held = _picture(path, image_shape[0]) if _is_picture(path) else _arrays(path)
    except Exception as error:  # whatever a damaged file makes of its reader
        raise ValueError(f"{called} cannot be read ({type(error).__name__}); {TAKEN}") from None
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


def _named(entries: Mapping[str, Any], names: Sequence[str]) -> str | None:
    return next((name for name in names if name in entries), None)


def _is_picture(path: Path) -> bool:
    from PIL import Image

    return path.suffix.lower() in Image.registered_extensions()


def _picture(path: Path, channels: int) -> torch.Tensor:
    """[C, H, W] in [0, 1]."""
    from PIL import Image

    with Image.open(path) as picture:
        values = np.array(picture.convert("L" if channels == 1 else "RGB"), dtype=np.float32)
    return torch.from_numpy(values).reshape(*values.shape[:2], -1).movedim(2, 0) / 255


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
