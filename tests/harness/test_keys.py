"""A result's name covers the code and the data behind it, all of it and nothing else."""

import ast
import shutil
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import dlm_core
from dlm_core import models, records
from dlm_core.harness import keys, registry, sources
from dlm_core.harness.trials import Trial
from dlm_core.harness.utility import Federation

PACKAGE = Path(dlm_core.__file__).parent


def forget():
    """As in a process that has read no file yet."""
    for module in (sources, keys):
        for each in vars(module).values():
            if hasattr(each, "cache_clear"):
                each.cache_clear()


@pytest.fixture
def copy(tmp_path, monkeypatch):
    """A copy of the package, to be changed, whose files are those that are read."""
    shutil.copytree(
        PACKAGE, tmp_path, ignore=shutil.ignore_patterns("__pycache__"), dirs_exist_ok=True
    )
    monkeypatch.setattr(sources, "PACKAGE", tmp_path)
    forget()
    yield tmp_path
    forget()


def keys_now(attack="dlm_plus"):
    """Of a trial, of a federated training, and of one that is defended."""
    forget()
    defended = Federation(defence={"name": "noise", "scale": 1e-3})
    return [each.key for each in (Trial(attack, dataset="digits"), Federation(), defended)]


def key_now(attack="dlm_plus"):
    return keys_now(attack)[0]


def test_only_what_takes_part_changes_a_key(copy, monkeypatch):
    (plain, *trainings), exactly = keys_now(), key_now("exact")
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr(sources, "PACKAGE", PACKAGE)
        assert plain == key_now(), "the same code elsewhere, the same key"
    registry = copy / "harness" / "registry.py"
    (copy / "beyond" / "new.py").write_text("from dlm_core import attacks\n")
    text = registry.read_text()
    registry.write_text(text.replace("    exact,\n", "    exact,\n    new,\n", 1))
    assert keys_now() == [plain, *trainings], "adding an attack costs no finished result"
    exact = copy / "beyond" / "exact.py"
    exact.write_text(exact.read_text() + "\n# a comment\n")
    assert key_now("exact") == exactly
    exact.write_text(exact.read_text() + "\nCHANGED = 1\n")
    assert key_now("exact") != exactly and key_now() == plain
    metrics = copy / "metrics.py"
    metrics.write_text(metrics.read_text() + "\nCHANGED = 1\n")
    assert key_now() != plain, "the judge is part of every key"
    metrics.write_text(metrics.read_text().removesuffix("\nCHANGED = 1\n"))
    for module in ("defenses", "harness/scene", "search"):
        file = copy / f"{module}.py"
        text = file.read_text()
        file.write_text(text + "\nCHANGED = 1\n")
        assert key_now() != plain, module
        file.write_text(text)
    assert keys_now() == [plain, *trainings]


def test_a_module_that_becomes_a_folder_stays_part_of_the_key(copy):
    before = key_now("exact")
    folder = copy / "beyond" / "exact"
    folder.mkdir()
    (copy / "beyond" / "exact.py").rename(folder / "__init__.py")
    moved = key_now("exact")
    (folder / "more.py").write_text("VALUE = 1\n")
    init = folder / "__init__.py"
    init.write_text(init.read_text() + "\nfrom dlm_core.beyond.exact import more\n")
    with_more = key_now("exact")
    (folder / "more.py").write_text("VALUE = 2\n")
    assert moved == before and with_more != moved and key_now("exact") != with_more


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
    assert sources.imported(ast.parse(code), "dlm_core.beyond.recursion") == found


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
        sources.imported(ast.parse(code), "dlm_core.beyond.recursion")


@pytest.fixture
def changed(monkeypatch):
    """Puts a record with other fields into the place of one of ours."""

    def change(record, **fields):
        other = replace(record, **fields)
        monkeypatch.setitem(records.TABLES[type(record)], record.key, other)

    return change


@pytest.mark.parametrize(
    "record, fields",
    [
        (records.DEFENCES["noise"], {"variance": lambda seen, setting: [0.0] * len(seen.delta)}),
        (records.DEFENCES["noise"], {"leaves_out": True}),
        (records.DEFENCES["noise"], {"function": lambda weights, *, scale, seed=0: weights}),
        (records.ATTACKS["dlm_plus"], {"seeded": False}),
        (records.NETWORKS["lenet"], {"function": lambda *shape, **how: models.mlp(*shape)}),
        (records.CLIENT_OPTIMIZERS["sgd"], {"step": None}),
    ],
)
def test_all_that_a_result_depends_on_in_a_record_is_part_of_the_key(changed, record, fields):
    trial = Trial(dataset="digits", defence={"name": "noise", "scale": 1e-3})
    before = trial.key
    changed(record, **fields)
    assert trial.key != before


def test_how_it_looks_is_none_of_the_key(changed):
    trial = Trial(dataset="digits", defence={"name": "noise", "scale": 1e-3})
    changed(records.DEFENCES["noise"], leaves_out=True)
    before = trial.key
    changed(records.DEFENCES["noise"], title="Noise", colour=3, marker="v")
    assert trial.key == before


def test_what_stands_in_our_records_is_covered_by_the_function_s_module():
    """But for a client optimizer's step, which attacks import that read it."""
    for table in records.TABLES.values():
        for record in filter(registry.is_ours, table.values()):
            home = record.function.__module__
            if not isinstance(record, records.ClientOptimizer):
                held = [v for v in vars(record).values() if callable(v)]
                assert {each.__module__ for each in held} == {home}, record.key


def test_a_user_s_optimizer_counts_with_the_version_of_its_package(monkeypatch):
    record = records.ClientOptimizer(key="nadam", function=torch.optim.NAdam, title="NAdam")
    before = keys.fingerprint(record)
    sources.version.cache_clear()
    monkeypatch.setattr(torch, "__version__", "0.0")
    try:
        assert keys.fingerprint(record) != before
    finally:
        sources.version.cache_clear()


def test_equal_values_have_one_key_and_one_hash():
    whole, floating = (Trial(dataset="digits", client={"learning_rate": rate}) for rate in (1, 1.0))
    assert whole == floating and hash(whole) == hash(floating) and whole.key == floating.key
    other = replace(whole, attack_options={"max_evaluations": 3})
    assert other != whole and other.key != whole.key


def test_numbers_of_any_type_have_one_key():
    rates = (1, 1.0, np.float32(1), np.int64(1))
    made = [Trial(dataset="digits", client={"learning_rate": rate}) for rate in rates]
    made += [Trial("dlg", {"learning_rate": rate}, dataset="digits") for rate in rates]
    assert len(set(made)) == len({trial.key for trial in made}) == 2
    assert Trial(dataset="digits", index=np.int64(3)).key == Trial(dataset="digits", index=3).key


def test_the_key_names_the_data_that_serve(tmp_path, monkeypatch):
    monkeypatch.setenv("DLM_DATA", str(tmp_path))
    before = Trial(source="auto")
    assert before == Trial(source="bundled")
    (tmp_path / "cifar-100-python").mkdir()
    after = Trial(source="auto")
    assert after == Trial(source="full") and after.key != before.key
    assert before.source == "bundled", "a plan that was made before says what it was made of"
    with pytest.raises(ValueError, match="source is 'full', and digits is bundled whole"):
        Trial(dataset="digits", source="full")


def test_one_key_of_ours_costs_less_than_a_millisecond():
    plan = [Trial(dataset="digits", index=i) for i in range(200)]
    assert plan[0].key
    began = time.process_time()
    with keys.at_once():
        assert len({trial.key for trial in plan}) == len(plan)
    assert time.process_time() - began < 0.2
