"""The released experiments: the table in docs/released.md is what is run, and each row is run as it
stands.
"""

import copy
import re
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy
import pytest
import torch
from torch.nn.functional import cross_entropy, log_softmax

from dlm_core import federated, objectives, optimizers
from dlm_core.harness import released, scene, settings, sweeps, trials
from dlm_core.harness.trials import Client, Trial
from dlm_core.results import Status

TABLE = Path(__file__).parents[2] / "docs" / "released.md"
NETWORKS = ("lenet", "mlp")
BOTH = [(name, network) for name, each in released.SCRIPTS.items() for network in each.searches]


# --- the table


def table():
    """{script: {column: cell}}, of all tables of the page together."""
    rows, heads = {}, None
    for line in TABLE.read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")] if line[:1] == "|" else None
        if cells is None or set(cells[0]) == {"-"}:
            heads = heads if cells else None
        elif heads is None:
            heads = cells
        else:
            rows.setdefault(cells[0], {}).update(zip(heads, cells))
    return rows


ROWS = table()
GRADIENT = Client(learning_rate=1.0, dtype="float64")
CLIENTS = {
    "the gradient": GRADIENT,
    "the gradient, labelled 25": replace(GRADIENT, label=25),
    "SGD 0.01": Client(learning_rate=0.01),
    "SGD 0.1": Client(learning_rate=0.1),
    "SGD 0.1, gradients never cleared": Client(learning_rate=0.1, clear_gradients=False),
}
OPTIMIZERS = {
    "L-BFGS": torch.optim.LBFGS,
    "Adam": torch.optim.Adam,
    "signed Adam": optimizers.SignedAdam,
}


def number(text):
    try:
        return float(text)
    except ValueError:
        return text


def varied(row):
    """{name: values} of the cell "varies"."""
    if row["varies"] == "–":
        return {}
    parts = (part.split(": ") for part in row["varies"].split("; "))
    return {name: [number(value) for value in values.split(", ")] for name, values in parts}


def value_of(trial, name):
    places = (trial.attack_options, vars(trial.client), trial.defence and trial.defence.options)
    return next(place[name] for place in places if place and name in place)


def test_the_table_has_a_row_for_each_script():
    assert ROWS.keys() == released.SCRIPTS.keys()
    for name, row in ROWS.items():
        networks = [
            network for network in NETWORKS if row[{"mlp": "MLP"}.get(network, "LeNet")] != "–"
        ]
        assert networks == list(released.SCRIPTS[name].searches)


@pytest.mark.parametrize("name, network", BOTH)
def test_the_table_says_what_is_run(name, network):
    row, made = ROWS[name], released.trials(name, network=network, source="full")
    values = varied(row)
    found = [tuple(value_of(trial, each) for each in values) for trial in made]
    repeats = int(row["repeats"])
    assert found == [each for each in product(*values.values()) for _ in range(repeats)]
    assert [trial.seed for trial in made] == list(range(repeats)) * (len(made) // repeats)
    numbers = [int(each) for each in re.findall(r"\d+", row["training images"])]
    images = [trial.index + i for trial in made[:repeats] for i in range(trial.num_images)]
    assert images[0] == numbers[0] and images[-1] == numbers[-1]
    assert len(set(images)) == numbers[-1] - numbers[0] + 1
    for trial in made:
        options = dict(trial.attack_options)
        assert (trial.attack, trial.model, trial.dataset) == (row["attack"], network, "cifar100")
        assert (trial.source, trial.trained, trial.model_options) == ("full", 0, {})
        assert options["labels"] == row["label"]
        assert replace(trial.client, local_steps=1) == CLIENTS[row["client"]]
        assert trial.client.local_steps == 1 or "local_steps" in values
        assert (trial.defence.name if trial.defence else "–") == row["defence"]
        assert trial.defence is None or trial.defence.observer == "channel"
        assert (options["coordinates"], options["dtype"]) == ("pixels", "float32")
        assert options.get("total_variation", 0) == (1e-4 if "TV" in row["minimises"] else 0)
        kind, rate, iterations = row["MLP" if network == "mlp" else "LeNet"].split(", ")
        stepper = scene.PARTS[options["optimizer"]]([torch.zeros(1)], 100)
        assert type(stepper) is OPTIMIZERS[kind]
        assert stepper.param_groups[0]["lr"] == float(rate)
        assert options["whole_budget"] and options["max_iterations"] == int(iterations)
        steps = 20 if kind == "L-BFGS" else 1
        assert options["max_evaluations"] > steps * int(iterations)


@pytest.mark.parametrize("name", released.SCRIPTS)
def test_of_the_bundled_set_the_first_images_are_taken_in_turn(name):
    made = released.trials(name, n=12, source="bundled")[-12:]
    step = made[0].num_images
    assert [trial.index for trial in made] == [i * step % 20 for i in range(12)]
    assert [trial.seed for trial in made] == list(range(12))
    assert {trial.source for trial in made} == {"bundled"}


def test_released_images_are_taken_anew_after_the_last():
    made = released.trials("Cosine", n=52, source="full")
    assert [trial.index for trial in made[-3:]] == [109, 60, 61]
    assert len(set(made)) == 52


@pytest.mark.parametrize("name", released.SCRIPTS)
def test_with_the_full_set_the_images_are_those_of_training(name, tmp_path, monkeypatch):
    class Numbered:
        """CIFAR-100 as torchvision serves it, each image as bright as its number; tests' are 0."""

        def __init__(self, root, train=True):
            of_training = numpy.arange(120, dtype=numpy.uint8) * train
            self.data = numpy.tile(of_training[:, None, None, None], (1, 32, 32, 3))
            self.targets, self.classes = list(of_training % 100), range(100)

    monkeypatch.setattr("torchvision.datasets.CIFAR100", Numbered)
    monkeypatch.setenv("DLM_DATA", str(tmp_path))
    (tmp_path / "cifar-100-python").mkdir()
    script, made = released.SCRIPTS[name], released.trials(name)
    first, last = made[0], made[script.repeats - 1]
    numbers = [scene.truth_of(trial, trial.num_images)[0][:, 0, 0, 0] for trial in (first, last)]
    expected = (script.images[0], script.images[-1])
    for found, begin in zip(numbers, expected):
        assert (found * 255).round().tolist() == list(range(begin, begin + script.num_images))


# --- each is run as it stands


def mean_norm(tensors):
    return sum(tensor.norm() for tensor in tensors) / len(tensors)


def squares(g, d):
    return sum(((a - b) ** 2).sum() for a, b in zip(g, d))


def normalised(g, d):
    return squares([a / mean_norm(g) for a in g], [b / mean_norm(d) for b in d])


def cosine(g, d):
    g, d = (torch.cat([layer.flatten() for layer in each]) for each in (g, d))
    return 1 - g @ d / (g.norm() * d.norm())


# What the column "minimises" means, of g, Δ, k and the images; η is 1 where it occurs.
DISTANCES = {
    "Σ‖g − Δ/η‖²": lambda g, d, k, x: squares(g, d),
    "Σ‖k·g − Δ/η‖²": lambda g, d, k, x: squares([k * layer for layer in g], d),
    "Σ‖g − k·Δ‖²": lambda g, d, k, x: squares(g, [k * layer for layer in d]),
    "Σ‖g/n(g) − Δ/n(Δ)‖²": lambda g, d, k, x: normalised(g, d),
    "1 − cos(g, Δ)": lambda g, d, k, x: cosine(g, d),
    "1 − cos(g, Δ) + α·TV": lambda g, d, k, x: cosine(g, d) + 1e-4 * objectives.total_variation(x),
}


def naive(trial, minimises, optimizer, iterations):
    """(loss of each evaluation, images, k) of the released loop, written out."""
    seen, images, labels = trials.observe(trial)
    dtype = scene.DTYPES[trial.attack_options["dtype"]]
    model = copy.deepcopy(seen.model).to(dtype)
    delta = [layer.to(dtype) for layer in seen.delta]
    told, k0 = trial.attack_options["labels"], trial.attack_options.get("k0", 1.0)
    generator = torch.Generator().manual_seed(trial.seed)
    shapes = images.shape, (len(images), 100)
    x, logits = (torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for s in shapes)
    k = torch.tensor(float(k0), dtype=dtype)
    trained = [x, *([logits] if told == "optimised" else [])]
    trained += [k] if "k0" in trial.attack_options else []
    for tensor in trained:
        tensor.requires_grad_()
    labels = labels[-1:].expand(len(labels)) if told == "last" else labels
    stepper, losses = optimizer(trained), []

    def closure():
        stepper.zero_grad()
        scores = model(x)
        if told == "optimised":
            loss = -(logits.softmax(1) * log_softmax(scores, 1)).sum(1).mean()
        else:
            loss = cross_entropy(scores, labels)
        g = torch.autograd.grad(loss, list(model.parameters()), create_graph=True)
        distance = DISTANCES[minimises](g, delta, k, x)
        distance.backward()
        losses.append(distance.item())
        return distance

    for _ in range(iterations):
        stepper.step(closure)
    return losses, x.detach(), k.item()


@pytest.mark.parametrize("name, network", BOTH)
def test_each_begins_where_the_table_says_and_runs(name, network):
    trial = released.trials(name, network=network, n=1, iterations=2, source="bundled")[-1]
    record = trial.run()
    steps = 20 if trial.attack_options["optimizer"] == "released_lbfgs" else 1
    assert record["stop_reason"] == Status.WHOLE and record["evaluations"] == 2 * steps
    losses = record["arrays"]["losses"]
    first, *_ = naive(trial, ROWS[name]["minimises"], lambda x: torch.optim.SGD(x, lr=0), 1)
    assert losses[0].item() == pytest.approx(first[0], rel=1e-4)
    assert released.script_of(trial) == name
    assert released.search(trial).endswith("shortened")


LOOPS = [
    ("DLM_plus", "lenet", lambda x: torch.optim.LBFGS(x, lr=1), 3),
    ("DLM", "lenet", lambda x: torch.optim.LBFGS(x, lr=1), 2),
    ("DLG_k with a factor", "lenet", lambda x: torch.optim.LBFGS(x, lr=1), 3),
    ("Cosine", "lenet", lambda x: torch.optim.LBFGS(x), 3),
    ("DLM_PLUS_EXAMPLE", "lenet", lambda x: torch.optim.LBFGS(x, lr=1), 3),
    ("DLM", "mlp", lambda x: torch.optim.Adam(x, lr=0.1), 60),
    ("DLM_plus", "mlp", lambda x: torch.optim.Adam(x, lr=0.01), 60),
]


@pytest.mark.parametrize("name, network, optimizer, iterations", LOOPS)
def test_a_search_is_the_released_loop(name, network, optimizer, iterations):
    """To the end in float64; in the released float32 steps without line search soon tell one order
    of summation from another.
    """
    single = released.trials(name, network=network, n=2, iterations=iterations, source="bundled")[1]
    double = replace(single, attack_options={**single.attack_options, "dtype": "float64"})
    for trial, evaluations in ((single, 8), (double, None)):
        losses, images, k = naive(trial, ROWS[name]["minimises"], optimizer, iterations)
        seen, _, labels = trials.observe(trial)
        found = trials.attack(trial, seen, labels)
        assert len(found.losses) == len(losses) and found.images.dtype == images.dtype
        assert found.losses[:evaluations] == pytest.approx(losses[:evaluations], rel=1e-3)
    assert torch.allclose(found.images, images, atol=1e-3)
    if "k0" in single.attack_options:
        end = found.point["k"] if single.attack == "dlg_factor" else found.k
        assert float(end) == pytest.approx(k, rel=1e-3)


def test_the_gradient_itself_is_observed():
    trial = released.trials("DLG_k", n=1, source="bundled")[0]
    seen, images, labels = trials.observe(trial)
    model = copy.deepcopy(seen.model)
    gradient = objectives.gradient(model, federated.loss, images.double(), labels)
    for layer, true in zip(seen.delta, gradient):
        assert torch.allclose(layer, true, rtol=0, atol=1e-15)


def test_a_run_that_meets_a_nan_has_diverged_there(monkeypatch):
    trial = released.trials("DLM_plus", n=1, iterations=3, source="bundled")[0]
    calls = []

    def breaks(g, d):
        calls.append(1)
        return objectives.squared_distance(g, d) * (float("nan") if len(calls) > 30 else 1.0)

    monkeypatch.setattr(objectives, "normalised_distance", breaks)
    record = trial.run()
    assert record["stop_reason"] == Status.DIVERGED
    assert 20 < record["evaluations"] < 60


# --- names


def test_what_a_script_varies_may_be_given_alone_or_as_a_list():
    assert [t.attack_options["k0"] for t in released.trials("DLM", n=1, k0=100)] == [100]
    some = released.trials("dlm_defense noise", n=2, scale=[0.1, 1.0], distribution="laplace")
    assert [(t.defence.options["scale"], t.seed) for t in some] == [
        (0.1, 0),
        (0.1, 1),
        (1.0, 0),
        (1.0, 1),
    ]


@pytest.mark.parametrize(
    "script, options, said",
    [
        ("DLM+", {}, r"script 'DLM\+' is unknown: choose from DLG_k, .*did you mean DLM"),
        ("Cosine", {"network": "mlp"}, "network of Cosine 'mlp' is unknown: choose from lenet"),
        ("DLM_plus", {"network": "resnet18"}, "'resnet18' is unknown: choose from lenet, mlp"),
        ("DLM", {"scale": 1}, "option of DLM 'scale' is unknown: choose from k0, network, n, "),
        ("DLM", {"n": 0}, "n is 0"),
        ("DLM", {"source": "ful"}, "source 'ful' is unknown"),
    ],
)
def test_what_no_script_runs_is_refused(script, options, said):
    with pytest.raises(ValueError, match=said):
        released.trials(script, **options)


@pytest.mark.parametrize("name, network", BOTH)
def test_a_table_s_row_says_whether_it_is_as_released(name, network):
    whole = "its authors'" if name.startswith("IG") else "as released"
    for trial in released.trials(name, network=network, n=2, keep_every=7, source="bundled"):
        assert released.search(trial) == whole and released.script_of(trial) == name
        fewer = {**trial.attack_options, "max_iterations": 3}
        assert released.search(replace(trial, attack_options=fewer)) == f"{whole}, shortened"
        told = {**trial.attack_options, "labels": "inferred"}
        other = released.search(replace(trial, attack_options=told))
        assert other == ("signed Adam" if name.startswith("IG") else "released search")
    elsewhere = replace(trial, dataset="imagenet64", client={"learning_rate": 0.05})
    assert released.search(elsewhere) in ("released search", "signed Adam")


def test_other_searches_are_not_called_released():
    assert released.search(Trial()) == "our search"
    assert released.search(Trial(attack_options={"whole_budget": True})) == "our search"
    assert released.search(Trial("inverting_gradients")) == "signed Adam"
    assert {released.search(Trial(key)) for key in ("grey", "noise", "exact")} == {"none"}


def test_the_setting_says_the_released_search():
    plan = released.trials("DLM", n=1, source="bundled")
    assert ", the released search; n = " in settings.sentence(plan)
    short = released.trials("DLM_plus", n=1, iterations=2, source="bundled")
    assert ", the released search (shortened); n = " in settings.sentence(short)
    theirs = released.trials(released.AUTHORS_IG, source="bundled")
    mixed = settings.sentence([Trial(), *plan, *theirs])
    assert ", our search, the released search and IG's authors' search; n = " in mixed


def test_presets_go_straight_into_a_sweep(tmp_path):
    plan = released.trials("DLM_plus", n=2, iterations=1, source="bundled")
    records = sweeps.sweep(plan, jobs=1, store=tmp_path)
    results = sweeps.table(plan, records).assign(search=[released.search(t) for t in plan])
    assert list(results.search) == ["as released, shortened"] * 2
    assert list(results["index"]) == [0, 1]


def test_what_is_followed_on_its_way_is_so_in_every_notebook(tmp_path):
    """So that a run that several notebooks show is made once."""
    for script in ("DLG_k", "DLM_plus", "Cosine"):
        plan = released.trials(script, n=1, iterations=2, source="bundled")
        (record,) = sweeps.sweep(plan, jobs=1, store=tmp_path)
        assert record["history_evaluations"][:2] == [0, released.ON_THE_WAY], script
