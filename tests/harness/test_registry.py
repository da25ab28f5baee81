"""Bring your own, everywhere: an attack, a defence, a network and a data set of a user's, added in
one module (toys.py).
"""

import warnings
from dataclasses import replace

import pytest
import torch

from dlm_core import records
from dlm_core.harness import figures, registry, sweeps
from dlm_core.harness.trials import Trial
from tests.harness import toys

TABLES = ("ATTACKS", "DEFENCES", "NETWORKS", "DATA_SETS")


@pytest.fixture(autouse=True)
def tables():
    """What a test registers is gone after it; the toys are there in it."""
    before = {name: dict(getattr(records, name)) for name in TABLES}
    for record in TOYS:
        records.TABLES[type(record)][record.key] = record
    yield
    for name, table in before.items():
        getattr(records, name).clear()
        getattr(records, name).update(table)


TOYS = [
    records.ATTACKS.pop("toy_attack"),
    records.DEFENCES.pop("toy_defence"),
    records.NETWORKS.pop("toy_network"),
]


def plan():
    base = Trial("toy_attack", dataset="digits", client={"learning_rate": 0.05})
    defended = replace(base, attack="dlm_plus", attack_options={"max_evaluations": 5})
    defended = replace(
        defended, defence={"name": "toy_defence", "factor": 0.5, "observer": "server"}
    )
    own = replace(base, model="toy_network", model_options={"hidden": 8})
    return [base, replace(base, index=1), defended, own]


def expected():
    return [trial.run() for trial in plan()]


def same(ours, theirs):
    for a, b in zip(ours, theirs, strict=True):
        assert a["psnr"] == b["psnr"]
        assert torch.equal(a["arrays"]["images"], b["arrays"]["images"])


def test_a_toy_attack_defence_and_network_run_on_two_processes_and_are_shown(tmp_path):
    found = sweeps.sweep(plan(), jobs=2, store=tmp_path)
    same(found, expected())
    table = sweeps.table(plan(), found)
    assert table.attack.tolist() == ["toy_attack", "toy_attack", "dlm_plus", "toy_attack"]
    assert table["defence.factor"].tolist()[2] == 0.5
    assert (
        figures.look("toy_attack")["label"] == "Toy" and figures.look("toy_attack")["marker"] == "h"
    )
    assert figures.name("toy_defence") == "Toy defence"


def test_they_are_in_the_audit_s_list():
    from dlm_core.harness.audit import tried

    assert list(tried())[-1] == "toy_attack"


def test_they_run_on_fresh_dask_workers_as_they_come(tmp_path):
    """Two threads each, the package imported by none of them before."""
    distributed = pytest.importorskip("distributed")
    cluster = distributed.LocalCluster(n_workers=1, threads_per_worker=2, dashboard_address=None)
    with warnings.catch_warnings(), cluster:
        warnings.simplefilter("ignore")
        same(sweeps.sweep(plan(), store=tmp_path, scheduler=cluster.scheduler_address), expected())


def test_changed_code_is_another_trial(tmp_path, monkeypatch):
    (first,) = sweeps.sweep(plan()[:1], jobs=1, store=tmp_path)
    monkeypatch.setattr(toys, "BRIGHTNESS", 0.75)
    (second,) = sweeps.sweep(plan()[:1], jobs=1, store=tmp_path)
    assert first["psnr"] != second["psnr"], "the old result would have been served for the new code"


def test_a_store_of_none_keeps_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("DLM_STORE", str(tmp_path / "store"))
    sweeps.sweep(plan()[:1], jobs=1, store=None)
    assert not (tmp_path / "store").exists()
    sweeps.sweep(plan()[:1], jobs=1)
    assert (tmp_path / "store").exists()


def test_what_is_ours_is_not_shipped():
    foreign = [record.key for record in TOYS]
    import pickle

    shipped = pickle.loads(registry.shipped())
    assert sorted(record.key for record in shipped) == sorted(foreign)


def test_a_key_that_is_taken_is_refused():
    with pytest.raises(ValueError, match="key 'dlm_plus' is taken by dlm_core.attacks.dlm_plus"):

        @records.attack("dlm_plus", title="Mine")
        def mine(seen):
            return None


def test_every_record_says_who_it_is_for_and_what_it_is_told():
    for key, record in records.ATTACKS.items():
        assert record.client, key
        assert set(name.replace("_", " ") for name in record.demands) <= set(record.told), key
    assert any("total-variation" in each for each in records.ATTACKS["inverting_gradients"].told)
    assert records.ATTACKS["unrolled_dlm"].told and records.ATTACKS["interval_dlm"].told


@pytest.mark.parametrize(
    "change, message",
    [
        ({"attack_options": {"brightness": 1}}, "option of toy_attack 'brightness' is unknown"),
        ({"defence": {"name": "toy_defence"}}, "defence 'toy_defence' must be told factor"),
        (
            {"defence": {"name": "toy_defense", "factor": 1}},
            "defence 'toy_defense' is unknown.*toy_defence",
        ),
        (
            {"model": "toy_network", "model_options": {"hiden": 8}},
            "'hiden' is unknown.*did you mean hidden",
        ),
    ],
)
def test_a_typo_is_refused_at_once(change, message):
    with pytest.raises(ValueError, match=message):
        replace(plan()[0], **change)
