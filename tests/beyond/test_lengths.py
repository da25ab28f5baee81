"""The length of a layer's input, where weight and bias had rates of their own."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from dlm_core import data, models
from dlm_core.beyond import inputs
from tests.harness.audited import asked, linear, network, seeded
from tests.networks import Tutorial

SHAPE = (1, 8, 8)
IMAGE, LABEL, *_ = data.load("digits", n=1)


def tutorial():
    return seeded(Tutorial)


def without_offsets():
    """Biases of 0, as many clients begin with: what leads to a multiple is a multiple."""
    model = network(linear(64, 32), nn.ReLU, linear(32, 10))
    for layer in (model[1], model[3]):
        nn.init.zeros_(layer.bias)
    return model


NETWORKS = {
    "lenet": models.build("lenet", SHAPE, 10, seed=1),
    "tutorial": tutorial(),
    "linear": network(linear(64, 10)),
    "mlp": network(linear(64, 32), nn.ReLU, linear(32, 10)),
    "mlp, biases 0": without_offsets(),
}


def plain(model):
    pass


def lars(model):
    for w in model.parameters():
        w.grad *= 0.05 * w.norm() / w.grad.norm()


def lars_but_biases(model):
    for name, w in model.named_parameters():
        w.grad *= 1 if name.endswith("bias") else 0.05 * w.norm() / w.grad.norm()


def faster(model):
    for name, w in model.named_parameters():
        w.grad *= 2 if name.endswith("bias") else 1


def clipped(model):
    for w in model.parameters():
        nn.utils.clip_grad_norm_([w], 0.05)


RATES = [lars, lars_but_biases, faster, clipped]


def sent(model, change, *, steps=1, loss=F.cross_entropy, target=LABEL):
    trained = copy.deepcopy(model)
    run = torch.optim.SGD(trained.parameters(), lr=0.1)
    for _ in range(steps):
        run.zero_grad()
        loss(trained(IMAGE), target).backward()
        change(trained)
        run.step()
    return copy.deepcopy(model.state_dict()), trained.state_dict()


def reached(model):
    """What really passes through each linear layer."""
    taken = {}
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear):
            layer.register_forward_hook(
                lambda _, given, __, name=name: taken.update({name: given[0][0].double()})
            )
    with torch.no_grad():
        model(IMAGE)
    return taken


@pytest.mark.parametrize("kind", NETWORKS)
@pytest.mark.parametrize("change", [plain, *RATES])
@pytest.mark.parametrize("steps", [1, 3])
def test_no_input_of_another_length_is_said_to_be_the_input(kind, change, steps):
    model = NETWORKS[kind]
    truth = reached(copy.deepcopy(model))
    for each in inputs.read(model, sent(model, change, steps=steps)[1], SHAPE):
        if each.values is None or not each.scaled:
            continue
        away = float((each.values - truth[each.name]).norm() / truth[each.name].norm())
        words = "or a multiple of it", "or a multiple or a projection", "is a multiple of the input"
        hedged = any(said in each.sentence for said in words)
        assert hedged or (each.confirmed and away < 10 * each.error)
        assert steps > 1 or hedged == (change is not plain)


LOSSES = {
    "softmax": (F.cross_entropy, LABEL),
    "smoothed": (lambda z, y: F.cross_entropy(z, y, label_smoothing=0.1), LABEL),
    "mixed": (F.cross_entropy, 0.7 * torch.eye(10)[[0]] + 0.3 * torch.eye(10)[[4]]),
    "several labels": (F.binary_cross_entropy_with_logits, torch.eye(10)[[1]] + torch.eye(10)[[4]]),
    "squared": (F.mse_loss, torch.eye(10)[[3]]),
}


@pytest.mark.parametrize("loss", LOSSES)
def test_one_rate_is_seen_whatever_the_loss(loss):
    how = dict(zip(("loss", "target"), LOSSES[loss]))
    model = NETWORKS["linear"]
    for change, seen in ((plain, True), (faster, False)):
        (only,) = inputs.read(model, sent(model, change, **how)[1], SHAPE)
        assert only.confirmed == seen


@pytest.mark.parametrize("change", RATES)
def test_an_image_of_unknown_brightness_has_not_leaked(change, tmp_path, capsys):
    found = asked(NETWORKS["linear"], sent(NETWORKS["linear"], change), tmp_path, attack="division")
    assert found.verdict == "partly" and not any(each.what == "image" for each in found.leaks)
    assert "nothing else in the update fixes its length" in capsys.readouterr().out
