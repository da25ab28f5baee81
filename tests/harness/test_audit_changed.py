"""Clients whose weights were changed after the step, adapters, wrapped networks, and statements on
other losses: an audit said nothing, or what does not hold, of them.
"""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from dlm_core.beyond import inputs
from dlm_core.harness import clues
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
    snapshots,
    trained,
)
from tests.networks import Standardised

LAYERS = (linear(64, 64), nn.ReLU, linear(64, 10))
COLOUR = (3, 16, 16)


def clamped(limit):
    return lambda w: w.clamp(-limit, limit)


def marked(share, size):
    """Noise on so many of the weights, as a watermark leaves it."""

    def change(w):
        chosen = torch.rand_like(w) < share
        return torch.where(chosen, w + size * torch.randn_like(w), w)

    return change


def changed_after(sent, change):
    before, after = sent
    changed = {n: change(w) if w.ndim > 1 else w for n, w in after.items()}
    return before, changed


@pytest.mark.parametrize("change", [clamped(0.1), marked(0.05, 0.01)], ids=["clamped", "marked"])
def test_an_image_is_read_from_the_weights_that_were_not_changed_after_the_step(change, tmp_path):
    model = network(*LAYERS)
    sent = seeded(lambda: changed_after(snapshots(model), change))
    found = asked(model, sent, tmp_path, attack="division")
    assert found.verdict == "partly" and not found["division"].vouched.any()
    assert psnr(found["division"].images, IMAGES[:1]) > 100
    assert "by the entries that agree on it" in found.look.layers[0].sentence


def test_numbers_on_which_entries_do_not_agree_are_counted_and_the_others_right(tmp_path):
    image, label = photograph()
    image = F.avg_pool2d(image, 2)
    model = network(linear(768, 64), nn.ReLU, linear(64, 10))
    sent = changed_after(snapshots(model, image, label), clamped(0.026))
    found = asked(model, sent, tmp_path, image_shape=COLOUR, attack="division")
    shown, layer = found["division"].images, found.look.layers[0]
    wrong = (shown - image).abs() > 1e-4
    assert layer.open > 0 and wrong.sum() <= layer.open
    assert bool((shown[wrong] == 0).all())
    assert f"On {layer.open} of them the entries do not agree: they are 0 here" in layer.sentence


@pytest.mark.parametrize("images", [1, 2])
def test_entries_that_noise_changed_all_show_nothing(images):
    model = network(*LAYERS)
    sent = seeded(
        lambda: changed_after(snapshots(model, IMAGES[:images], LABELS[:images]), marked(1.0, 0.01))
    )
    assert inputs.read(model, sent[1], SHAPE)[0].values is None


class Adapted(nn.Linear):
    """A frozen layer with two matrices beside it, as adapters of low rank are held."""

    def __init__(self, features, outputs):
        super().__init__(features, outputs)
        self.requires_grad_(False)
        self.down = nn.Parameter(torch.randn(4, features) / 8)
        self.up = nn.Parameter(torch.randn(outputs, 4) / 8)

    def forward(self, x):
        return F.linear(x, self.weight + self.up @ self.down, self.bias)


@pytest.mark.parametrize("image", range(3))
def test_an_adapter_shows_the_image_up_to_its_length(image, tmp_path):
    model = network(lambda: Adapted(64, 32), nn.ReLU, linear(32, 10))
    private = IMAGES[image : image + 1]
    sent = snapshots(model, private, LABELS[image : image + 1])
    found = asked(model, sent, tmp_path, attack="division")
    assert found.verdict == "partly" and not found["division"].vouched.any()
    assert psnr(found["division"].images, private / private.max()) > 90
    assert "layer '1.down' (the image, 64 numbers)" in found.look.layers[0].sentence


def test_an_adapter_that_training_shows_another_image_shows_none():
    model = network(lambda: nn.Dropout(0.3), lambda: Adapted(64, 32), nn.ReLU, linear(32, 10))
    layers = inputs.read(model, snapshots(model)[1], SHAPE)
    assert not any(each.pixels and each.values is not None for each in layers)


def test_an_adapter_of_a_batch_shows_no_image():
    model = network(lambda: Adapted(64, 32), nn.ReLU, linear(32, 10))
    layers = inputs.read(model, snapshots(model, IMAGES[:3], LABELS[:3])[1], SHAPE)
    assert not any(each.pixels and each.values is not None for each in layers)


@pytest.mark.parametrize("wrap", [torch.compile, nn.DataParallel])
def test_what_is_wrapped_around_a_network_is_left_off(wrap, tmp_path):
    model = network(*LAYERS)
    found = asked(wrap(model), snapshots(model), tmp_path)
    assert found.verdict == "leaked" and psnr(found["division"].images, IMAGES[:1]) > 100


@pytest.mark.parametrize("which", ["before", "after"])
@pytest.mark.parametrize("value", ["nan", "inf"])
def test_numbers_that_are_none_are_refused_by_name(which, value, tmp_path):
    model = network(*LAYERS)
    sent = dict(zip(("before", "after"), snapshots(model)))
    sent[which] = {name: w.clone() for name, w in sent[which].items()}
    sent[which]["1.weight"][0, 5] = float(value)
    with pytest.raises(ValueError, match=f"{which} holds NaN or infinity in '1.weight'"):
        asked(model, sent.values(), tmp_path)


def test_buffers_that_a_pass_moves_are_no_chance():
    layer = seeded(lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(64, 32)))
    model = nn.Sequential(nn.Flatten(), layer, nn.ReLU(), seeded(linear(32, 10)))
    assert not any("differ in train mode" in said for said in clues.of_network(model, SHAPE))
    model.append(nn.Dropout(0.5))
    assert any("differ in train mode" in said for said in clues.of_network(model, SHAPE))


def test_a_network_that_cannot_take_a_grey_image_draws_nothing():
    model = nn.Sequential(Standardised(), network(*LAYERS))
    assert not any("differ in train mode" in said for said in clues.of_network(model, SHAPE))


def test_files_are_not_said_to_be_swapped_where_the_last_bias_does_not_balance(tmp_path, capsys):
    model = network(linear(64, 64), nn.ReLU, linear(64, 4))
    target = torch.tensor([[0.1, 0.9, 0.2, 0.3]])
    low = seeded(lambda: torch.rand(1, 4)) - 2  # most outputs have to fall
    for aim in (target, low):
        asked(model, snapshots(model, targets=aim, loss=F.mse_loss), tmp_path, attack="division")
        assert "changed places" not in capsys.readouterr().out
    swapped = snapshots(model, targets=torch.tensor([1]))[::-1]
    asked(model, swapped, tmp_path, attack="division")
    assert "changed places" in capsys.readouterr().out


def test_a_step_of_gradients_is_not_called_one_of_rmsprop():
    model = seeded(
        lambda: nn.Sequential(
            nn.Conv2d(1, 8, 3, 1, 1), nn.Sigmoid(), nn.Flatten(), nn.Linear(512, 10)
        )
    )
    labels = torch.zeros(1, 10)
    labels[0, [2, 7]] = 1
    sent = snapshots(model, targets=labels, loss=F.binary_cross_entropy_with_logits)
    look = first_look(observe(model, *sent, SHAPE), 1, {})
    assert look.layers[-1].linear and look.optimizer == "several steps"


@pytest.mark.parametrize("classes", [1, 2])
def test_with_one_score_or_two_outputs_that_agree_may_show_sums_and_differences(classes, tmp_path):
    model = network(linear(64, 64), nn.ReLU, linear(64, classes))
    loss = F.binary_cross_entropy_with_logits if classes == 1 else F.cross_entropy
    targets = torch.tensor([[0.0], [1], [1]]) if classes == 1 else torch.tensor([0, 1, 1])
    sent = snapshots(model, IMAGES[:3], targets, loss)
    first = asked(model, sent, tmp_path, attack="division").look.layers[0]
    assert len(first.shared) > 1 and first.combined
    assert "or a sum or a difference of several" in first.sentence
    assert "images or mixtures" in first.sentence


def test_signs_that_decayed_weights_leave_are_said_to_be_signs(tmp_path):
    def adamw(client):
        return [torch.optim.AdamW(client.parameters(), lr=1e-3)]

    model = network(*LAYERS)
    found = asked(model, trained(model, adamw), tmp_path, attack="division")
    assert "or only the signs of its numbers" in found.look.layers[0].sentence
