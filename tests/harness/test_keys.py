"""A result's name covers the code and the data behind it, all of it and nothing else."""

import ast
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

import dlm_core
from dlm_core.harness import keys
from dlm_core.harness.trials import Trial

PACKAGE = Path(dlm_core.__file__).parent
KEY = "from dlm_core.harness.trials import Trial; print(Trial({attack!r}, dataset='digits').key)"


@pytest.fixture
def copy(tmp_path):
    """A copy of the package, to be changed, beside the bundled data."""
    ignore = shutil.ignore_patterns("__pycache__")
    shutil.copytree(PACKAGE, tmp_path / "dlm_core", ignore=ignore)
    (tmp_path / "data").symlink_to(PACKAGE.parent / "data")
    return tmp_path


def key_in(folder, attack="dlm_plus"):
    run = [sys.executable, "-c", KEY.format(attack=attack)]
    done = subprocess.run(run, cwd=folder, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_only_what_takes_part_changes_a_key(copy):
    plain, exactly = key_in(copy), key_in(copy, "exact")
    assert plain == Trial("dlm_plus", dataset="digits").key, "the same code elsewhere, the same key"
    registry = copy / "dlm_core" / "harness" / "registry.py"
    (copy / "dlm_core" / "beyond" / "new.py").write_text("from dlm_core import attacks\n")
    text = registry.read_text()
    registry.write_text(text.replace("    exact,\n", "    exact,\n    new,\n", 1))
    assert key_in(copy) == plain, "adding an attack costs no finished trial"
    exact = copy / "dlm_core" / "beyond" / "exact.py"
    exact.write_text(exact.read_text() + "\n# a comment\n")
    assert key_in(copy, "exact") == exactly
    exact.write_text(exact.read_text() + "\nCHANGED = 1\n")
    assert key_in(copy, "exact") != exactly and key_in(copy) == plain
    metrics = copy / "dlm_core" / "metrics.py"
    metrics.write_text(metrics.read_text() + "\nCHANGED = 1\n")
    assert key_in(copy) != plain, "the judge is part of every key"


def test_a_module_that_becomes_a_folder_stays_part_of_the_key(copy):
    before = key_in(copy, "exact")
    folder = copy / "dlm_core" / "beyond" / "exact"
    folder.mkdir()
    (copy / "dlm_core" / "beyond" / "exact.py").rename(folder / "__init__.py")
    moved = key_in(copy, "exact")
    (folder / "more.py").write_text("VALUE = 1\n")
    init = folder / "__init__.py"
    init.write_text(init.read_text() + "\nfrom dlm_core.beyond.exact import more\n")
    with_more = key_in(copy, "exact")
    (folder / "more.py").write_text("VALUE = 2\n")
    assert moved == before and with_more != moved and key_in(copy, "exact") != with_more


@pytest.mark.parametrize(
    "code, found",
    [
        ("from dlm_core import exact", {"dlm_core.beyond.exact"}),
        (
            "from dlm_core.beyond import exact, batches",
            {"dlm_core.beyond.exact", "dlm_core.beyond.batches"},
        ),
        ("from dlm_core.search import reconstruct", {"dlm_core.search"}),
        ("import dlm_core.beyond.exact", {"dlm_core.beyond.exact"}),
        (
            "from . import rounding\nfrom .. import check",
            {"dlm_core.beyond.rounding", "dlm_core.check"},
        ),
        ("import torch\nfrom dlm_core import __version__", set()),
    ],
)
def test_imports_are_followed_to_their_files(code, found):
    assert keys.imported(ast.parse(code), "dlm_core.beyond.recursion") == found


@pytest.mark.parametrize(
    "code",
    [
        "from dlm_core import exacct",
        "from dlm_core.beyond.exacct import recover",
        "import dlm_core.exact",
    ],
)
def test_an_import_that_resolves_to_no_file_is_loud(code):
    with pytest.raises(ImportError, match="resolves to no file"):
        keys.imported(ast.parse(code), "dlm_core.beyond.recursion")


def test_a_user_s_code_is_part_of_the_key():
    from tests.harness import toys

    def fingerprint(function):
        return keys.fingerprint(function)

    first = fingerprint(toys.toy_attack)
    toys.BRIGHTNESS = 0.75
    try:
        assert fingerprint(toys.toy_attack) != first, "a value that the attack reads"
    finally:
        toys.BRIGHTNESS = 0.25
    assert fingerprint(toys.toy_attack) == first
    wide, narrow = ({}, {})
    for channels, into in ((32, wide), (16, narrow)):
        exec(f"def build(shape, classes):\n    return {channels}\n", into)
        into["build"].__module__ = "__main__"
    assert fingerprint(wide["build"]) != fingerprint(narrow["build"])


def test_equal_values_have_one_key_and_one_hash():
    whole, floating = (Trial(dataset="digits", client={"learning_rate": rate}) for rate in (1, 1.0))
    assert whole == floating and hash(whole) == hash(floating) and whole.key == floating.key
    other = replace(whole, attack_options={"max_evaluations": 3})
    assert other != whole and other.key != whole.key
