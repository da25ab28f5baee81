"""The site's film is a real attack's, small, and has a still."""

from PIL import Image, ImageChops

from dlm_core.harness import film
from dlm_core.project import animation


def test_a_film_begins_grey_and_ends_at_the_private_images(tmp_path):
    path = animation.write(tmp_path / "film.gif", dataset="digits", num_images=2)
    with Image.open(path) as moving, Image.open(tmp_path / "film.png") as still:
        assert 4 <= moving.n_frames <= len(film.SHOWN) + 1  # equal ones are one
        far = [_apart(moving, frame) for frame in (0, moving.n_frames - 1)]
        assert far[0] > 60 and far[1] < 5
        assert not ImageChops.difference(moving.convert("RGB"), still.convert("RGB")).getbbox()


def _apart(moving, frame):
    """Mean difference of the lower row from the upper one, in grey levels."""
    moving.seek(frame)
    picture = moving.convert("L")
    width, height = picture.size
    half = (height - film.GAP) // 2
    above = picture.crop((0, 0, width, half))
    below = picture.crop((0, height - half, width, height))
    levels = ImageChops.difference(above, below).histogram()
    return sum(i * n for i, n in enumerate(levels)) / sum(levels)


def test_the_committed_film_is_small_and_has_its_still():
    assert animation.PLACE.stat().st_size < 500_000
    assert animation.PLACE.with_suffix(".png").is_file()
