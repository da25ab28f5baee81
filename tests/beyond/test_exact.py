"""Exact recovery against known truth: small networks, whose every figure is checked in seconds."""

import copy
import dataclasses
import math
from collections import Counter
from functools import cached_property

import pytest
import torch
from torch import nn

from dlm_core import data, federated, models
from dlm_core.beyond import (
    exact,
    information,
    likelihood,
    preprocessing,
    recursion,
    rounding,
    stacks,
)
from dlm_core.federated import train_locally
from dlm_core.harness import trials
from dlm_core.harness.trials import Trial
from dlm_core.observation import Observation
from dlm_core.results import ClientEstimate, Explains, Status

SHAPE, CLASSES, LABEL = (1, 8, 8), 10, torch.tensor([3])


def picture(shape=SHAPE, seed=0):
    """Random 8-bit pixels, with pure black and pure white among them."""
    pixels = (
        torch.randint(0, 256, (1, *shape), generator=torch.Generator().manual_seed(seed)) / 255.0
    )
    pixels.view(-1)[:4] = torch.tensor([0.0, 1.0, 0.0, 1.0])
    return pixels


def lenet(shape=SHAPE, seed=0, **options):
    return models.build("lenet", shape, CLASSES, seed=seed, **({"depth": 2} | options))


def mean_square(errors):
    return float(errors.double().square().mean())


def eight_bit(images):
    return (images * 255).round().long()


NETWORKS = {
    "lenet": lenet,
    "lenet, three layers, colour": lambda: models.build("lenet", (3, 16, 16), CLASSES),
    "lenet, tanh": lambda: lenet(activation="tanh"),
    "leaky relu, no bias, stride 1": lambda: nn.Sequential(
        nn.Conv2d(1, 6, 3, padding=1, bias=False),
        nn.LeakyReLU(0.2),
        nn.Flatten(),
        nn.Linear(384, CLASSES),
    ),
    "mlp": lambda: models.build("mlp", SHAPE, CLASSES),
    "mlp, gelu, three layers": lambda: models.build(
        "mlp", SHAPE, CLASSES, depth=3, activation="gelu"
    ),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_recovers_every_pixel_label_and_learning_rate(name):
    torch.manual_seed(0)
    images = picture((3, 16, 16) if "colour" in name else SHAPE)
    found = exact.recover(train_locally(NETWORKS[name](), images, LABEL, learning_rate=0.01))
    assert torch.equal(eight_bit(found.images), eight_bit(images))
    assert found.labels.tolist() == LABEL.tolist()
    assert found.learning_rate == pytest.approx(0.01, rel=1e-6)
    assert found.k == pytest.approx(100, rel=1e-6)
    assert abs(found.learning_rate - 0.01) < 5 * found.client.learning_rate_error
    assert found.pixel_error.isfinite().all()
    assert found.identifiable == images.numel()
    assert found.stop_reason == "converged"
    assert found.verdict.startswith("determined")
    assert 0.5 < found.chi2 < 1.5
    assert mean_square((found.images - images) / found.pixel_error) < 4


@pytest.mark.parametrize("learning_rate", [1e-4, 1e-3, 0.1, 1.0])
def test_learning_rates_from_below_the_resolution_of_the_weights_to_one(learning_rate):
    images = picture()
    found = exact.recover(train_locally(lenet(), images, LABEL, learning_rate=learning_rate))
    assert torch.equal(eight_bit(found.images), eight_bit(images))
    assert found.learning_rate == pytest.approx(learning_rate, rel=1e-5)


def test_float64_snapshots_are_recovered_to_float64():
    images = picture().double()
    found = exact.recover(train_locally(lenet().double(), images, LABEL, learning_rate=0.01))
    assert found.learning_rate == pytest.approx(0.01, rel=1e-13)
    assert mean_square(found.images - images) < 1e-24
    assert found.bound_psnr > 240


@pytest.mark.parametrize("name", ["lenet", "lenet, three layers, colour"])
def test_the_bound_of_a_float64_client_is_what_recovery_reaches(name):
    model = NETWORKS[name]().double()
    images = picture(SHAPE if name == "lenet" else (3, 16, 16)).double()
    found = exact.recover(train_locally(model, images, LABEL, learning_rate=0.01))
    assert found.evidence.identifiable == found.evidence.directions
    assert found.bound_psnr == pytest.approx(
        -10 * math.log10(mean_square(found.images - images)), abs=3
    )


@pytest.mark.parametrize("index", range(3))
def test_a_float64_client_with_the_weights_of_pytorch_is_determined(index):
    """Where the client computes as finely as the attacker, the attacker's own arithmetic counts."""
    images, labels, *_ = data.load("cifar100", indices=[index])
    model = models.build("mlp", (3, 32, 32), 100, seed=index, init="default").double()
    found = exact.recover(train_locally(model, images.double(), labels, learning_rate=0.01))
    assert found.verdict.startswith("determined:")
    assert found.chi2 == pytest.approx(1, abs=0.2)
    assert mean_square(found.images - images) < 1e-31


@pytest.mark.parametrize("index", range(3))
def test_errors_are_those_at_the_image_that_was_found(index):
    """Of a trained network η hardly shows beside the image: a curvature of an earlier step left it
    an error of a negative square.
    """
    trial = Trial(
        "exact",
        dataset="lfw",
        index=index,
        seed=index,
        trained=5,
        client={"learning_rate": 0.01},
    )
    seen, image, _ = trials.observe(trial)
    found = exact.recover(seen)
    assert found.verdict.startswith("determined")
    reached = -10 * math.log10(mean_square(found.images - image))
    assert found.bound_psnr == pytest.approx(reached, abs=12)
    assert found.pixel_error.isfinite().all()


def test_noise_model_chi_square_and_spread_of_the_estimates_match_the_bound():
    model, images = lenet(depth=2), picture().double()
    layers = stacks.stack(model, SHAPE)
    deltas, inputs = recursion.signals(layers, LABEL[0], images.flatten())
    before = model.state_dict()
    chi2, pixels, rates = [], [], []
    for trial in range(200):
        # another learning rate, another rounding of every weight
        # it is so low that arithmetic, which is exact here, plays no part
        learning_rate = 2e-4 * (1 + 1e-4 * trial)
        after = {}
        for layer, delta, u in zip(layers, deltas, inputs):
            gradient = layer.gradient(delta, u)
            weight, bias = f"{layer.name}.weight", f"{layer.name}.bias"
            d_weight = gradient[:, :-1].reshape(before[weight].shape)
            after[weight] = (before[weight].double() - learning_rate * d_weight).float()
            after[bias] = (before[bias].double() - learning_rate * gradient[:, -1]).float()
        found = exact.recover(Observation(model, after, SHAPE, CLASSES))
        chi2.append(found.chi2)
        pixels.append(((found.images - images) / found.pixel_error).flatten())
        rates.append((found.learning_rate - learning_rate) / found.client.learning_rate_error)
    assert sum(chi2) / 200 == pytest.approx(1, abs=0.1)
    assert mean_square(torch.stack(pixels)) ** 0.5 == pytest.approx(1, abs=0.1)
    assert mean_square(torch.tensor(rates)) ** 0.5 == pytest.approx(1, abs=0.1)


def mlp():
    return models.build("mlp", SHAPE, CLASSES, activation="sigmoid")


def wide():
    """Layers with more outputs than parameters, a stride and a dilation, and one without a bias."""
    convolutions = (
        nn.Conv2d(1, 3, 3, padding=1),
        nn.Tanh(),
        nn.Conv2d(3, 2, 3, 2, 1, 2, bias=False),
        nn.Sigmoid(),
    )
    torch.manual_seed(0)
    return nn.Sequential(
        *convolutions, nn.Flatten(), nn.Linear(18, 7), nn.Tanh(), nn.Linear(7, CLASSES)
    ).double()


@pytest.mark.parametrize(
    "build, errors, largest",
    [(lenet, 0, 5000), (wide, 0, 5000), (wide, 0, 64), (mlp, 0, 5000), (mlp, 32, 5000)],
    ids=["many rows", "few rows", "too wide", "low rank", "errors of delta"],
)
def test_curvature_is_the_information_matrix(build, errors, largest, monkeypatch):
    """Against the plain Jacobian of the whole update, in all of its forms."""
    monkeypatch.setattr(information, "LARGEST", largest)
    generator = torch.Generator().manual_seed(0)
    layers = stacks.stack(build(), SHAPE)
    x, eta, error_variance = picture().double().flatten(), 0.3, 1e-4
    precision = torch.full_like(x, 1 / recursion.PRIOR_VARIANCE)
    if errors:
        x = torch.cat([x, 0.01 * torch.randn(errors, generator=generator, dtype=torch.float64)])
        precision = torch.cat(
            [precision, torch.full((errors,), 1 / error_variance, dtype=torch.float64)]
        )
    weights = [
        torch.rand(layer.weight.shape, generator=generator, dtype=torch.float64) * 1e3
        for layer in layers
    ]

    def update(x):
        deltas, inputs = recursion.signals(layers, LABEL[0], x)
        return torch.cat(
            [
                (w.sqrt() * eta * a.gradient(d, u)).flatten()
                for a, w, d, u in zip(layers, weights, deltas, inputs)
            ]
        )

    jacobian = torch.func.jacrev(update)(x)
    inverse = torch.linalg.inv(jacobian.T @ jacobian + precision.diag())
    curvature = information.curvature(layers, LABEL[0], weights, x, eta, error_variance)
    assert torch.allclose(
        curvature.solve(torch.eye(len(x)).double()), inverse, rtol=1e-8, atol=1e-10
    )
    assert torch.allclose(curvature.variance, inverse.diagonal()[:64], rtol=1e-8)


@pytest.mark.parametrize("largest", [5000, 50], ids=["counted", "not counted"])
def test_pixels_that_no_layer_sees_are_not_vouched_for(largest, monkeypatch):
    """A stride of two leaves three quarters of them, and more equations than pixels."""
    monkeypatch.setattr(information, "LARGEST", largest)
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(1, 8, 1, stride=2), nn.Sigmoid(), nn.Flatten(), nn.Linear(8 * 16, CLASSES)
    )
    for weights in network.parameters():
        nn.init.uniform_(weights, -0.5, 0.5)
    seen = train_locally(network, picture((1, 8, 8)), LABEL, learning_rate=0.05)
    found = exact.recover(seen)
    assert found.evidence.explains is Explains.PARTLY and not found.vouched.any()
    assert "partly determined" in found.verdict and "nan" not in found.verdict


def test_a_raised_ridge_leaves_what_is_known_and_what_is_open_as_it_is():
    """A channel that the update tells nothing of keeps the prior's variance, however precise the
    weights that tell of the other one.
    """
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(2, 4, 3), nn.Sigmoid(), nn.Flatten(), nn.Linear(144, CLASSES))
    with torch.no_grad():
        network[0].weight[:, 1] = 0
    layers = stacks.stack(network.double(), (2, 8, 8))
    weights = [torch.ones_like(layer.weight) for layer in layers]
    weights[0][:, 9:18] = 0  # the second channel's
    x = picture((2, 8, 8)).double().flatten()

    def variance(precision):
        scaled = [precision * each for each in weights]
        return information.curvature(layers, LABEL[0], scaled, x, 0.1, 1e-4).variance

    plain, raised = variance(1e12), variance(1e24)
    assert torch.allclose(1e12 * raised[:64], plain[:64], rtol=1e-3)
    prior = torch.full_like(x[64:], recursion.PRIOR_VARIANCE)
    assert torch.allclose(plain[64:], prior) and torch.allclose(raised[64:], prior)


@pytest.mark.parametrize("learning_rate", [0.01, 0.1, 1.0])
def test_an_mlp_reaches_the_bound_where_the_clients_arithmetic_and_not_the_transmission_limits_it(
    learning_rate,
):
    """Rows and columns of the gradient share errors of float32: as independent, they mislead."""
    ratios, chi2 = [], []
    for seed in range(8):
        images = picture((3, 16, 16), seed)
        model = models.build("mlp", (3, 16, 16), CLASSES, seed=seed)
        seen = train_locally(model, images, LABEL, learning_rate=learning_rate)
        found = exact.recover(seen)
        ratios.append(mean_square(found.images - images) / mean_square(found.pixel_error))
        chi2.append(found.chi2)
    assert sorted(ratios)[4] < 1.3
    assert sorted(chi2)[4] == pytest.approx(1, abs=0.1)


def test_signals_give_the_gradient():
    model, images = lenet().double(), picture().double()
    expected = torch.autograd.grad(federated.loss(model(images), LABEL), list(model.parameters()))
    layers = stacks.stack(model, SHAPE)
    deltas, inputs = recursion.signals(layers, LABEL[0], images.flatten())
    for layer, delta, u, weight, bias in zip(layers, deltas, inputs, expected[::2], expected[1::2]):
        assert torch.allclose(
            layer.gradient(delta, u),
            torch.cat([weight.flatten(1), bias[:, None]], dim=1),
            atol=1e-14,
        )


def test_weight_decay_is_fitted_where_asked_for_and_noticed_where_not():
    images = picture()
    seen = train_locally(
        lenet(), images, LABEL, learning_rate=0.01, optimizer_options={"weight_decay": 5e-4}
    )
    found = exact.recover(seen, weight_decay=True)
    assert found.client.weight_decay == pytest.approx(5e-4, rel=1e-4)
    assert torch.equal(eight_bit(found.images), eight_bit(images))
    assert exact.recover(seen).verdict.startswith("not to be trusted")


@pytest.mark.parametrize(
    "number, training",
    [
        (1, {"local_steps": 2}),
        (1, {"local_steps": 5}),
        (2, {}),
        (1, {"local_steps": 2, "optimizer_options": {"momentum": 0.9}}),
    ],
    ids=["two steps", "five steps", "a batch", "momentum"],
)
def test_violated_assumptions_are_said_so(number, training):
    images = torch.cat([picture(seed=i) for i in range(number)])
    found = exact.recover(
        train_locally(lenet(), images, LABEL.repeat(number), learning_rate=0.01, **training)
    )
    assert found.chi2 > 100
    assert found.verdict.startswith("not to be trusted")
    assert found.bound_psnr != found.bound_psnr  # NaN: no claim


def test_of_a_client_that_is_refuted_nothing_is_told():
    seen = train_locally(lenet(), picture(), LABEL, learning_rate=0.01, local_steps=2)
    found = exact.recover(seen, weight_decay=True)
    assert found.grade is exact.Grade.REFUTED and not found.vouched.any()
    assert found.client == ClientEstimate()


def test_weight_decay_is_told_only_where_it_was_asked_for():
    seen = train_locally(lenet(), picture(), LABEL, learning_rate=0.01)
    assert exact.recover(seen).weight_decay is None
    assert exact.recover(seen, weight_decay=True).weight_decay == pytest.approx(0, abs=1e-6)


def smoothed(model, images, labels, learning_rate, smoothing):
    """What one SGD step on smoothed labels sends."""
    client, before = copy.deepcopy(model), model.state_dict()
    nn.functional.cross_entropy(client(images), labels, label_smoothing=smoothing).backward()
    after = {
        name: (w - learning_rate * p.grad).detach()
        for (name, p), w in zip(client.named_parameters(), before.values())
    }
    return federated.observe(model, before, after, SHAPE)


@pytest.mark.parametrize("name", ["lenet", "mlp"])
def test_with_two_classes_a_rate_has_no_error_and_the_verdict_says_what_is_assumed(name):
    """A smoothed label gives the update of a hard one at another η: no residual can tell."""
    model = models.build(name, SHAPE, 2)
    found = exact.recover(smoothed(model, picture(), torch.tensor([1]), 0.01, smoothing=0.1))
    assert 0.3 < found.chi2 < 4 and abs(found.learning_rate / 0.01 - 1) > 0.05
    assert found.learning_rate_error is None
    assert "η is that of a hard label" in found.verdict
    hard = exact.recover(train_locally(model, picture(), torch.tensor([1]), learning_rate=0.01))
    assert hard.learning_rate == pytest.approx(0.01, rel=1e-6)
    assert hard.learning_rate_error is None and "hard label" in hard.verdict


def test_with_more_classes_a_smoothed_label_is_refuted():
    model = models.build("mlp", SHAPE, 3)
    found = exact.recover(smoothed(model, picture(), torch.tensor([1]), 0.01, smoothing=0.1))
    assert found.verdict.startswith("not to be trusted") and "another loss" in found.verdict


def test_softmax_regression_with_two_classes_is_not_said_to_show_one_image():
    """Its update has rank one for any batch: what is found is a blend."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 2))
    images = torch.cat([picture(seed=i) for i in range(4)])
    labels = torch.tensor([0, 1, 1, 0])
    found = exact.recover(train_locally(model, images, labels, learning_rate=0.01))
    assert 0.3 < found.chi2 < 4
    assert "if it was one image" in found.verdict and "need not be one image" in found.verdict
    assert not found.vouched.any()
    assert found.learning_rate_error is None


def defended(seen, change):
    return dataclasses.replace(
        seen, weights_after={name: change(w) for name, w in seen.weights_after.items()}
    )


def test_noise_of_a_defence_is_noticed_or_accounted_for():
    images, generator = picture(), torch.Generator().manual_seed(1)
    seen = train_locally(lenet(), images, LABEL, learning_rate=0.1)
    noisy = defended(seen, lambda w: w + 1e-5 * torch.randn(w.shape, generator=generator))
    assert exact.recover(noisy).verdict.startswith("not to be trusted")
    found = exact.recover(noisy, extra_variance=[1e-10] * 6)
    assert found.chi2 == pytest.approx(1, abs=0.1)
    assert mean_square((found.images - images) / found.pixel_error) < 2


def test_sparsified_coordinates_can_be_left_out():
    images = picture()
    seen = train_locally(lenet(), images, LABEL, learning_rate=0.1)
    sparse = defended(seen, lambda w: torch.where(w.abs() > w.abs().median(), w, 0))
    assert exact.recover(sparse).verdict.startswith("not to be trusted")
    found = exact.recover(sparse, trusted=[w != 0 for w in sparse.weights_after.values()])
    assert torch.equal(eight_bit(found.images), eight_bit(images))


@pytest.mark.parametrize("init", ["default", "paper"])
@pytest.mark.parametrize("build", ["mlp", "lenet"])
def test_sparsified_weights_and_biases_can_be_left_out_of_any_network(build, init):
    """A bias of 0 that is left out has no variance: 0 divided by 0 spoiled all the others."""
    images = picture()
    seen = train_locally(
        models.build(build, SHAPE, CLASSES, init=init), images, LABEL, learning_rate=0.1
    )
    sparse = defended(seen, lambda w: torch.where(w.abs() > w.abs().median(), w, 0))
    found = exact.recover(sparse, trusted=[w != 0 for w in sparse.weights_after.values()])
    assert torch.equal(eight_bit(found.images), eight_bit(images))
    assert found.learning_rate == pytest.approx(0.1, rel=1e-4)


def test_weights_of_zero_at_the_start_and_black_pixels_are_no_exact_observations():
    """A pruned network, biases of 0, units that are off: weights that are 0 before and after."""
    images = picture()
    images[..., :3] = 0.0
    model = models.build("mlp", SHAPE, CLASSES, init="default")
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(torch.rand(p.shape, generator=generator) < 0.5 if p.ndim > 1 else 0.0)
    found = exact.recover(train_locally(model, images, LABEL, learning_rate=0.1))
    assert found.verdict.startswith("determined")
    assert torch.equal(eight_bit(found.images), eight_bit(images))


def test_half_precision_on_the_way():
    images = picture()
    seen = train_locally(lenet(), images, LABEL, learning_rate=0.1)
    found = exact.recover(defended(seen, lambda w: w.half().float()), transmitted=torch.float16)
    assert found.chi2 == pytest.approx(1, abs=0.1)
    assert mean_square((found.images - images) / found.pixel_error) < 2


def test_directions_drowned_in_noise_are_counted_as_undetermined():
    images, generator = picture(), torch.Generator().manual_seed(1)
    seen = train_locally(lenet(), images, LABEL, learning_rate=0.1)
    noisy = defended(seen, lambda w: w + 3e-3 * torch.randn(w.shape, generator=generator))
    found = exact.recover(noisy, extra_variance=[9e-6] * 6)
    assert 0 < found.identifiable < 64
    assert found.verdict.startswith("partly determined")
    assert found.bound_psnr < 30


def few_equations():
    """A network whose update determines fewer directions than the image has."""
    convolution = nn.Conv2d(3, 2, 3, stride=2, padding=1)
    return nn.Sequential(convolution, nn.Sigmoid(), nn.Flatten(), nn.Linear(32, CLASSES))


def test_too_few_equations_are_completed_by_dlm_plus():
    images = picture((3, 8, 8))
    found = exact.recover(train_locally(few_equations(), images, LABEL, learning_rate=0.1))
    assert found.identifiable <= 2 * 28 + 32
    assert found.verdict.startswith("partly determined")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_with_few_equations_a_fit_that_explains_nothing_determines_nothing(dtype):
    """The linear layers are those of one step; the convolution's update is twice as long."""
    images, model = picture((3, 8, 8)).to(dtype), few_equations().to(dtype)
    seen = train_locally(model, images, LABEL, learning_rate=0.1)
    after = dict(seen.weights_after)
    after["0.weight"] = 2 * after["0.weight"] - seen.model.state_dict()["0.weight"]
    found = exact.recover(dataclasses.replace(seen, weights_after=after))
    assert found.chi2 > 1e6
    assert found.grade is exact.Grade.UNSETTLED and not found.vouched.any()
    assert found.verdict.startswith("unsettled: the fit ended before its image explained")
    assert found.learning_rate_error is None


def test_a_fit_that_was_cut_short_refutes_nothing():
    seen = train_locally(lenet(), picture(), LABEL, learning_rate=0.01)
    assert exact.recover(seen, max_steps=0).grade is exact.Grade.UNSETTLED
    assert exact.recover(seen).grade is exact.Grade.DETERMINED


def test_an_update_of_a_few_units_of_rounding_is_a_sentence():
    model = models.build("mlp", SHAPE, CLASSES, init="paper")
    said = "leaves too little to solve for the image: |the last layer did not change"
    tiny = train_locally(model, picture(), LABEL, learning_rate=1e-9)
    with pytest.raises(ValueError, match=said):
        exact.recover(tiny)
    with pytest.raises(torch.linalg.LinAlgError):  # which a trial records as its status
        exact.recover(tiny)
    for learning_rate in (1e-7, 1e-8):
        for name in ("lenet", "mlp"):
            network = models.build(name, SHAPE, CLASSES, init="paper")
            seen = train_locally(network, picture(), LABEL, learning_rate=learning_rate)
            try:
                found = exact.recover(seen)
            except ValueError as error:
                assert "too little" in str(error) or "did not change" in str(error)
            else:
                assert found.chi2 < 4 or not found.vouched.any()


def test_a_chi_square_far_below_one_is_said_in_every_branch():
    images, labels, *_ = data.load("digits", n=1)
    model = models.build("mlp", SHAPE, CLASSES, init="default")
    found = exact.recover(train_locally(model, images, labels, learning_rate=2e-9))
    assert found.chi2 < 0.3
    assert "so low, the noise was overstated" in found.verdict
    assert found.bound_psnr != found.bound_psnr and not found.vouched.any()


@pytest.mark.parametrize("shape", [(1, 1, 8), (1, 8, 1), (3, 1, 16), (1, 1, 1)])
@pytest.mark.parametrize("build", ["lenet", "mlp"])
def test_images_one_pixel_high_or_wide(build, shape):
    images = torch.rand(1, *shape, generator=torch.Generator().manual_seed(1))
    model = models.build(build, shape, CLASSES, init="default")
    found = exact.recover(train_locally(model, images, LABEL, learning_rate=0.01))
    assert found.verdict.startswith("determined")
    assert mean_square(found.images - images) < 1e-8


class Own(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(64, CLASSES)

    def forward(self, x):
        return self.fc(x.flatten(1))


@pytest.mark.parametrize(
    "model, words",
    [
        (lenet(activation="relu"), ["'1'", "ReLU", "Sigmoid"]),
        (
            nn.Sequential(
                nn.Conv2d(1, 2, 3), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(18, CLASSES)
            ),
            ["'1'", "MaxPool2d"],
        ),
        (
            nn.Sequential(
                nn.Conv2d(1, 2, 3, padding="same"), nn.Flatten(), nn.Linear(128, CLASSES)
            ),
            ["'0'", "Conv2d", "padding"],
        ),
        (models.build("resnet18", SHAPE, CLASSES), ["Residual", "nn.Sequential"]),
        (Own(), ["the model (Own) cannot be walked", "can be written as one"]),
    ],
)
def test_unsupported_layers_are_named(model, words):
    with pytest.raises(ValueError) as error:
        exact.recover(train_locally(model, picture(), LABEL, learning_rate=0.01))
    for word in words:
        assert word in str(error.value)


def test_the_observation_is_left_as_it_was():
    seen = train_locally(lenet(), picture(), LABEL, learning_rate=0.01)
    before = [p.clone() for p in seen.model.parameters()]
    first, second = exact.recover(seen), exact.recover(seen)
    assert all(torch.equal(p, q) for p, q in zip(before, seen.model.parameters()))
    assert all(p.grad is None for p in seen.model.parameters())
    assert torch.equal(first.images, second.images)


def test_the_closed_form_alone_is_worse_than_the_fit_and_near_it():
    images = picture()
    seen = train_locally(lenet(), images, LABEL, learning_rate=0.01)
    closed, fitted = exact.recover(seen, max_steps=0), exact.recover(seen)
    assert mean_square(fitted.images - images) < mean_square(closed.images - images) < 1e-3
    assert closed.learning_rate == pytest.approx(0.01, rel=1e-3)


@pytest.mark.parametrize("build", [lenet, mlp], ids=["lenet", "mlp"])
def test_the_bound_at_a_known_image_is_that_of_the_fit(build):
    images = picture()
    seen = train_locally(build(), images, LABEL, learning_rate=0.01)
    assert exact.recover(seen).bound_psnr == pytest.approx(
        exact.bound(seen, images, LABEL, 0.01), abs=1.0
    )


class Counting(dict):
    """A state dict that counts how often each entry is read."""

    def __init__(self, content):
        super().__init__(content)
        self.reads = Counter()

    def __getitem__(self, name):
        self.reads[name] += 1
        return super().__getitem__(name)


@pytest.mark.parametrize("build, shape", [(lenet, SHAPE), (mlp, SHAPE), (few_equations, (3, 8, 8))])
def test_delta_is_computed_once(build, shape, monkeypatch):
    """Label, closed form, fit and, where equations are few, DLM+ share the Observation's Δ."""
    computed = []
    compute = Observation.delta.func

    def counted(seen):
        computed.append(seen)
        return compute(seen)

    delta = cached_property(counted)
    delta.__set_name__(Observation, "delta")
    monkeypatch.setattr(Observation, "delta", delta)
    seen = train_locally(build(), picture(shape), LABEL, learning_rate=0.1)
    after = Counting(seen.weights_after)
    seen = dataclasses.replace(seen, weights_after=after)
    after.reads.clear()  # those of the checks at construction
    exact.recover(seen)
    assert len(computed) == 1
    assert set(after.reads) == set(seen.parameter_names)
    assert max(after.reads.values()) == 2  # once for Δ, once for the size of its rounding


def test_it_computes_on_one_thread_and_restores_the_callers_number(monkeypatch):
    seen = train_locally(lenet(), picture(), LABEL, learning_rate=0.01)
    threads, curvature = [], information.curvature

    def spied(*arguments):
        threads.append(torch.get_num_threads())
        return curvature(*arguments)

    monkeypatch.setattr(information, "curvature", spied)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        exact.recover(seen)
        assert set(threads) == {1}
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def fit_of(images):
    """A Gauss-Newton fit, not yet run, that starts near the client's image."""
    seen = train_locally(lenet(), images, LABEL, learning_rate=0.01)
    layers = stacks.stack(seen.model, SHAPE)
    noise = rounding.NoiseModel(seen, layers, LABEL[0])
    problem = likelihood.Problem(layers, LABEL[0], noise.update, noise.guess(), decays=False)
    start = likelihood.Start(images.double().flatten() + 1e-3, 0.0101)
    return likelihood.GaussNewton(problem, start, weigh=noise.at)


def test_a_fit_that_takes_no_step_still_has_a_curvature_and_a_loss():
    fit = fit_of(picture()).run(0)
    assert fit.status is Status.BUDGET
    assert len(fit.losses) == 1
    assert fit.curvature is not None


def test_a_fit_lowers_its_loss_to_the_noise_and_uses_a_curvature_for_several_steps(monkeypatch):
    computed = []
    curvature = information.curvature

    def counted(*arguments):
        computed.append(arguments)
        return curvature(*arguments)

    monkeypatch.setattr(information, "curvature", counted)
    images = picture()
    fit = fit_of(images).run(40)
    assert fit.status is Status.CONVERGED
    assert fit.losses[0] > 100 > 1.5 > fit.losses[-1]
    assert torch.equal(eight_bit(fit.point.x), eight_bit(images).flatten())
    assert 0 < len(computed) < len(fit.losses)


@pytest.mark.parametrize("fresh", [True, False])
def test_where_nothing_is_better_a_fresh_curvature_ends_the_fit_and_a_used_one_is_replaced(fresh):
    fit = fit_of(picture())
    fit.refresh()
    fit.fresh = fresh
    fit.point = dataclasses.replace(fit.point, merit=-1.0)
    assert fit.step() is (Status.STALLED if fresh else None)
    assert (fit.curvature is None) is not fresh


@pytest.mark.parametrize(
    "change, words",
    [
        ({"learning_rate": 0.0}, "learning_rate is 0.0"),
        ({"learning_rate": -1.0}, "learning_rate is -1.0"),
        ({"learning_rate": float("nan")}, "learning_rate is nan"),
        ({"images": 255 * picture()}, "pixels in"),
        ({"labels": torch.tensor([10])}, "the model has 10 classes"),
        ({"images": picture((3, 8, 8))}, r"images has shape \[1, 3, 8, 8\]"),
        ({"labels": torch.tensor([1, 2])}, r"labels has shape \[2\]"),
    ],
)
def test_the_bound_refuses_what_the_client_cannot_have_had(change, words):
    images = picture()
    seen = train_locally(mlp(), images, LABEL, learning_rate=0.01)
    given = {"images": images, "labels": LABEL, "learning_rate": 0.01}
    with pytest.raises(ValueError, match=words):
        exact.bound(seen, **given | change)


@pytest.mark.parametrize("argument", ["trusted", "extra_variance"])
def test_a_list_that_does_not_fit_the_parameters_is_refused(argument):
    seen = train_locally(mlp(), picture(), LABEL, learning_rate=0.01)
    with pytest.raises(ValueError, match=f"{argument} has 1 entries; the model has 4 parameters"):
        exact.recover(seen, **{argument: [torch.ones(1, dtype=torch.bool)]})


@pytest.mark.parametrize(
    "given, words",
    [
        ({"extra_variance": [-1e-10] * 4}, "extra_variance .* not -1e-10 in it"),
        ({"extra_variance": [float("nan")] * 4}, "extra_variance .* not nan in it"),
        ({"extra_variance": [torch.tensor([-1.0])] * 4}, "extra_variance"),
        ({"extra_variance": [torch.ones(3)] * 4}, r"extra_variance has a tensor of shape \[3\]"),
        ({"trusted": [torch.ones(())] * 4}, "trusted"),
        ({"trusted": [torch.ones(7) > 0] * 4}, r"trusted has a tensor of shape \[7\]"),
        ({"transmitted": torch.int8}, "transmitted is torch.int8"),
        ({"weight_decay": 5e-4}, "weight_decay is 0.0005; it takes True or False"),
    ],
)
def test_what_cannot_be_of_a_client_is_refused(given, words):
    seen = train_locally(mlp(), picture(), LABEL, learning_rate=0.01)
    with pytest.raises(ValueError, match=words):
        exact.recover(seen, **given)


def test_a_transmission_finer_than_the_weights_adds_no_precision():
    seen = train_locally(mlp(), picture(), LABEL, learning_rate=0.01)
    plain = exact.recover(seen)
    for dtype in (torch.float32, torch.float64):
        assert torch.equal(plain.images, exact.recover(seen, transmitted=dtype).images)


def test_a_frozen_layer_is_named(small, digit):
    for parameter in small[0].parameters():
        parameter.requires_grad_(False)
    seen = federated.train_locally(small, *digit, learning_rate=0.05)
    with pytest.raises(ValueError, match=r"layer '0' \(Conv2d\) is frozen"):
        exact.recover(seen)
    with pytest.raises(ValueError, match=r"layer '0' \(Conv2d\) is frozen"):
        exact.bound(seen, *digit, learning_rate=0.05)


def test_a_linear_layer_on_a_part_of_its_input_is_named():
    layers = nn.Linear(8, 16), nn.Tanh(), nn.Flatten(), nn.Linear(48, 10)
    seen = train_locally(
        nn.Sequential(*layers), torch.rand(1, 3, 1, 8), torch.tensor([1]), learning_rate=0.01
    )
    with pytest.raises(ValueError, match="is applied to a part of its input at a time"):
        exact.recover(seen)


def test_the_loss_of_a_fit_that_is_cut_short_is_that_of_its_image():
    images, labels, *_ = data.load("digits", n=1)
    model = models.build("lenet", (1, 8, 8), 10, seed=0)
    seen = train_locally(model, images, labels, learning_rate=0.01)
    cut = exact.recover(seen, max_steps=1)
    assert len(cut.losses) == 2 and cut.loss == cut.losses[-1] < cut.losses[0]


@pytest.mark.parametrize("told", ["half", "bytes", ([0.485], [0.229])])
def test_the_prior_is_of_pixels_whatever_the_network_sees_of_them(told):
    """A network that divides by 255 made a picture of 9 dB one of 60, by its bound."""
    images, labels, *_ = data.load("digits", n=1)
    torch.manual_seed(0)
    # 14 equations for 64 pixels
    layers = nn.Conv2d(1, 1, 3, stride=4), nn.Sigmoid(), nn.Flatten(), nn.Linear(4, 10)
    model = preprocessing.normalised(nn.Sequential(*layers), told)
    seen = train_locally(model, images, labels, learning_rate=0.01)
    assert exact.bound(seen, images, labels, learning_rate=0.01) < 14
    found = exact.recover(seen)
    assert 0.2 < float(found.pixel_error.median()) < 0.3
