"""One step of Adam's kin: its gradient read back, the attack on that, and its optimizer's name."""

import copy
import math

import pytest
import torch

from dlm_core import data, federated, metrics, models, objectives, records
from dlm_core.beyond import reading, recognise, signlike

SIGN_LIKE = {
    "adam": ("adam", {}, 1e-3, 1e-8, 0.0),
    "adam, other settings": ("adam", {"eps": 1e-6, "betas": (0.5, 0.9)}, 3e-3, 1e-6, 0.0),
    "adamw": ("adamw", {}, 1e-3, 1e-8, 0.01),
    "rmsprop": ("rmsprop", {}, 1e-3, 1e-7, 0.0),
}
CLIENTS = {
    "sgd": ("sgd", {}, 0.01),
    "momentum": ("sgd", {"momentum": 0.9}, 0.01),
    "nesterov": ("sgd", {"momentum": 0.9, "nesterov": True}, 0.01),
    "sgd with decay": ("sgd", {"weight_decay": 5e-4}, 0.01),
    **{name: SIGN_LIKE[name][:3] for name in ("adam", "adamw", "rmsprop")},
}


@pytest.fixture(scope="module")
def images():
    return data.load("cifar100", n=3)


def client(images, index, optimizer, options, learning_rate, **training):
    model = models.build("lenet", num_classes=images.num_classes, seed=index)
    one = slice(index, index + 1)
    return federated.train_locally(
        model,
        images.images[one],
        images.labels[one],
        learning_rate=learning_rate,
        client_optimizer=optimizer,
        optimizer_options=options,
        **training,
    )


def true_gradient(seen, images, index):
    model, one = copy.deepcopy(seen.model).double(), slice(index, index + 1)
    gradient = objectives.gradient(
        model, federated.loss, images.images[one].double(), images.labels[one]
    )
    return [layer.detach() for layer in gradient]


@pytest.mark.parametrize("name", SIGN_LIKE)
def test_the_reading_holds_the_true_gradient_and_finds_the_optimizer_s_constants(images, name):
    optimizer, options, learning_rate, eps, decay = SIGN_LIKE[name]
    seen = client(images, 1, optimizer, options, learning_rate)
    found, truth = signlike.read(seen), true_gradient(seen, images, 1)
    full_step = learning_rate / math.sqrt(1 - 0.99) if optimizer == "rmsprop" else learning_rate
    assert found.learning_rate == pytest.approx(full_step, rel=1e-6)
    assert found.eps == pytest.approx(eps, rel=1e-3)
    assert found.weight_decay == pytest.approx(
        decay, abs=3e-8 / learning_rate
    )  # the client computes 1 - ηλ in float32
    assert found.label.tolist() == images.labels[1:2].tolist()
    for g, low, high in list(zip(truth, found.low, found.high))[:-2]:
        assert ((low <= g) & (g <= high)).double().mean() > 0.99
    for g, low in list(zip(truth, found.low))[-2:]:
        torch.testing.assert_close(low, g, rtol=1e-2, atol=1e-5)
    assert signlike.distance_outside(found.low, found.high)(truth, None) < 1e-7


def test_the_reading_is_of_the_gradient_and_not_of_signs(images):
    found = signlike.read(client(images, 0, "adam", {}, 1e-3))
    assert found.readable > 0.5  # of 85,036 magnitudes, to 10 %


def test_what_was_rounded_too_coarsely_or_no_such_step_is_refused(images):
    with pytest.raises(ValueError, match="features of the last layer"):
        signlike.read(client(images, 0, "adam", {}, 1e-3, transmitted=torch.bfloat16))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("learning_rate, eps", [(1e-3, 0.1), (1e-3, 1e5), (0.1, 0.1), (0.1, 1e8)])
@pytest.mark.parametrize("optimizer", ["adam", "rmsprop"])
def test_a_step_that_is_not_like_a_sign_is_a_sentence(optimizer, learning_rate, eps, dtype):
    """With a large ε the step is linear in the gradient, and no η and ε can be read."""
    digits = data.load("digits", n=3)
    for index in range(3):
        one = slice(index, index + 1)
        seen = federated.train_locally(
            models.build("mlp", (1, 8, 8), 10, seed=index).to(dtype),
            digits.images[one].to(dtype),
            digits.labels[one],
            learning_rate=learning_rate,
            client_optimizer=optimizer,
            optimizer_options={"eps": eps},
        )
        found = recognise.recognise(seen)
        try:
            read = signlike.read(seen)
        except ValueError as error:
            said = ("not one step of Adam", "the last layer did not change")
            assert any(each in str(error) for each in said)
            assert found.optimizer not in ("adam", "adamw", "rmsprop")
        else:
            assert read.learning_rate > 0 and 0 < read.eps < math.inf


def test_the_attack_on_bounds_sees_more_than_the_signs_do(images):
    seen = client(images, 1, "adam", {}, 1e-3)
    bounds = signlike.interval_dlm(seen, max_evaluations=80)
    signs = signlike.sign_dlm(seen, max_evaluations=80)
    psnr = [
        float(metrics.psnr(found.images, images.images[1:2], data_range=1.0))
        for found in (bounds, signs)
    ]
    assert psnr[0] > 19 and psnr[0] > psnr[1] + 3
    assert bounds.loss < 1e-3 * bounds.losses[0]


@pytest.mark.parametrize("name", CLIENTS)
def test_one_step_names_its_optimizer_and_several_are_not_taken_for_one(images, name):
    for index in range(1, 3):
        found = recognise.recognise(client(images, index, *CLIENTS[name]))
        assert found.optimizer == ("sgd" if name in ("momentum", "nesterov") else name)
        several = recognise.recognise(client(images, index, *CLIENTS[name], local_steps=3))
        assert several.optimizer == "several steps"


def test_a_linear_step_gives_its_rate_and_decay(images):
    step = recognise.linear_step(client(images, 0, "sgd", {"weight_decay": 5e-4}, 0.01))
    assert step.learning_rate == pytest.approx(0.01, rel=1e-5)
    assert step.weight_decay == pytest.approx(5e-4, rel=1e-3)
    assert step.misfit < 20 * step.rounding


def test_the_distance_outside_bounds_is_zero_within_and_grows_as_the_square_without():
    low, high = [torch.tensor([1.0, -math.inf])], [torch.tensor([math.inf, -2.0])]
    between = signlike.distance_outside(low, high)
    assert between([torch.tensor([5.0, -3.0])], None) == 0
    assert between([torch.zeros(2)], None) == 1
    assert between([torch.tensor([-1.0, -2.0])], None) == pytest.approx(4 / 5)


def test_the_sign_distance_ignores_scale_and_has_the_right_slope():
    generator = torch.Generator().manual_seed(0)
    g, d = (
        [torch.randn(n, generator=generator, dtype=torch.float64) for n in (5, 3)] for _ in range(2)
    )
    each = signlike.sign_distance(g, d)
    torch.testing.assert_close(
        each, signlike.sign_distance([3 * a for a in g], [0.1 * b for b in d])
    )
    assert 0 < signlike.sign_distance(g, g) < 0.2
    assert float(signlike.sign_distance([-a for a in g], g)) > 1.8
    g = [a.requires_grad_() for a in g]
    assert torch.autograd.gradcheck(lambda *a: signlike.sign_distance(a, d), g)


def test_the_reader_is_one_and_searches_nothing():
    assert signlike.read is reading.read and signlike.Reading is reading.Reading
    for module in (reading, recognise):
        assert not {"search", "signlike", "reconstruct"} & vars(module).keys()


def test_what_they_are_told_is_declared():
    assert records.ATTACKS["interval_dlm"].told and records.ATTACKS["sign_dlm"].told
    assert not records.ATTACKS["interval_dlm"].several


def test_the_attack_on_bounds_takes_one_image(images):
    with pytest.raises(ValueError, match="num_images is 2; interval_dlm takes one"):
        records.ATTACKS["interval_dlm"](client(images, 0, "adam", {}, 1e-3), num_images=2)


def test_signs_of_layers_that_did_not_move_are_left_out():
    """They gave NaN at the first evaluation, which read as if signs told nothing."""
    images, labels, *_ = data.load("digits", n=1)
    client = {"learning_rate": 1e-3, "client_optimizer": "adam"}
    layers = torch.nn.Linear(64, 32), torch.nn.ReLU(), torch.nn.Linear(32, 16)
    model = torch.nn.Sequential(torch.nn.Flatten(), *layers, torch.nn.Linear(16, 10))
    model[1].requires_grad_(False)
    seen = federated.train_locally(model, images, labels, **client)
    assert math.isfinite(signlike.sign_dlm(seen, max_evaluations=3).loss)
    one = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))
    seen = federated.train_locally(one, images, labels, **client)
    with pytest.raises(ValueError, match="no layer below the last one moved"):
        signlike.sign_dlm(seen)
