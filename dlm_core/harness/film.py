"""A reconstruction in the making: private images above, below them what the search has by then."""

import base64
import html
import io
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

import torch
from PIL import Image

from dlm_core.harness import figures
from dlm_core.results import Reconstruction

SCALE, GAP = 4, 6  # screen pixels of an image's pixel, and between images
COLOURS = 64
# Evaluations that are shown, as far as a search gets; then its end.
SHOWN = (1, 2, 4, 7, 11, 17, 26, 40, 63, 100)
MILLISECONDS, LAST = 300, 3000  # of a frame, and of the last one


def frames(private: torch.Tensor, found: Sequence[Reconstruction]) -> list[Image.Image]:
    """The pictures of the film, the last one of what was found.

    Parameters
    ----------
    private
        Images [B, C, H, W] in [0, 1].
    found
        B searches, of one image each, that kept every point (``keep_every=1``).
    """
    films = []
    for each in found:
        kept = dict(each.history)
        stages = [kept[step][0] for step in SHOWN if step in kept]
        stages += [stages[-1]] * (len(SHOWN) - len(stages))
        films.append([*stages, each.images[0]])
    return [_frame(list(private), stage) for stage in zip(*films)]


def save(film: Sequence[Image.Image], place: Path | IO[bytes]) -> None:
    """Write a film as a GIF that begins again at its end."""
    times = [MILLISECONDS] * (len(film) - 1) + [LAST]
    rest: dict[str, Any] = {"append_images": film[1:], "duration": times, "loop": 0}
    film[0].save(place, format="GIF", save_all=True, optimize=True, **rest)


def show(private: torch.Tensor, found: Sequence[Reconstruction], alt: str) -> None:
    """Show the film of ``frames`` in a notebook, with what is to be seen in it as its caption."""
    from IPython.display import display

    held = io.BytesIO()
    save(frames(private, found), held)
    coded = base64.b64encode(held.getvalue()).decode()
    picture = f'<img src="data:image/gif;base64,{coded}" alt="{html.escape(alt)}">'
    display({"text/html": picture, "text/plain": "a film"}, raw=True)
    figures.caption(alt)


def _frame(above: Sequence[torch.Tensor], below: Sequence[torch.Tensor]) -> Image.Image:
    """Two rows of images [C, H, W] on white."""
    height, width = (SCALE * size for size in above[0].shape[1:])
    size = (len(above) * (width + GAP) - GAP, 2 * height + GAP)
    page = Image.new("RGB", size, "white")
    for row, pictures in enumerate((above, below)):
        for column, picture in enumerate(pictures):
            pixels = (picture.detach().float().clamp(0, 1) * 255).round().byte()
            drawn = Image.fromarray(pixels.expand(3, -1, -1).permute(1, 2, 0).cpu().numpy())
            large = drawn.resize((width, height), Image.Resampling.NEAREST)
            page.paste(large, (column * (width + GAP), row * (height + GAP)))
    return page.quantize(COLOURS, dither=Image.Dither.NONE)
