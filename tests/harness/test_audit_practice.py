"""Clients as people train them, of which an audit said too much, too little or nothing at all."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from dlm_core import data, models
from dlm_core.beyond import inputs
from dlm_core.harness import leaks
from dlm_core.harness.look import first_look
from dlm_core.observation import observe
from tests.harness.audited import (
    IMAGES,
    LABELS,
    SHAPE,
    asked,
    linear,
    network,
    photograph,
    psnr,
    seeded,
    sgd,
    snapshots,
    trained,
)
from tests.networks import Tutorial

MLP = (linear(64, 32), nn.ReLU, linear(32, 10))
COLOUR = (3, 32, 32)


def test_a_frozen_head_takes_nothing_from_the_layers_in_front_of_it(tmp_path):
    model = seeded(Tutorial)
    model.fc3.requires_grad_(False)
    found = asked(model, snapshots(model), tmp_path, minutes=0.02)
    assert found.verdict == "partly" and found.look.unread is None
    shown = {each.name for each in found.look.layers if each.values is not None}
    assert shown == {"fc1", "fc2"}


@pytest.mark.parametrize("clipped", [False, True])
def test_dropout_hides_no_length_and_vouches_for_none(clipped, tmp_path):
    """Clipped tensor by tensor, weight and bias have two rates: the ratio is no image."""
    image, label = photograph()
    layers = (linear(3072, 64), nn.ReLU, nn.Dropout, linear(64, 10))
    model = network(*layers)

    def clip(client):
        most = 1.05 * float(client[4].weight.grad.norm())
        for w in client.parameters():
            nn.utils.clip_grad_norm_([w], most)

    sent = trained(model, sgd, image, label, clip if clipped else None)
    found = asked(model, sent, tmp_path, image_shape=COLOUR, attack="division")
    assert found.verdict == ("partly" if clipped else "leaked")
    assert (psnr(found["division"].images, image) > 100) == (not clipped)


@pytest.mark.parametrize("seed", range(4))
def test_arithmetic_in_half_precision_hides_no_image_and_no_label(seed):
    image, label = photograph()
    layers = (nn.Flatten, linear(3072, 64), nn.ReLU, linear(64, 10))
    model = seeded(lambda: nn.Sequential(*(each() for each in layers)), seed)
    client = copy.deepcopy(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = F.cross_entropy(client(image).float(), label)
    loss.backward()
    torch.optim.SGD(client.parameters(), lr=0.1).step()
    seen = observe(model, model.state_dict(), client.state_dict(), COLOUR)
    assert psnr(inputs.division(seen).images, image) > 50
    look = first_look(seen, 1, {})
    assert look.layers[1].halved and "or a mean of several inputs" in look.layers[1].sentence
    assert leaks.of_label(seen, look).classes == (int(label),)


def test_a_merged_adapter_s_direction_may_be_a_projection():
    model = network(*MLP)
    before = copy.deepcopy(model.state_dict())
    down = torch.randn(4, 64, generator=torch.Generator().manual_seed(0)) / 8
    up = torch.zeros(32, 4, requires_grad=True)
    first, last = model[1], model[3]
    h = F.linear(IMAGES[:1].flatten(1), first.weight.detach() + up @ down, first.bias.detach())
    F.cross_entropy(last(h.relu()), LABELS[:1]).backward()
    after = {name: w.detach().clone() for name, w in before.items()}
    after["1.weight"] -= 0.1 * up.grad @ down
    after["3.weight"] -= 0.1 * last.weight.grad
    after["3.bias"] -= 0.1 * last.bias.grad
    found = inputs.read(network(*MLP), after, SHAPE)[0]
    assert found.values is not None and found.image is None
    assert F.cosine_similarity(found.values, IMAGES[0].flatten().double(), 0).abs() < 0.9
    assert "or a projection of it, if the client trains adapters" in found.sentence


@pytest.mark.parametrize("batches", [1, 5])
def test_with_two_classes_no_rate_and_no_single_step_is_told(batches):
    images, labels, *_ = data.load("digits", n=20)
    model = models.build("lenet", SHAPE, 2, seed=1)
    client = copy.deepcopy(model)
    run = torch.optim.SGD(client.parameters(), lr=0.1)
    for part in range(batches):
        run.zero_grad()
        chosen = slice(4 * part, 4 * part + 4)
        F.cross_entropy(client(images[chosen]), labels[chosen] % 2).backward()
        run.step()
    look = first_look(observe(model, model.state_dict(), client.state_dict(), SHAPE), 4, {})
    said = "\n".join(look.sentences)
    assert "looks like" not in said and "with two classes any number of images" in said
    assert not look.learning_rate > 0


@pytest.mark.parametrize("front", [nn.Dropout, lambda: nn.BatchNorm2d(1)])
def test_what_training_changes_in_front_of_a_full_convolution_is_no_image(front, tmp_path):
    layers = (nn.Conv2d(1, 32, 8), nn.ReLU(), nn.Flatten(), nn.Linear(32, 10))
    model = seeded(lambda: nn.Sequential(front(), *layers))
    with pytest.raises(ValueError, match="does not apply"):
        asked(model, snapshots(model), tmp_path, attack="division")
    plain = nn.Sequential(*layers)
    found = asked(plain, snapshots(plain), tmp_path, attack="division")
    assert psnr(found["division"].images, IMAGES[:1]) > 100


class Margin(nn.Module):
    """A head that asks for labels in training."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU())
        self.head = nn.Linear(32, 10)

    def forward(self, x, labels=None):
        scores = self.head(self.body(x))
        return scores - 0.3 * F.one_hot(labels, 10) if self.training else scores


def test_a_network_that_asks_for_labels_in_training_is_read(tmp_path):
    model = seeded(Margin)
    client = copy.deepcopy(model).train()
    F.cross_entropy(client(IMAGES[:1], LABELS[:1]), LABELS[:1]).backward()
    torch.optim.SGD(client.parameters(), lr=0.1).step()
    sent = model.state_dict(), client.state_dict()
    found = asked(model, sent, tmp_path, minutes=0.02)
    assert found.verdict == "partly" and found.look.unread is None
    assert any("body.1" in str(each) for each in found.leaks)


def test_noise_is_seldom_taken_for_signs_that_tell_a_label():
    """A normal draw of three numbers has one sign against two, and sizes that are hardly alike."""
    said = 0
    for seed in range(20):
        model = seeded(lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 48), nn.Linear(48, 3)))
        before, after = snapshots(model, targets=torch.tensor([seed % 3]))
        draw = torch.Generator().manual_seed(seed)
        after = {n: w + 0.1 * torch.randn(w.shape, generator=draw) for n, w in after.items()}
        seen = observe(model, before, after, SHAPE)
        said += leaks.of_label(seen, first_look(seen, 1, {})) is not None
    assert said <= 4


class Cosines(nn.Module):
    """Features without bias, held against a vector for each class."""

    def __init__(self):
        super().__init__()
        layers = nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 4, bias=False)
        self.body = nn.Sequential(*layers)
        self.classes = nn.Parameter(torch.randn(10, 4))

    def forward(self, x):
        return 10 * F.normalize(self.body(x)) @ F.normalize(self.classes).T


@pytest.mark.parametrize("seed", range(4))
def test_rows_of_features_are_no_classes(seed, tmp_path):
    model = seeded(Cosines, seed)
    found = asked(model, snapshots(model), tmp_path, attack="division")
    assert not [each for each in found.leaks if each.what == "label"]


def test_an_image_in_front_of_frozen_batch_norm_is_read(tmp_path):
    model = network(linear(64, 32), lambda: nn.BatchNorm1d(32), nn.ReLU, linear(32, 10))
    client = copy.deepcopy(model).eval()
    F.cross_entropy(client(IMAGES[:1]), LABELS[:1]).backward()
    torch.optim.SGD(client.parameters(), lr=0.1).step()
    sent = model.state_dict(), client.state_dict()
    found = asked(model, sent, tmp_path, attack="division")
    assert psnr(found["division"].images, IMAGES[:1]) > 100


def test_a_direction_without_length_is_shown_up_to_its_length(tmp_path):
    model = network(linear(64, 32, bias=False), nn.ReLU, linear(32, 10))
    found = asked(model, snapshots(model), tmp_path, attack="division")
    assert found.verdict == "partly" and not found["division"].vouched.any()
    assert "stands in the update, up to its length" in found.look.layers[0].sentence
    assert psnr(found["division"].images, IMAGES[:1] / IMAGES[:1].max()) > 100


def test_a_whole_number_among_the_parameters_ends_nothing(tmp_path):
    model = network(*MLP)
    sent = snapshots(model)
    steps = nn.Parameter(torch.zeros(1, dtype=torch.int64), requires_grad=False)
    model.register_parameter("steps", steps)
    sent = [{**each, "steps": torch.tensor([k])} for k, each in enumerate(sent)]
    assert asked(model, sent, tmp_path).verdict == "leaked"


def test_features_that_were_left_out_behind_sigmoids_are_not_called_zero(tmp_path):
    model = models.build("lenet", SHAPE, 10, seed=1)
    sent = trained(model, sgd, change=lambda client: client[7].weight.grad[:, ::3].zero_())
    seen = observe(model, *sent, SHAPE)
    last = inputs.layer_inputs(seen)[-1]
    assert last.untrained and not last.alone
    assert f"but for {len(range(0, 48, 3))} of them" in last.sentence
