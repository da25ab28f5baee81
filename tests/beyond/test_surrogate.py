"""Attacks that take the gradient at a point between the snapshots, against their equations."""

import copy

import pytest
import torch

from dlm_core import attacks, coordinates, data, federated, metrics, objectives
from dlm_core.beyond import epochs, surrogate


@pytest.fixture
def client(small, device):
    """Four digits in two shuffled epochs of two batches: what is seen, images, labels."""
    images, labels, *_ = data.load("digits", n=4)
    images, labels = images.to(device), labels.to(device)
    clients = list(zip(images.split(1), labels.split(1)))
    about = {"batch_size": 2, "num_epochs": 2, "order": 3}
    return epochs.shuffled(small, clients, learning_rate=0.01, **about), images, labels


def between(seen, alpha, bend=None):
    """A network with the weights at α, made without the module under test."""
    model = copy.deepcopy(seen.model).double()
    after = [seen.weights_after[name].double() for name, _ in model.named_parameters()]
    with torch.no_grad():
        for i, (parameter, end) in enumerate(zip(model.parameters(), after)):
            start = parameter.clone()
            if bend is None:
                parameter.copy_((1 - alpha) * start + alpha * end)
            else:
                control = (start + end) / 2 + bend[i]
                parameter.copy_(
                    (1 - alpha) ** 2 * start + 2 * alpha * (1 - alpha) * control + alpha**2 * end
                )
    return model


def gradient(model, images, labels):
    value = federated.loss(model(images.double()), labels)
    return torch.autograd.grad(value, list(model.parameters()))


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_the_point_lies_on_the_segment_and_the_gradient_is_taken_there(client, alpha):
    seen, images, labels = client
    model = copy.deepcopy(seen.model).double()
    weights = surrogate.on_segment(
        list(model.parameters()), seen.delta, torch.tensor(alpha, requires_grad=True)
    )
    found = surrogate.gradient_at(model, federated.loss, images.double(), labels, weights)
    for ours, true in zip(found, gradient(between(seen, alpha), images, labels)):
        torch.testing.assert_close(ours.detach(), true)


def test_the_curve_is_bezier_s(client):
    seen, *_ = client
    before = list(copy.deepcopy(seen.model).double().parameters())
    bend = [torch.randn_like(layer) for layer in before]
    found = surrogate.on_curve(before, seen.delta, bend, 0.3)
    for ours, true in zip(found, between(seen, 0.3, bend).parameters()):
        torch.testing.assert_close(ours, true)


def test_sme_s_loss_is_the_published_one(client):
    seen, images, labels = client
    found = surrogate.sme(
        seen, num_images=4, labels=labels, max_evaluations=1, total_variation=0.02, seed=7
    )
    generator = torch.Generator().manual_seed(7)
    start, _ = coordinates.pixels(images.shape, seen.delta[0], generator)
    start = start.clamp(0, 1)
    g = torch.cat([layer.flatten() for layer in gradient(between(seen, 0.5), start, labels)])
    d = torch.cat([layer.flatten() for layer in seen.delta])
    height, width = (start.diff(dim=dim).abs().mean() for dim in (2, 3))
    published = 1 - g @ d / g.norm() / d.norm() + 0.04 * (height + width) / 2
    assert found.losses[0] == pytest.approx(float(published), rel=1e-9)


def test_its_authors_rates_and_ranges():
    images, alpha = torch.tensor([[0.5, 2.0]]), torch.tensor(0.9995)
    variables = [images.requires_grad_(), alpha.requires_grad_()]
    stepper = surrogate.PublishedAdam(variables, 8)

    def closure():
        images.grad, alpha.grad = torch.tensor([[-1e-9, 1.0]]), torch.tensor(-1.0)
        return torch.tensor(0.0)

    rates = []
    for _ in range(8):
        stepper.step(closure)
        rates.append([group["lr"] for group in stepper.param_groups])
        assert images.min() >= 0 and images.max() <= 1 and alpha <= 1
    expected = [1, 1, 0.1, 0.1, 0.01, 0.01, 1e-3, 1e-3]
    assert [rate / surrogate.CONTRAST for rate, _ in rates] == pytest.approx(expected)
    assert [own / 1e-3 for _, own in rates] == pytest.approx(expected)
    assert alpha == 1


@pytest.mark.parametrize("curved, gain", [(False, 3), (True, 0)])
def test_it_survives_an_order_that_dlm_plus_does_not(client, curved, gain):
    seen, images, labels = client
    about = {"num_images": 4, "labels": labels, "max_evaluations": 120}
    plain = attacks.dlm_plus(seen, **about)
    found = surrogate.surrogate_dlm(seen, curved=curved, **about)

    def psnr(images_found):
        order = metrics.match(images_found, images)
        return metrics.psnr(images_found[order], images, data_range=1.0)

    assert psnr(found.images) > psnr(plain.images) + gain
    assert 0 < found.point["alpha"] < 1
    control = [part for name, part in found.point.items() if name.startswith("control")]
    assert len(control) == curved * len(seen.delta) and all(part.any() for part in control)


def test_a_frozen_layer_is_left_out(client):
    seen, images, labels = client
    model = copy.deepcopy(seen.model).double()
    first = next(model.parameters()).requires_grad_(False)
    weights = surrogate.on_segment(list(model.parameters()), seen.delta, torch.tensor(0.5))
    g = surrogate.gradient_at(model, federated.loss, images.double(), labels, weights)
    assert g[0].shape == first.shape and not g[0].any() and g[2].any()


def test_a_penalty_is_added_to_the_distance():
    d = [torch.ones(2)]
    plain = objectives.squared_distance
    assert surrogate.with_penalties(plain)([torch.zeros(2), torch.tensor(5.0)], d) == 7
