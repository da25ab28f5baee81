"""Bring your own, everywhere: an attack, a defence, a network and a data set of a user's, added in
one module (toys.py).
"""

import ast
import pickle
import re
import sys
import threading
import warnings
from dataclasses import replace
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest
import torch

import dlm_core
from dlm_core import data, federated, models, records
from dlm_core.harness import figures, registry, sources, sweeps
from dlm_core.harness.trials import Trial, observe
from tests.harness import toys
from tests.networks import Idle

TABLES = ("ATTACKS", "DEFENCES", "NETWORKS", "DATA_SETS", "CLIENT_OPTIMIZERS")
PACKAGE = Path(dlm_core.__file__).parent


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
    records.DATA_SETS.pop("toy_images"),
]


def plan():
    base = Trial("toy_attack", dataset="digits", client={"learning_rate": 0.05})
    defended = replace(base, attack="dlm_plus", attack_options={"max_evaluations": 5})
    defended = replace(
        defended, defence={"name": "toy_defence", "factor": 0.5, "observer": "server"}
    )
    own = replace(base, model="toy_network", model_options={"hidden": 8})
    seen = replace(own, dataset="toy_images", index=1, source="auto")
    return [base, replace(base, index=1), defended, own, seen]


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
    assert table.attack.tolist() == ["toy_attack", "toy_attack", "dlm_plus", *2 * ["toy_attack"]]
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
    cluster = distributed.LocalCluster(
        n_workers=1, threads_per_worker=2, dashboard_address="127.0.0.1:0"
    )
    with warnings.catch_warnings(), cluster:
        warnings.simplefilter("ignore")
        same(sweeps.sweep(plan(), store=tmp_path, scheduler=cluster.scheduler_address), expected())


def toy(attack="grey", **fields):
    """A trial of the toy network on the toy images."""
    options = {"max_evaluations": 5} if attack == "dlm_plus" else {}
    about = {"dataset": "toy_images", "model": "toy_network", **fields}
    return Trial(attack, options, client={"learning_rate": 0.05}, **about)


@pytest.mark.parametrize("jobs", [1, 2])
@pytest.mark.parametrize(
    "name, number, fields",
    [
        ("BRIGHTNESS", "psnr", {"attack": "toy_attack"}),
        ("CONTRAST", "psnr", {}),
        ("GAIN", "loss", {"attack": "dlm_plus"}),
        ("GAIN", "loss", {"attack": "dlm_plus", "dataset": "digits", "trained": 1}),
    ],
)
def test_changed_code_is_another_trial(tmp_path, monkeypatch, jobs, name, number, fields):
    """The plan stands from before; the workers, too."""
    several = [toy(**fields), toy(**fields, seed=1)]
    before = sweeps.sweep(several, jobs=jobs, store=tmp_path)
    monkeypatch.setattr(toys, name, 0.75)
    after = sweeps.sweep(several, jobs=jobs, store=tmp_path)
    assert [each[number] for each in before] != [each[number] for each in after]
    same(after, [each.run() for each in several])
    monkeypatch.undo()
    same(sweeps.sweep(several, jobs=jobs, store=tmp_path), before)


def test_a_network_that_is_defined_again_is_another(tmp_path):
    def define(width):
        @records.network("toy_network", title="Toy network")
        def toy_network(image_shape, num_classes, *, hidden=16):
            return models.mlp(image_shape, num_classes, hidden=width)

    trial = toy("dlm_plus")
    records.NETWORKS.pop("toy_network")
    losses = []
    for width, jobs in ((4, 1), (8, 1), (4, 2), (8, 2)):
        define(width)
        losses += [sweeps.sweep([trial], jobs=jobs, store=tmp_path)[0]["loss"]]
    assert losses[:2] == losses[2:] and losses[0] != losses[1]


def test_dropout_draws_from_the_trial_s_seed(tmp_path):
    def dropping(image_shape, num_classes, *, hidden=16):
        plain = TOYS[2].function(image_shape, num_classes, hidden=hidden)
        return torch.nn.Sequential(*plain[:-1], torch.nn.Dropout(), plain[-1])

    records.NETWORKS["toy_network"] = replace(TOYS[2], function=dropping)
    several = [toy("dlm_plus", dataset="digits", trained=1), toy("dlm_plus", seed=1)]
    torch.manual_seed(0)
    first, state = sweeps.sweep(several, jobs=1, store=None), torch.get_rng_state()
    torch.manual_seed(1)
    same(sweeps.sweep(several, jobs=1, store=None), first)
    same(sweeps.sweep(several, jobs=2, store=None), first)
    seen, again = (observe(several[0])[0].weights_after for _ in range(2))
    assert all(torch.equal(w, again[name]) for name, w in seen.items())
    torch.manual_seed(0)
    assert torch.equal(state, torch.get_rng_state()), "the caller's generator is left as it was"


def test_a_data_set_that_is_never_the_same_is_refused(tmp_path):
    chance = lambda: (torch.rand(2, 1, 6, 6), torch.arange(2))  # noqa: E731
    records.DATA_SETS["toy_images"] = replace(TOYS[3], function=chance)
    with pytest.raises(ValueError, match="data set 'toy_images' returns other images .* a seed"):
        sweeps.sweep([toy()], jobs=1, store=tmp_path)


def test_code_that_cannot_be_followed_has_no_result_kept(tmp_path):
    def toy_network(image_shape, num_classes, *, hidden=16):
        return torch.load("weights.pt")

    records.NETWORKS["toy_network"] = replace(TOYS[2], function=toy_network)
    with pytest.raises(ValueError, match="^network 'toy_network' reaches .*torch.load.*store=None"):
        sweeps.sweep([toy()], jobs=1, store=tmp_path)


def test_what_cannot_be_sent_is_named(tmp_path):
    lock = threading.Lock()

    def locked(weights, *, factor, parameters=None):
        return lock and weights

    held = replace(TOYS[1], function=locked)
    records.DEFENCES["toy_defence"] = held
    with pytest.raises(ValueError, match="^defence 'toy_defence' cannot be sent .*jobs=1$"):
        sweeps.sweep(plan()[:2], jobs=2, store=None)
    assert len(sweeps.sweep(plan()[:1], jobs=1, store=tmp_path)) == 1


def test_a_user_s_record_of_an_installed_function_runs_in_workers(tmp_path):
    """CONTRIBUTING's recipe for a client optimizer."""
    records.client_optimizer("nadam", title="NAdam")(torch.optim.NAdam)
    client = {"learning_rate": 0.05, "client_optimizer": "nadam"}
    several = [replace(plan()[0], client=client, index=i) for i in range(2)]
    found = sweeps.sweep(several, jobs=2, store=tmp_path)
    same(found, [trial.run() for trial in several])


MODULE = """
import helper
from dlm_core import attacks, records

@records.attack("of_a_file", title="Of a file")
def of_a_file(seen, *, num_images=1, seed=0):
    found = attacks.grey(seen, num_images=num_images)
    found.images.fill_(helper.grey())
    return found
"""


@pytest.mark.parametrize("known", [True, False], ids=["imported", "in no table of modules"])
def test_a_module_of_a_user_s_and_what_it_imports_run_in_workers(tmp_path, monkeypatch, known):
    """Workers find neither on their paths, nor what was changed since."""
    (tmp_path / "helper.py").write_text("GREY = 0.25\ndef grey(): return GREY\n")
    (tmp_path / "own.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    specification = spec_from_file_location("own", tmp_path / "own.py")
    own = module_from_spec(specification)
    if known:
        monkeypatch.setitem(sys.modules, "own", own)
    specification.loader.exec_module(own)
    monkeypatch.setattr(sys, "path", [each for each in sys.path if each != str(tmp_path)])
    monkeypatch.setattr(sys.modules["helper"], "GREY", 0.75)
    several = [replace(plan()[0], attack="of_a_file", index=i) for i in range(2)]
    found = sweeps.sweep(several, jobs=2, store=tmp_path / "store")
    assert all(bool((record["arrays"]["images"] == 0.75).all()) for record in found)
    sys.modules["helper"].GREY = 0.5
    found = sweeps.sweep(several, jobs=2, store=tmp_path / "store")
    assert all(bool((record["arrays"]["images"] == 0.5).all()) for record in found)
    del sys.modules["helper"]


def test_every_module_that_registers_something_is_imported_by_the_registry():
    text = (PACKAGE / "harness" / "registry.py").read_text()
    kinds = "attack|client_optimizer|data_set|defence|network|protocol"
    imported = sources.imported(ast.parse(text), "dlm_core.harness.registry")
    for path in sorted({*PACKAGE.rglob("*.py")} - {PACKAGE / "records.py"}):
        if re.search(rf"^ *(@records\.({kinds})|(records\.)?add)\(", path.read_text(), re.M):
            name = ".".join(("dlm_core", *path.relative_to(PACKAGE).with_suffix("").parts))
            assert name in imported, f"{name} registers something: import it in registry.py"


def test_a_store_of_none_keeps_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("DLM_STORE", str(tmp_path / "store"))
    sweeps.sweep(plan()[:1], jobs=1, store=None)
    assert not (tmp_path / "store").exists()
    sweeps.sweep(plan()[:1], jobs=1)
    assert (tmp_path / "store").exists()


def test_what_is_ours_is_not_shipped():
    foreign = [record.key for record in TOYS]
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
        (
            {"attack_options": {"brightness": 1}},
            "attack_options of toy_attack 'brightness' is unknown",
        ),
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


@pytest.mark.parametrize("key", sorted(records.ATTACKS))
def test_every_attack_lives_with_frozen_and_unused_layers_or_says_a_sentence(key):
    record = records.ATTACKS[key]
    images, labels, *_ = data.load("digits", n=1)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        seen = federated.train_locally(Idle(), images, labels, learning_rate=0.1)
    told = {"learning_rate": 0.1, "k0": 10.0, "local_steps": 1}
    told["defence"] = {"name": "noise", "scale": 1e-4, "observer": "server"}
    told |= record.example
    options = {name: told[name] for name in record.demands}
    options |= {"max_evaluations": 5} if "max_evaluations" in record.options else {}
    try:
        found = record([seen] if key == "aware_combined" else seen, **options)
    except ValueError as error:
        assert "\n" not in str(error)
    else:
        assert found.images.isfinite().all()
