"""Grids of images show what they are given, or say why not; a look is of an attack or a defence."""

import matplotlib
import matplotlib.pyplot as plt
import numpy
import pytest
import torch

from dlm_core import data, records
from dlm_core.harness import figures

matplotlib.use("Agg")
DIGIT = data.load("digits", n=1).images[0]
PHOTO = data.load("cifar100", n=1, source="bundled").images[0]


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close("all")


def pixels(figure, place=0):
    return numpy.asarray(figure.axes[place].images[0].get_array())


@pytest.mark.parametrize("image", [DIGIT, PHOTO], ids=["grey", "colour"])
@pytest.mark.parametrize(
    "given", [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.uint8]
)
def test_an_image_is_shown_as_it_is_whatever_its_type(image, given):
    held = (image * 255).round().to(given) if given == torch.uint8 else image.to(given)
    shown = pixels(figures.show_images([[held]], ["private"]))
    expected = image.permute(1, 2, 0).expand(-1, -1, 3).numpy()
    assert abs(shown - expected).max() < 0.01


@pytest.mark.parametrize("image", [DIGIT, PHOTO], ids=["grey", "colour"])
@pytest.mark.parametrize("given", [torch.float32, torch.int64])
def test_pixels_of_0_to_255_are_refused_rather_than_shown_in_black_and_white(image, given):
    with pytest.raises(
        ValueError, match=r"rows holds an image of mean .* takes pixels in \[0, 1\]"
    ):
        figures.show_images([[(image * 255).to(given)]], ["private"])


def test_what_a_search_overshoots_is_clamped():
    wild = torch.randn(3, 8, 8, generator=torch.Generator().manual_seed(0)) * 40
    shown = pixels(figures.show_images([[wild]], ["found"]))
    assert shown.min() == 0 and shown.max() == 1


def test_rows_may_be_tensors_and_have_gaps():
    figure = figures.show_images([torch.stack([DIGIT, DIGIT]), [None, DIGIT]], ["a", "b"], ["one"])
    assert [len(axis.images) for axis in figure.axes] == [1, 1, 0, 1]


@pytest.mark.parametrize(
    "rows, names, message",
    [
        ([], [], "rows holds no image"),
        ([[]], ["a"], "rows holds no image"),
        ([[DIGIT]], ["a", "b"], "row_names has 2 names; rows has 1 rows"),
        ([[DIGIT[0]]], ["a"], "takes images .C, H, W. with C 1 or 3"),
        ([[torch.zeros(2, 8, 8)]], ["a"], "takes images .C, H, W. with C 1 or 3"),
        ([["a"]], ["a"], "rows is .*it takes a Sequence"),
        ([[DIGIT]], "a", "row_names is 'a'; it takes a Sequence of a text"),
    ],
)
def test_what_is_no_grid_is_refused(rows, names, message):
    with pytest.raises(ValueError, match=message):
        figures.show_images(rows, names)


def test_an_attack_and_a_defence_of_one_key_have_looks_of_their_own():
    attack, defence = records.ATTACKS["noise"], records.DEFENCES["noise"]
    assert figures.look("noise")["label"] == figures.name("noise", "attack") == attack.title
    assert figures.look("noise", kind="defence")["label"] == defence.title
    assert figures.look("noise", kind="defence")["marker"] == defence.marker
    assert figures.look("sparsify") == figures.look("sparsify", kind="defence")
    for key, kind in (("sparsify", "attack"), ("dlm_plus", "defence"), ("noize", None)):
        with pytest.raises(ValueError, match=f"key '{key}' is unknown"):
            figures.look(key, kind)
    with pytest.raises(ValueError, match="kind is 'network'; it takes"):
        figures.look("noise", "network")
