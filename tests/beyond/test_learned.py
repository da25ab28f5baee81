"""The attacker who has seen other digits."""

import operator
import tomllib

import pytest
import torch

from dlm_core import data, defenses, federated, metrics, models
from dlm_core.beyond import learned
from dlm_core.harness.all_rounds import RESERVED
from dlm_core.harness.paths import REPOSITORY

QUICK = {"training_steps": 150, "max_evaluations": 40}
NOISE = defenses.Setting(
    "clip_and_noise", {"clip": 1.0, "noise_multiplier": 0.05}, observer="server"
)


@pytest.fixture(scope="module")
def digits():
    return data.load("digits", source="bundled")


@pytest.fixture(scope="module")
def rounds(digits):
    """A client with digit 3 in ten rounds, in which the network moves."""
    model = models.build("mlp", (1, 8, 8), 10, seed=0, init="default")
    others = digits.images[200:296], digits.labels[200:296]
    found = []
    for turn in range(10):
        step = federated.train_locally(model, *client(digits), learning_rate=1.0)
        found.append(NOISE.defend(step, turn))
        ((model, _),) = federated.rounds(model, [others], num_rounds=1, learning_rate=0.3)
    return found


def client(digits, index=3):
    return digits.images[index : index + 1], digits.labels[index : index + 1]


def attack(seen, **options):
    return learned.plug_and_play(seen, defence=NOISE, learning_rate=1.0, **{**QUICK, **options})


def psnr(found, digits):
    return metrics.psnr(found.images, client(digits)[0], data_range=1.0)


def test_no_attacked_digit_is_trained_on(monkeypatch, digits):
    asked = []
    load = data.load

    def watched(name, **how):
        asked.append((name, list(how["indices"])))
        return load(name, **how)

    monkeypatch.setattr(learned.data, "load", watched)
    learned.denoiser.__wrapped__(1)
    ((name, indices),) = asked
    assert name == "digits" and 1600 < len(indices) < 1797
    assert min(indices) >= RESERVED
    attacked, public = digits.images[:RESERVED].flatten(1), digits.images[indices].flatten(1)
    assert torch.cdist(attacked, public).min() > 0  # nor a copy of one


@pytest.mark.parametrize("notebook", ["18_privacy_and_utility", "20_choosing_a_defence"])
def test_the_notebooks_attack_none_but_the_reserved_digits(notebook):
    profiles = tomllib.loads((REPOSITORY / "notebooks/profiles.toml").read_text())[notebook]
    for name in ("smoke", "quick", "paper"):
        at = profiles[name]
        together = [*at.get("batches", [1]), *at.get("free_batches", [1]), at.get("batch", 4)]
        first = max(at.get(each, 0) for each in ("images", "draws", "free_draws"))
        assert first + max(together) <= RESERVED <= learned.PUBLIC.start


def test_the_denoiser_removes_noise_from_digits_that_it_has_not_seen(digits):
    images, labels = digits.images[:RESERVED], digits.labels[:RESERVED]
    noisy = images + 0.3 * torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    clean = learned.denoiser(150)(noisy, torch.full((RESERVED,), 0.3), labels)
    assert (clean - images).square().mean() < (noisy - images).square().mean() / 3


def test_its_training_is_the_same_each_time_and_leaves_the_random_generator_alone():
    before = torch.get_rng_state()
    one, other = (learned.denoiser.__wrapped__(3) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), before)
    for a, b in zip(one.parameters(), other.parameters()):
        assert torch.equal(a, b)


def test_a_trials_seed_decides_the_result(rounds):
    first, again, other = (attack(rounds[:2], seed=seed).images for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_more_rounds_show_more_and_the_label_is_found(rounds, digits):
    one, all_ = attack(rounds[0]), attack(rounds)
    assert all_.labels.tolist() == client(digits)[1].tolist()
    assert psnr(all_, digits) > psnr(one, digits) + 2
    assert psnr(all_, digits) > 20


def test_several_local_steps_are_simulated(digits):
    model = models.build("mlp", (1, 8, 8), 10, seed=0, init="default")
    seen = federated.train_locally(model, *client(digits), learning_rate=0.5, local_steps=3)
    clipped = defenses.Setting("clip_and_noise", {"clip": 1.0}, observer="server")
    told = {"defence": clipped, "learning_rate": 0.5, **QUICK}
    right, wrong = (
        learned.plug_and_play(clipped.defend(seen, 0), local_steps=steps, **told)
        for steps in (3, 1)
    )
    assert right.loss < wrong.loss
    assert psnr(right, digits) > 20


def test_what_a_defence_zeroes_is_left_out(digits):
    model = models.build("mlp", (1, 8, 8), 10, seed=0, init="default")
    told = defenses.Setting("sparsify", {"percent": 50}, observer="server")
    nothing = defenses.Setting("clip_and_noise", {"clip": 1e3}, observer="server")
    gained = []
    for index in range(3):
        images, labels = client(digits, index)
        seen = federated.train_locally(model, images, labels, learning_rate=0.5)
        sent = told.defend(seen, 0)
        knowing, not_knowing = (
            learned.plug_and_play(sent, defence=each, learning_rate=0.5, **QUICK).images
            for each in (told, nothing)
        )
        psnrs = (metrics.psnr(each, images, data_range=1.0) for each in (knowing, not_knowing))
        gained.append(operator.sub(*psnrs))
    assert min(gained) > 3, gained


def test_several_images_take_their_labels(digits):
    model = models.build("mlp", (1, 8, 8), 10, seed=0, init="default")
    images, labels = digits.images[:2], digits.labels[:2]
    seen = NOISE.defend(federated.train_locally(model, images, labels, learning_rate=1.0), 0)
    found = attack(seen, num_images=2, labels=labels)
    assert found.images.shape == (2, 1, 8, 8)
    assert torch.equal(found.labels, labels)
    with pytest.raises(ValueError, match="num_images 2; for several they are told"):
        attack(seen, num_images=2)


def test_images_that_are_no_digits_are_refused():
    images, labels, *_ = data.load("cifar100", n=1, source="bundled")
    model = models.build("lenet", (3, 32, 32), 100, seed=0)
    seen = federated.train_locally(model, images, labels, learning_rate=0.1)
    with pytest.raises(ValueError, match=r"image_shape is \(3, 32, 32\) with 100 classes"):
        attack(seen)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"labels": "optimised"}, "labels is 'optimised'"),
        ({"labels": [1, 2]}, "labels has 2 entries; num_images is 1"),
        ({"learning_rate": 0.0}, "learning_rate is 0.0"),
        ({"last_noise": 0.0}, "last_noise is 0.0"),
    ],
)
def test_bad_options_are_named(rounds, options, message):
    with pytest.raises(ValueError, match=message):
        learned.plug_and_play(rounds[0], defence=NOISE, **{"learning_rate": 1.0, **options})


def test_it_takes_at_least_one_round():
    with pytest.raises(ValueError, match="number of rounds is 0"):
        attack([])
