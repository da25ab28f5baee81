"""Clients that round, prune or thin their updates, whose images single outputs show, or whose
networks leave layers out: an audit said too much, too little or nothing of them.
"""

import copy
import json

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from dlm_core import data, models
from dlm_core.beyond import inputs
from dlm_core.harness import account
from dlm_core.harness.look import first_look
from dlm_core.observation import observe
from tests.harness.audited import (
    IMAGES,
    LABELS,
    SHAPE,
    asked,
    focal,
    linear,
    network,
    psnr,
    seeded,
    sgd,
    snapshots,
    trained,
)

LAYERS = (linear(64, 48), nn.ReLU, linear(48, 32), nn.ReLU, linear(32, 10))
COLOUR = (3, 32, 32)


def changed(model, change, images=IMAGES[:1], targets=LABELS[:1]):
    """(W_t, W_{t+1}) of one step of SGD with changed gradients."""

    def changes(client):
        for w in client.parameters():
            w.grad = change(w.grad)

    return trained(model, sgd, images, targets, changes)


def integers(bits, channels=False):
    """Rounding to signed integers, tensor by tensor or row by row of a weight."""
    most = 2 ** (bits - 1) - 1

    def change(g):
        if channels and g.ndim < 2:
            return g
        largest = g.abs().amax(1, keepdim=True) if channels else g.abs().max()
        step = largest.clamp(min=1e-20) / most
        return (g / step).round() * step

    return change


def relative(found, true):
    return float((found - true).norm() / true.norm())


@pytest.mark.parametrize("bits", [8, 7, 4])
@pytest.mark.parametrize("channels", [False, True])
@pytest.mark.parametrize("dataset", ["digits", "cifar100"])
def test_an_input_is_known_no_better_than_the_levels_of_its_update(bits, channels, dataset):
    image, label, *_ = data.load(dataset, n=1, source="bundled")
    model = network(linear(image.numel(), 48), nn.ReLU, linear(48, 10))
    sent = changed(model, integers(bits, channels), image, label % 10)
    found = inputs.read(model, sent[1], tuple(image.shape[1:]))[0]
    assert found.values is not None
    true = relative(found.values, image.flatten().double())
    assert true / 2 < found.error < 5 * true


def ranged(bits, with_zero):
    """Rounding to unsigned integers from the lowest number to the highest."""

    def change(g):
        low, high = g.min(), g.max()
        if with_zero:
            low, high = low.clamp(max=0), high.clamp(min=0)
        step = (high - low) / (2**bits - 1)
        offset = (low / step).round() * step if with_zero else low
        return ((g - offset) / step).round().clamp(0, 2**bits - 1) * step + offset

    return change


@pytest.mark.parametrize("with_zero", [True, False])
@pytest.mark.parametrize("dataset", ["digits", "cifar100"])
def test_an_input_is_read_from_levels_between_the_lowest_and_the_highest(with_zero, dataset):
    image, label, *_ = data.load(dataset, n=1, source="bundled")
    model = network(linear(image.numel(), 64), nn.ReLU, linear(64, 10))
    sent = changed(model, ranged(8, with_zero), image, label % 10)
    found = inputs.read(model, sent[1], tuple(image.shape[1:]))[0]
    assert found.values is not None and found.error < 0.01
    assert relative(found.values, image.flatten().double()) < 5 * found.error


@pytest.mark.parametrize("levels", [16, 128, 255])
def test_levels_of_an_image_are_none_of_its_update(levels):
    image = (IMAGES[:1] * (levels - 1)).round() / (levels - 1)
    model = network(*LAYERS)
    found = inputs.read(model, snapshots(model, image)[1], SHAPE)[0]
    assert found.alone and found.error < 1e-5


def largest_tenth(g):
    least = g.abs().flatten().topk(max(1, g.numel() // 10)).values[-1]
    return g * (g.abs() >= least)


def test_the_largest_tenth_of_an_update_shows_the_image(tmp_path):
    model = network(*LAYERS)
    found = asked(model, changed(model, largest_tenth), tmp_path, attack="division")
    assert found.verdict == "partly"
    kept = found["division"].images != 0
    assert kept.sum() > 25
    assert torch.allclose(found["division"].images[kept], IMAGES[:1].double()[kept], atol=1e-4)
    assert "they are 0, or left out" in found.look.layers[0].sentence


def test_the_image_of_a_pruned_network_is_read_where_few_weights_are_left(tmp_path):
    draw, model = torch.Generator().manual_seed(1), network(*LAYERS)
    masks = [(torch.rand(w.shape, generator=draw) < 0.3) | (w.ndim < 2) for w in model.parameters()]
    with torch.no_grad():
        for w, mask in zip(model.parameters(), masks):
            w *= mask

    def masked(client):
        for w, mask in zip(client.parameters(), masks):
            w.grad *= mask

    sent = trained(model, sgd, change=masked)
    found = asked(model, sent, tmp_path, attack="division")
    assert psnr(found["division"].images, IMAGES[:1]) > 80


@pytest.mark.parametrize("pair", [(0, 1), (2, 3)])
def test_two_images_in_two_groups_of_outputs_make_no_mosaic(pair):
    model = network(linear(64, 64), nn.ReLU, lambda: nn.Dropout(0.8), linear(64, 10))
    sent = snapshots(model, IMAGES[list(pair)], LABELS[list(pair)])
    found = inputs.read(model, sent[1], SHAPE)[0]
    assert found.values is None and found.image is None


class Skipped(nn.Module):
    """An MLP with a linear layer from the image to the scores beside it."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(64, 256), nn.Linear(256, 10)
        self.beside = nn.Linear(64, 10)

    def forward(self, x):
        x = x.flatten(1)
        return self.last(F.relu(self.first(x))) + self.beside(x)


@pytest.mark.parametrize("loss", [F.cross_entropy, F.multi_margin_loss])
def test_outputs_that_one_image_alone_moved_show_it(loss, tmp_path):
    model = seeded(Skipped)
    sent = snapshots(model, IMAGES[:4], LABELS[:4], loss)
    found = asked(model, sent, tmp_path, attack="division")
    assert found.verdict == "partly"
    shown = found["division"].images
    for image in IMAGES[:4]:
        assert max(psnr(each[None], image[None]) for each in shown) > 90
    assert not found["division"].vouched.any()
    assert "or a mean of several" in found.look.layers[0].sentence
    assert "tensor(" not in json.dumps(account.account(found))  # its pixels are no numbers to tell


def test_outputs_that_rounding_alone_makes_alike_show_nothing():
    model = seeded(Skipped)
    with torch.no_grad():
        for w in (model.last.weight, model.last.bias, model.beside.weight, model.beside.bias):
            w.zero_()  # all scores are the same, and so are most rows of the last layers
    sent = snapshots(model, IMAGES[:4], LABELS[:4])
    layers = inputs.read(model, sent[1], SHAPE)
    assert not any(each.shared for each in layers)


@pytest.mark.parametrize("steps", [1, 3])
def test_signs_that_outputs_agree_on_are_no_images(steps):
    model = seeded(Skipped)
    client = copy.deepcopy(model)
    run = torch.optim.Adam(client.parameters(), lr=1e-3)
    for _ in range(steps):
        run.zero_grad()
        F.cross_entropy(client(IMAGES[:4]), LABELS[:4]).backward()
        run.step()
    assert not any(each.shared for each in inputs.read(model, client.state_dict(), SHAPE))


class Depth(nn.Module):
    """A residual block that training leaves out by chance."""

    def __init__(self):
        super().__init__()
        self.first, self.block, self.last = (nn.Linear(*n) for n in ((64, 48), (48, 48), (48, 10)))

    def forward(self, x):
        z = F.relu(self.first(x.flatten(1)))
        if not self.training or torch.rand(()) < 0.5:
            z = z + F.relu(self.block(z))
        return self.last(z)


class Experts(nn.Module):
    """Each image passes through one of two experts."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(64, 48), nn.Linear(48, 10)
        self.experts = nn.ModuleList(nn.Linear(48, 48) for _ in range(2))

    def forward(self, x):
        z = F.relu(self.first(x.flatten(1)))
        return self.last(F.relu(self.experts[int(z[0, 0] > z[0, 1])](z)))


@pytest.mark.parametrize("kind", [Depth, Experts])
@pytest.mark.parametrize("seed", range(3))
def test_layers_that_a_pass_leaves_out_take_nothing_from_the_others(kind, seed, tmp_path):
    model = seeded(kind, seed)
    found = asked(model, snapshots(model), tmp_path, attack="division")
    assert found.look.unread is None and found.verdict == "leaked"
    assert psnr(found["division"].images, IMAGES[:1]) > 100


def test_weights_that_begin_at_zero_are_not_called_untrained():
    model = network(linear(64, 10))
    for w in model.parameters():
        nn.init.zeros_(w)
    found = inputs.read(model, snapshots(model)[1], SHAPE)[0]
    assert not found.untrained and found.still == int((IMAGES[0] == 0).sum())


@pytest.mark.parametrize("classes", [200, 1000])
def test_many_classes_are_taken_for_no_loss_of_constant_slopes(classes, tmp_path):
    model = network(linear(64, 48), nn.ReLU, linear(48, classes))
    found = asked(model, snapshots(model), tmp_path, attack="division")
    assert found.verdict == "leaked"
    blended = snapshots(model, IMAGES[[0, 0]], LABELS[[0, 0]] * 0, loss=F.multi_margin_loss)
    assert inputs.read(model, blended[1], SHAPE)[0].rank == 1
    assert not inputs.read(model, blended[1], SHAPE)[0].alone


def test_a_mixture_that_an_optimizer_of_low_rank_leaves_is_called_one():
    def leading(g):
        if g.ndim < 2:
            return g
        left, sizes, right = torch.linalg.svd(g, full_matrices=False)
        return sizes[0] * torch.outer(left[:, 0], right[0])

    model = network(*LAYERS)
    sent = changed(model, leading, IMAGES[[0, 2]], torch.tensor([3, 3]))
    found = inputs.read(model, sent[1], SHAPE)[0]
    assert found.bias_apart and "mixture of several inputs" in found.sentence


def test_a_learning_rate_is_that_of_a_loss(tmp_path, capsys):
    model = models.build("lenet", SHAPE, 10, seed=1)
    sent = snapshots(model, loss=focal, lr=0.01)
    found = asked(model, sent, tmp_path, attack="exact")
    assert found["exact"].learning_rate > 0.0105
    assert "learning rate 0.0105979, if the loss is plain cross-entropy" in capsys.readouterr().out
    look = first_look(observe(model, *sent, SHAPE), 1, {})
    assert any("if its loss is plain cross-entropy" in each for each in look.sentences)


def test_no_learning_rate_is_told_of_a_fit_that_explains_nothing(tmp_path):
    def two_rates(client):
        *body, weight, bias = client.parameters()
        return [torch.optim.SGD(body, lr=0.05), torch.optim.SGD([weight, bias], lr=0.1)]

    model = models.build("lenet", SHAPE, 10, seed=1)
    found = asked(model, trained(model, two_rates), tmp_path, attack="exact")
    assert found["exact"].learning_rate is None


class Vision(nn.Module):
    """A transformer of one block, with a class token if asked for, on patches of 2x2 pixels."""

    def __init__(self, token=False, convolves=False, width=32):
        super().__init__()
        self.embed = nn.Conv2d(1, width, 2, stride=2) if convolves else nn.Linear(4, width)
        self.token = nn.Parameter(torch.randn(1, 1, width)) if token else None
        self.position = nn.Parameter(0.02 * torch.randn(1, 16 + token, width))
        self.norm, self.last = nn.LayerNorm(width), nn.Linear(width, 10)
        self.q, self.k, self.v = (nn.Linear(width, width) for _ in range(3))

    def forward(self, x):
        if isinstance(self.embed, nn.Conv2d):
            z = self.embed(x).flatten(2).transpose(1, 2)
        else:
            z = self.embed(F.unfold(x, 2, stride=2).transpose(1, 2))
        if self.token is not None:
            z = torch.cat([self.token.expand(len(z), -1, -1), z], 1)
        z = z + self.position
        n = self.norm(z)
        z = z + (self.q(n) @ self.k(n).mT / 5).softmax(-1) @ self.v(n)
        return self.last(F.gelu(z).mean(1))


@pytest.mark.parametrize("how", [{}, {"token": True}, {"convolves": True}])
@pytest.mark.parametrize("loss", [F.cross_entropy, F.multi_margin_loss])
def test_learned_positions_show_the_patches_of_one_image(how, loss, tmp_path):
    model = seeded(lambda: Vision(**how))
    found = asked(model, snapshots(model, loss=loss), tmp_path, attack="division")
    assert psnr(found["division"].images, IMAGES[:1]) > 60
    assert found.verdict == "leaked"
    several = snapshots(model, IMAGES[:2], LABELS[:2], loss)
    assert not any(each.patches for each in inputs.read(model, several[1], SHAPE))


def test_patches_with_too_few_outputs_are_not_vouched_for(tmp_path):
    model = seeded(lambda: Vision(width=16))
    for images, labels in ((IMAGES[:1], LABELS[:1]), (IMAGES[:2], LABELS[:2])):
        layers = inputs.read(model, snapshots(model, images, labels)[1], SHAPE)
        shown = [each for each in layers if each.patches]
        assert not any(each.alone for each in shown)
        assert all("or a mean of several inputs" in each.sentence for each in shown)


def test_positions_of_a_client_with_adam_show_nothing():
    model = seeded(Vision)
    sent = trained(model, lambda client: [torch.optim.Adam(client.parameters(), lr=1e-3)])
    assert not any(each.patches for each in inputs.read(model, sent[1], SHAPE))
