"""Parameters of a run: how they are given, what is refused, that they stand once in a notebook."""

import ast
import json
from pathlib import Path

import pytest

from dlm_core.project import parameters, reproduce

NOTEBOOKS = Path(__file__).parents[2] / "notebooks"
CELL = """profile = "quick"
images = 2  # é: how many
scales = [
    1e-5,  # small
    1e-4,
]  # of noise
share = 0.5
most = None
told = True"""


@pytest.mark.parametrize(
    "texts, expected",
    [
        (["seeds=100"], {"seeds": 100}),
        (["seeds=100 images=50"], {"seeds": 100, "images": 50}),
        (["a=1", "b=2"], {"a": 1, "b": 2}),
        (['settings=["digits lenet", "b"] n=1e-3'], {"settings": ["digits lenet", "b"], "n": 1e-3}),
        (["source=full name=two words"], {"source": "full", "name": "two words"}),
        ([" a = 1   b=[1, 2] "], {"a": 1, "b": [1, 2]}),
        ([], {}),
    ],
)
def test_one_or_several_in_one_text(texts, expected):
    assert parameters.given(texts) == expected


@pytest.mark.parametrize(
    "texts, message",
    [
        (["seeds"], "--parameter is 'seeds'; it takes NAME=VALUE"),
        (["seeds="], "it takes NAME=VALUE"),
        (["2=3"], "it takes NAME=VALUE"),
        ([""], "it takes NAME=VALUE"),
        (["a=1 a=2"], "--parameter a is given twice"),
        (["a=1", "a=2"], "--parameter a is given twice"),
    ],
)
def test_what_is_no_parameter_is_refused(texts, message):
    with pytest.raises(ValueError, match=message):
        parameters.given(texts)


@pytest.mark.parametrize(
    "name, value, message",
    [
        ("image", 3, "parameter of 01 'image' is unknown: .*did you mean images"),
        ("profile", "smoke", "parameter of 01 'profile' is unknown"),
        ("images", 2.5, "parameter images of 01 is 2.5; it takes a whole number, as 2"),
        ("images", True, "it takes a whole number"),
        ("images", "many", "it takes a whole number"),
        ("scales", 1e-5, "it takes a list"),
        ("scales", ["a"], "it takes a list"),
        ("share", "half", "it takes a number"),
        ("told", 1, "it takes True or False"),
    ],
)
def test_an_unknown_name_and_a_wrong_type_are_refused(name, value, message):
    with pytest.raises(ValueError, match=message):
        parameters.check_values("01", {name: value}, parameters.read(CELL))


def test_what_fits_is_taken():
    values = {"images": 5, "scales": [1, 1e-3], "share": 1, "most": "any", "told": False}
    parameters.check_values("01", values, parameters.read(CELL))
    parameters.check_values("01", {"scales": []}, parameters.read(CELL))


def test_values_replace_those_of_the_cell_and_the_comments_stay():
    written = parameters.write(CELL, {"images": 20, "scales": [1e-6], "told": True, "most": "one"})
    assert parameters.read(written) == {
        "profile": "quick",
        "images": 20,
        "scales": [1e-6],
        "share": 0.5,
        "most": "one",
        "told": True,
    }
    assert "images = 20  # é: how many" in written and "# of noise" in written
    assert 'most = "one"' in written and written.startswith('profile = "quick"\n')


def test_equal_values_change_nothing():
    assert parameters.write(CELL, parameters.read(CELL)) == CELL
    assert "share = 1\n" in parameters.write(CELL, {"share": 1}) + "\n"


def test_long_values_are_wrapped():
    written = parameters.write(CELL, {"scales": [1e-6 * i for i in range(40)]})
    assert max(map(len, written.splitlines())) <= parameters.WIDTH


def test_a_name_that_the_cell_does_not_have_is_an_error():
    with pytest.raises(ValueError, match="parameter 'seed' is unknown"):
        parameters.write(CELL, {"seed": 1})


def test_a_notebook_has_one_such_cell():
    cell = {"metadata": {"tags": ["parameters"]}, "source": CELL}
    assert parameters.cell_of({"cells": [{"metadata": {}}, cell]}) is cell
    with pytest.raises(ValueError, match="2 cells tagged 'parameters'"):
        parameters.cell_of({"cells": [cell, cell]})


@pytest.mark.parametrize("name", reproduce.catalogue())
def test_every_profile_fits_its_notebook(name):
    cells = json.loads((NOTEBOOKS / f"{name}.ipynb").read_text())["cells"]
    (cell,) = [cell for cell in cells if "parameters" in cell["metadata"].get("tags", [])]
    source = "".join(cell["source"])
    for profile in ("smoke", "quick", "paper"):
        values = reproduce.values_of(name, profile)
        named = {key: value for key, value in values.items() if key != "profile"}
        parameters.check_values(name, named, parameters.read(source))
        written = parameters.write(source, values)
        assert parameters.read(written) == {**parameters.read(source), **values}
        assert all(isinstance(node, ast.Assign) for node in ast.parse(written).body)


def test_the_setting_that_a_cell_shows_stands_under_the_title():
    shown = {"data": {"text/markdown": ["Setting: LeNet; n = 3."]}}
    title = {"cell_type": "markdown", "source": ["# A title\n", "\n", "Text."]}
    notebook = {"cells": [title, {"cell_type": "code", "source": "", "outputs": [shown]}]}
    for sentence in ("Setting: LeNet; n = 3.", "Setting: MLP; n = 5."):
        shown["data"]["text/markdown"] = [sentence]
        reproduce.place_setting(notebook)
        source = "".join(notebook["cells"][0]["source"])
        assert source == f"# A title\n\n*{sentence}*\n\nText.", "replaced, not repeated"
