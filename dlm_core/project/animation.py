"""A reconstruction in the making, as a GIF with a still beside it: the site's first page has it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from dlm_core import attacks, data, federated, models
from dlm_core.harness.paths import REPOSITORY

PLACE = REPOSITORY / "docs" / "_static" / "reconstruction.gif"
SCALE, GAP = 4, 6  # screen pixels of an image's pixel, and between images
COLOURS = 64
# Evaluations that are shown, as far as a search gets; then its end.
SHOWN = (1, 2, 4, 7, 11, 17, 26, 40, 63, 100)
MILLISECONDS, LAST = 300, 3000  # of a frame, and of the last one


def write(path: Path = PLACE, dataset: str = "cifar100", num_images: int = 4) -> Path:
    """Attack clients of one image each by DLM+, and write how their pictures emerge.

    Parameters
    ----------
    path
        Of the GIF; its still, the last frame, has the same name and ".png".
    dataset, num_images
        Its first images, bundled; private ones above, the attack's below.
    """
    images, labels, num_classes, _ = data.load(dataset, n=num_images, source="bundled")
    shape = tuple(images.shape[1:])
    model = models.build("lenet", image_shape=shape, num_classes=num_classes, seed=0)
    films = []
    for x, y in zip(images, labels):
        seen = federated.train_locally(model, x[None], y[None], learning_rate=0.01)
        found = attacks.dlm_plus(seen, seed=0, keep_every=1)
        kept = dict(found.history)
        stages = [kept[step][0] for step in SHOWN if step in kept]
        stages += [stages[-1]] * (len(SHOWN) - len(stages))
        films.append([*stages, found.images[0]])
    frames = [_frame(list(images), stage) for stage in zip(*films)]
    times = [MILLISECONDS] * (len(frames) - 1) + [LAST]
    rest: dict[str, Any] = {
        "append_images": frames[1:],
        "duration": times,
        "loop": 0,
        "optimize": True,
    }
    frames[0].save(path, save_all=True, **rest)
    frames[-1].save(path.with_suffix(".png"), optimize=True)
    return path


def _frame(above: Sequence[torch.Tensor], below: Sequence[torch.Tensor]) -> Image.Image:
    """Two rows of images [C, H, W] on white."""
    height, width = (SCALE * size for size in above[0].shape[1:])
    size = (len(above) * (width + GAP) - GAP, 2 * height + GAP)
    page = Image.new("RGB", size, "white")
    for row, pictures in enumerate((above, below)):
        for column, picture in enumerate(pictures):
            pixels = (picture.detach().float().clamp(0, 1) * 255).round().byte()
            drawn = Image.fromarray(pixels.expand(3, -1, -1).permute(1, 2, 0).numpy())
            large = drawn.resize((width, height), Image.Resampling.NEAREST)
            page.paste(large, (column * (width + GAP), row * (height + GAP)))
    return page.quantize(COLOURS, dither=Image.Dither.NONE)
