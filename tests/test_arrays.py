"""Images and labels as users hold them."""

import numpy as np
import pytest
import torch

from dlm_core import check
from dlm_core.arrays import Images, Labels, for_model


@check.arguments
def take(images: Images, labels: Labels | None = None):
    return images, labels


FLOATS = torch.rand(2, 1, 3, 4, generator=torch.Generator().manual_seed(0))
BYTES = (FLOATS * 255).round().to(torch.uint8)


@pytest.mark.parametrize(
    "given, expected",
    [
        (FLOATS, FLOATS),
        (FLOATS.double(), FLOATS.double()),
        (FLOATS.half(), FLOATS.half()),
        (FLOATS.numpy(), FLOATS),
        (FLOATS.numpy()[::-1], FLOATS.flip(0)),
        (BYTES, BYTES / 255),
        (BYTES.numpy(), BYTES / 255),
        (FLOATS / FLOATS.max() * (1 + 5e-7), FLOATS / FLOATS.max() * (1 + 5e-7)),
    ],
)
def test_unambiguous_images_are_converted(given, expected):
    images, _ = take(given)
    assert images.dtype == expected.dtype and torch.equal(images, expected)


@pytest.mark.parametrize(
    "given, said",
    [
        (FLOATS * 255, r"pixels in \[0, 1\], and not from .* to 2\d\d"),
        (FLOATS - 1, "and not from -"),
        (FLOATS.clone().fill_(torch.nan), "and not NaN"),
        (FLOATS[0], r"\[N, C, H, W\]"),
        (FLOATS[:0], "N at least 1"),
        (BYTES.int(), "floating point"),
        (BYTES > 3, "floating point"),
        (BYTES.clamp(max=1), "0 and 1 alone"),
        (np.array([["a"]]), "array of numbers"),
        ([[1], [2, 3]], "array of numbers"),
        ("picture.png", "picture.png"),
        (None, "None"),
    ],
)
def test_ambiguous_images_are_refused_in_one_sentence(given, said):
    with pytest.raises(ValueError, match=f"^images is .*{said}") as error:
        take(given)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "given", [torch.tensor([3, 1]), torch.tensor([3, 1], dtype=torch.int32), np.array([3, 1], "u1")]
)
def test_labels_become_int64(given):
    _, labels = take(FLOATS, given)
    assert labels.dtype == torch.int64 and labels.tolist() == [3, 1]


@pytest.mark.parametrize(
    "given", [torch.tensor([0.5]), torch.tensor([True]), torch.tensor([-1]), [], [[1]], "cat"]
)
def test_what_is_no_class_is_refused(given):
    with pytest.raises(ValueError, match="^labels is .*class indices|^labels is .*numbers"):
        take(FLOATS, given)


def test_images_follow_the_model():
    model = torch.nn.Linear(2, 2).double()
    assert for_model(FLOATS, model).dtype == torch.float64
