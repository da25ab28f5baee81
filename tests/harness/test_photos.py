"""Pictures as people have them: of any size, of 8 or 16 bits, grey, transparent, turned."""

import numpy as np
import pytest
import torch
from PIL import Image

from dlm_core.harness import photos

GREY = np.add.outer(10 * np.arange(20), 5 * np.arange(12)).astype(np.uint8)  # 20 rows, 12 columns
TRUE = torch.from_numpy(GREY / 255.0).float()[None]


def in_colour(*more):
    return np.stack([GREY, GREY, GREY, *more], -1)


def turned(path):
    """As a phone leaves it: the pixels lie on their side, and a tag says so."""
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees, clockwise
    Image.fromarray(np.rot90(GREY).copy()).save(path, exif=exif)


KINDS = {
    "grey": lambda path: Image.fromarray(GREY).save(path),
    "colour": lambda path: Image.fromarray(in_colour()).save(path),
    "16 bits": lambda path: Image.fromarray(257 * GREY.astype(np.uint16)).save(path),
    "opaque": lambda path: Image.fromarray(in_colour(np.full_like(GREY, 255))).save(path),
    "palette": lambda path: Image.fromarray(GREY).convert("P").save(path),
    "turned": turned,
}


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("save", KINDS.values(), ids=KINDS)
def test_a_picture_is_what_people_see(tmp_path, save, channels):
    save(tmp_path / "p.png")
    found = photos.picture(tmp_path / "p.png", channels=channels)
    assert found.shape == (channels, 20, 12) and found.dtype == torch.float32
    assert (found - TRUE).abs().max() < 0.51 / 255
    images, labels = photos.read([tmp_path / "p.png"], (channels, 20, 12))
    assert torch.equal(images[0], found) and labels is None


def test_what_is_transparent_is_white(tmp_path):
    alpha = np.full_like(GREY, 255)
    alpha[:10] = 0
    Image.fromarray(in_colour(alpha)).save(tmp_path / "p.png")
    found = photos.picture(tmp_path / "p.png")
    assert (found[:, :10] == 1).all() and (found[:, 10:] - TRUE[:, 10:]).abs().max() < 0.01


@pytest.mark.parametrize("size", [5, 30])
def test_a_size_is_that_of_the_centre_square(tmp_path, size):
    Image.fromarray(GREY).save(tmp_path / "p.png")
    found = photos.picture(tmp_path / "p.png", channels=1, size=size)
    assert found.shape == (1, size, size)
    assert found.mean() == pytest.approx(float(TRUE[:, 4:16].mean()), abs=0.01)


def test_what_is_no_such_picture_is_said_in_a_sentence(tmp_path):
    Image.fromarray(GREY.astype(np.int32)).save(tmp_path / "p.tif")
    (tmp_path / "noise.png").write_bytes(b"noise")
    np.save(tmp_path / "a.npy", GREY)
    for name, words in (
        *(("p.tif", "8 or 16 bits"), ("noise.png", "cannot be read")),
        *(("a.npy", "takes a picture"), ("absent.png", "does not exist")),
    ):
        with pytest.raises(ValueError, match=words) as error:
            photos.picture(tmp_path / name)
        assert name in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(ValueError, match="channels is 2"):
        photos.picture(tmp_path / "p.tif", channels=2)
