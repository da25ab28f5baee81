"""Every registered attack and defence through one battery, and what the battery finds."""

import sys
from dataclasses import replace
from functools import cached_property

import pytest
import torch

from dlm_core import attacks, defenses, records
from dlm_core.beyond import adaptive
from dlm_core.harness import battery
from dlm_core.observation import Observation
from dlm_core.results import baseline
from dlm_core.search import reconstruct

DEVICES = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("key", sorted(records.ATTACKS))
def test_attack(key, device):
    battery.check_attack(key, device=device)


@pytest.mark.parametrize("key", sorted(records.DEFENCES))
def test_defence(key):
    battery.check_defence(key)


# --- what attacks are told


def test_who_is_told_what():
    told = {key: " ".join(record.told) for key, record in records.ATTACKS.items()}
    assert "total-variation" in told["inverting_gradients"]
    assert "optimizer" in told["unrolled_dlm"]
    assert "sign-like" in told["interval_dlm"]
    assert "learning rate" in told["dlg"] and "learning rate" in told["idlg"]
    assert "k0" in told["dlm"] and told["dlm_plus"] == ""
    aware = [key for key in told if key.startswith("aware_")]
    assert aware and all("defence" in told[key] for key in aware)


# --- Δ is computed once


def test_dlm_plus_computes_delta_once(monkeypatch):
    computed = []
    original = Observation.__dict__["delta"]
    assert isinstance(original, cached_property)

    def counting(seen):
        computed.append(1)
        return original.func(seen)

    counted = cached_property(counting)
    counted.__set_name__(Observation, "delta")
    monkeypatch.setattr(Observation, "delta", counted)
    attacks.dlm_plus(battery.PLAIN.observe(), max_evaluations=5)
    assert len(computed) == 1


# --- attacks and defences of one's own


@pytest.fixture
def register():
    """Registers attacks and defences as "mine", for this test alone."""

    def as_kind(kind, function, **about):
        table = {"attack": records.ATTACKS, "defence": records.DEFENCES}[kind]
        table.pop("mine", None)
        getattr(records, kind)("mine", title="Mine", **about)(function)
        return table["mine"]

    yield as_kind
    records.ATTACKS.pop("mine", None)
    records.DEFENCES.pop("mine", None)


@records.passes_on_to(reconstruct)
def scaled_search(seen, *, strength, **options):
    """An attack as it should be, which has to be told a strength."""
    if strength <= 0:
        raise ValueError(f"strength is {strength}; it takes a number above 0")
    return attacks.dlg(seen, learning_rate=1 / strength, labels="inferred", **options)


def test_an_attack_of_one_s_own_passes(register):
    record = register("attack", scaled_search)
    assert record.told == ("strength",)
    battery.check_attack("mine", strength=20.0)
    battery.check_attack(record, strength=20.0, scene=battery.Scene(network="mlp"))
    with pytest.raises(AssertionError, match="attack 'mine' demands strength: give its record an"):
        battery.check_attack("mine")


def spoils_delta(seen, *, num_images=1, seed=0):
    seen.delta[0].zero_()
    return attacks.dlm_plus(seen, num_images=num_images, seed=seed, max_evaluations=2)


def spoils_weights(seen, *, num_images=1, seed=0):
    found = attacks.dlm_plus(seen, num_images=num_images, seed=seed, max_evaluations=2)
    next(seen.model.parameters()).data.zero_()
    return found


def ignores_its_seed(seen, *, num_images=1, seed=0):
    return baseline(torch.rand(num_images, *seen.image_shape))


def is_never_the_same(seen, *, num_images=1, seed=0):
    generator = torch.Generator()
    generator.seed()
    return baseline(torch.rand(num_images, *seen.image_shape, generator=generator))


def returns_one_image(seen, *, num_images=1, seed=0):
    return baseline(torch.full((1, *seen.image_shape), 0.5))


def returns_a_tensor(seen, *, num_images=1, seed=0):
    return torch.full((num_images, *seen.image_shape), 0.5)


def returns_nan(seen, *, num_images=1, seed=0):
    return baseline(torch.full((num_images, *seen.image_shape), float("nan")))


def returns_bright(seen, *, num_images=1, seed=0):
    found = is_seeded(seen, num_images=num_images, seed=seed)
    found.images[0, 0, 0, :2] = torch.tensor([-1.0, 1e6])
    return found


def returns_other_labels(seen, *, num_images=1, seed=0):
    found = is_seeded(seen, num_images=num_images, seed=seed)
    return replace(found, labels=found.labels.int())


def returns_a_file(seen, *, num_images=1, seed=0):
    found = is_seeded(seen, num_images=num_images, seed=seed)
    found.evidence.point["file"] = sys.stdout
    return found


def raises(seen, *, num_images=1, seed=0):
    raise RuntimeError("a shape is wrong\nvery wrong")


def asserts(seen, *, num_images=1, seed=0):
    assert num_images == 0


def has_no_seed(seen, *, num_images=1, seed=0):
    return baseline(torch.full((num_images, *seen.image_shape), 0.5))


def is_seeded(seen, *, num_images=1, seed=0):
    return attacks.noise(seen, num_images=num_images, seed=seed)


def takes_anything(seen, *, num_images=1, seed=0, **options):
    return baseline(torch.full((num_images, *seen.image_shape), 0.5))


def takes_one_precision(seen, *, num_images=1, seed=0):
    if seen.delta and next(seen.model.parameters()).dtype != torch.float32:
        raise ValueError("the model must be float32, and this one is not")
    return baseline(torch.full((num_images, *seen.image_shape), 0.5))


@pytest.mark.parametrize(
    "function, message",
    [
        (spoils_delta, "changes delta.0.weight of the Observation"),
        (spoils_weights, "changes model.0.weight of the Observation"),
        (ignores_its_seed, "draws from a global random generator"),
        (is_never_the_same, "gives other images for the same seed"),
        (returns_one_image, r"returns images of shape \[1, 1, 8, 8\] .* where \[2, 1, 8, 8\]"),
        (returns_a_tensor, "returns a Tensor, not a Reconstruction"),
        (returns_nan, "returns images that hold NaN"),
        (returns_bright, r"returns images from -1 to 1e\+06; pixels lie in \[0, 1\]"),
        (returns_other_labels, "returns labels .*, not 1 class indices of torch.int64"),
        (returns_a_file, "returns what no process can send to another: TypeError"),
        (raises, r"raises RuntimeError \(a shape is wrong\) on its own scene"),
        (asserts, r"raises AssertionError \(.*\) on its own scene"),
        (has_no_seed, "gives the same images for another seed: its record says seeded=True"),
        (takes_anything, "takes a wrong no_such_option without a word"),
        (
            takes_one_precision,
            r"raises ValueError \(the model must be float32.*\) on its own scene",
        ),
    ],
)
def test_an_attack_that_errs_is_told_how(register, function, message):
    register("attack", function)
    with pytest.raises(AssertionError, match=f"attack 'mine' {message}") as caught:
        battery.check_attack("mine")
    assert "\n" not in str(caught.value)


def test_what_a_record_says_of_its_seed_is_true(register):
    register("attack", is_seeded)
    battery.check_attack("mine")
    register("attack", is_seeded, seeded=False)
    with pytest.raises(AssertionError, match="'mine' takes a seed: its record says seeded=False"):
        battery.check_attack("mine")


def test_a_record_that_has_an_example_needs_no_more(register):
    """Its module and its test: nothing else is edited."""
    register("attack", scaled_search, example={"strength": 20.0}, scene={"network": "mlp"})
    battery.check_attack("mine")
    neutral = {"strength": 0.0}
    register("defence", shift, variance=variance_of_shift, example=neutral, neutral=neutral)
    with pytest.raises(AssertionError, match="gives the same tensors for another seed"):
        battery.check_defence("mine")
    about = {"example": {"strength": 1e-3}, "neutral": neutral}
    register("defence", shift, variance=variance_of_shift, **about)
    battery.check_defence("mine")


def shift(weights, *, strength, seed=0, parameters=None):
    """Adds normal noise of standard deviation ``strength``, as it should."""
    generator = torch.Generator().manual_seed(seed)
    defended = dict(weights)
    for name in weights if parameters is None else parameters:
        drawn = torch.randn(weights[name].shape, generator=generator)
        defended[name] = weights[name] + strength * drawn.to(weights[name])
    return defended


def variance_of_shift(seen, setting):
    snapshots = 2 if setting.observer == "channel" else 1
    return [snapshots * setting.options["strength"] ** 2] * len(seen.delta)


def test_a_defence_of_one_s_own_passes(register):
    register("defence", shift, variance=variance_of_shift)
    battery.check_defence("mine", strength=1e-3, neutral={"strength": 0.0})
    setting = defenses.Setting("mine", {"strength": 1e-3}, repeats=4)
    seen = battery.PLAIN.observe()
    assert setting.noise_variance(seen) == [2 * 1e-6 / 4] * len(seen.delta)
    with pytest.raises(AssertionError, match="demands strength: give its record an example"):
        battery.check_defence("mine")


def test_noise_of_unknown_variance_is_not_taken_for_none(register):
    record = register("defence", shift)
    battery.check_defence(record, strength=1e-3)
    seen = defenses.defend(battery.PLAIN.observe(), "mine", strength=1e-3)
    defence = {"name": "mine", "strength": 1e-3}
    with pytest.raises(ValueError, match="'mine' draws noise, and its record has no variance"):
        adaptive.dlm_plus(seen, defence=defence)
    with pytest.raises(ValueError, match="'mine' draws noise, and its record has no variance"):
        adaptive.recover(seen, defence=defence)


def shift_in_place(weights, *, strength, seed=0, parameters=None):
    for name, tensor in shift(weights, strength=strength, seed=seed, parameters=parameters).items():
        weights[name].copy_(tensor)
    return weights


def shift_buffers(weights, *, strength, seed=0, parameters=None):
    return {name: tensor + tensor.new_tensor(2) for name, tensor in weights.items()}


def shift_to_double(weights, *, strength, seed=0, parameters=None):
    return {name: tensor.double() for name, tensor in weights.items()}


def shift_and_drop(weights, *, strength, seed=0, parameters=None):
    return {name: weights[name] for name in parameters}


def shift_by_chance(weights, *, strength, seed=0, parameters=None):
    return shift(weights, strength=strength, seed=torch.Generator().seed(), parameters=parameters)


def shift_alike(weights, *, strength, seed=0, parameters=None):
    return shift(weights, strength=strength, seed=0, parameters=parameters)


def shift_wrongly(weights, *, strength, seed=0, parameters=None):
    raise RuntimeError("a shape is wrong")


def shift_ever(weights, *, strength, seed=0, parameters=None):
    return shift(weights, strength=strength + 1e-3, seed=seed, parameters=parameters)


@pytest.mark.parametrize(
    "function, message",
    [
        (shift_in_place, "changes weights_after.0.weight of the Observation"),
        (shift_buffers, ".*which is no parameter"),
        (shift_to_double, "returns .* in another shape or precision"),
        (shift_and_drop, "does not return a state dict of the same names"),
        (shift_by_chance, "gives other tensors for the same seed"),
        (shift_alike, "gives the same tensors for another seed"),
        (shift_wrongly, r"raises RuntimeError \(a shape is wrong\)"),
        (shift_ever, r"is not the identity at {'strength': 0.0}"),
    ],
)
def test_a_defence_that_errs_is_told_how(register, function, message):
    register("defence", function, variance=variance_of_shift)
    with pytest.raises(AssertionError, match=f"defence 'mine' {message}") as caught:
        battery.check_defence("mine", strength=1e-2, neutral={"strength": 0.0})
    assert "\n" not in str(caught.value)


def test_a_wrong_variance_is_found(register):
    def tenfold(seen, setting):
        return [10 * variance for variance in variance_of_shift(seen, setting)]

    register("defence", shift, variance=tenfold)
    with pytest.raises(AssertionError, match="'mine' adds noise of .*; its variance says"):
        battery.check_defence("mine", strength=1e-2)


@pytest.mark.parametrize("checked", [battery.check_attack, battery.check_defence])
def test_an_unknown_key_is_named(checked):
    with pytest.raises(ValueError, match="'nope' is unknown"):
        checked("nope")
