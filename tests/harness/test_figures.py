"""Grids of images show what they are given, or say why not; a look is of an attack or a defence."""

import matplotlib
import matplotlib.pyplot as plt
import numpy
import pandas
import pytest
import torch
from matplotlib.colors import to_rgb

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


@pytest.mark.parametrize("factor", [1.5, 3.0, 10.0])
def test_an_image_that_a_search_found_too_bright_is_shown(factor):
    shown = pixels(figures.show_images([[PHOTO * factor]], ["found"]))
    assert shown.max() == 1


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


def contrast_with_white(colour):
    """Ratio of luminances as the web's guidelines define it."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(colour)]
    return 1.05 / (numpy.dot([0.2126, 0.7152, 0.0722], linear) + 0.05)


@pytest.mark.parametrize("kind", ["attack", "defence"])
def test_every_attack_and_defence_can_be_read_on_white(kind):
    table = records.ATTACKS if kind == "attack" else records.DEFENCES
    for key in table:
        assert contrast_with_white(figures.look(key, kind)["color"]) >= 2.9, key


def test_a_learning_rate_has_one_colour_and_larger_ones_are_darker():
    rates = [1e-4, 1e-3, 1e-2, 1e-1, 1.0]
    contrasts = [contrast_with_white(figures.shade(rate)) for rate in rates]
    assert contrasts == sorted(contrasts) and len(set(contrasts)) == len(rates)
    assert figures.shade(0.011) == figures.shade(0.01) and figures.shade(5) == figures.shade(1)


def test_thresholds_are_named_and_alike_in_all_axes():
    _, axes = plt.subplots(1, 2)
    for axis, along in zip(axes, "yx"):
        figures.thresholds(axis, 13.0, eight_bits=True, along=along)
        figures.heading(axis, "a", "a title")
        words = [" ".join(each.get_text().split()) for each in axis.texts]
        assert words == ["grey square", "success: 20 dB", "8-bit rounding"]
    drawn = [
        [(line.get_color(), line.get_linestyle(), line.get_linewidth()) for line in axis.lines]
        for axis in axes
    ]
    assert drawn[0] == drawn[1] and len(set(drawn[0])) == 3
    assert [line.get_ydata()[0] for line in axes[0].lines] == [13.0, 20.0, figures.EIGHT_BITS]
    assert [line.get_xdata()[0] for line in axes[1].lines] == [13.0, 20.0, figures.EIGHT_BITS]


def test_eight_bits_is_the_error_of_rounding_to_grey_levels():
    pixels = torch.linspace(0, 1, 1_000_003, dtype=torch.float64)
    error = (pixels - (pixels * 255).round() / 255).square().mean()
    assert abs(-10 * float(error.log10()) - figures.EIGHT_BITS) < 0.1


@pytest.mark.parametrize("n", [4, 5])
def test_medians_of_fewer_than_five_are_points(n):
    rows = pandas.DataFrame(
        {"n": [n, 9], "psnr_25": [1.0, 2], "psnr_50": [2.0, 3], "psnr_75": [3.0, 4]}
    )
    _, axis = plt.subplots()
    figures.medians(axis, [1, 2], rows, color="0.1", marker="o")
    (line,) = axis.lines
    assert (line.get_linestyle() == "None") == (n < 5) and len(axis.collections) == (n >= 5)
    assert figures.counted(rows) == f"n = {n} to 9 images"


def test_a_strip_shows_each_trial_and_counts_those_without_a_picture():
    _, axis = plt.subplots()
    psnrs = pandas.Series([10.0, 20.0, 30.0, float("-inf"), float("nan")])
    figures.strip(axis, 0, psnrs, label="an attack")
    dots, median = axis.lines
    assert list(dots.get_xdata()) == [10, 20, 30] and list(median.get_xdata()) == [10]
    figures.strip(axis, 1, [10.0, 20.0], label="few")
    assert len(axis.lines) == 3 and list(axis.lines[-1].get_xdata()) == [10, 20]


def test_a_legend_names_each_label_once():
    figure, axes = plt.subplots(1, 2)
    for axis in axes:
        axis.plot([0, 1], label="one")
    axes[1].plot([0, 1], label="two")
    figures.legend(figure)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["one", "two"]


def test_a_caption_is_shown_as_it_is_written(monkeypatch):
    shown = []
    monkeypatch.setattr("IPython.display.display", lambda data, **_: shown.append(data))
    figures.caption("PSNR < 20 dB & k_0 *")
    assert shown[0]["text/plain"] == "PSNR < 20 dB & k_0 *"
    assert ">PSNR &lt; 20 dB &amp; k_0 *</p>" in shown[0]["text/html"]


def test_networks_and_data_sets_have_names():
    assert figures.name("lenet", "network") == "LeNet"
    assert figures.name("cifar100", "data set") == "CIFAR-100"
    with pytest.raises(ValueError, match="'papre'"):
        figures.weights("papre")
