"""Clients whose update looks like one input's and is a mixture, labels and rows that stand in it
all the same, and what was said of files in the right order.
"""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from dlm_core import data
from dlm_core.beyond import inputs
from dlm_core.harness import leaks, symmetries
from dlm_core.harness.foretell import Budget
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
    sgd,
    snapshots,
    trained,
)

DIGITS, CLASSES, *_ = data.load("digits", n=40)
ONES = DIGITS[CLASSES == 1][:3]
NETWORKS = {
    "one layer": (linear(64, 10),),
    "sigmoid": (linear(64, 48), nn.Sigmoid, linear(48, 10)),
    "ReLU": (linear(64, 48), nn.ReLU, linear(48, 10)),
}
named = pytest.mark.parametrize("layers", NETWORKS.values(), ids=NETWORKS)


def of_rank_one(client):
    """Make the gradient of each layer, weight and bias together, one of rank one."""
    for layer in client:
        if isinstance(layer, nn.Linear):
            both = torch.cat([layer.weight.grad, layer.bias.grad[:, None]], 1)
            left, sizes, right = torch.linalg.svd(both, full_matrices=False)
            both = sizes[0] * torch.outer(left[:, 0], right[0])
            layer.weight.grad, layer.bias.grad = both[:, :-1].clone(), both[:, -1].clone()


def of_ones(number):
    return ONES[:number], torch.ones(number, dtype=torch.int64)


@named
@pytest.mark.parametrize("number", [2, 3])
def test_a_mean_that_an_optimizer_of_low_rank_left_is_no_image(layers, number, tmp_path):
    model = network(*layers)
    sent = trained(model, sgd, *of_ones(number), change=of_rank_one)
    found = asked(model, sent, tmp_path, attack="division")
    assert found.verdict == "partly"
    assert max(psnr(found["division"].images, each[None]) for each in ONES[:number]) < 25
    assert not any("input" in each.what or "image" in each.what for each in found.leaks)


@named
def test_of_one_image_the_same_optimizer_hides_nothing(layers, tmp_path):
    model = network(*layers)
    sent = trained(model, sgd, *of_ones(1), change=of_rank_one)
    found = asked(model, sent, tmp_path, attack="division")
    assert found.verdict == "leaked" and psnr(found["division"].images, ONES[:1]) > 100


def quantiles(scores, targets):
    """The pinball loss of three quantiles, of targets above all of them."""
    return -(scores * torch.tensor([0.1, 0.5, 0.9])).sum(1).mean()


def weighed(scores, targets):
    """A loss of unequal slopes that no score changes."""
    return (scores * torch.linspace(-1, 2, scores.shape[1])).sum(1).mean()


@pytest.mark.parametrize(
    "layers, loss",
    [
        ((linear(64, 3),), quantiles),
        ((linear(64, 24), nn.ReLU, linear(24, 8), linear(8, 3)), quantiles),
        ((linear(64, 10),), weighed),
        ((linear(64, 24), nn.ReLU, linear(24, 10)), weighed),
    ],
)
def test_no_input_is_named_of_several_for_which_unequal_slopes_are_the_same(layers, loss):
    model = network(*layers)
    sent = snapshots(model, DIGITS[:8], CLASSES[:8], loss=loss)
    assert not any(each.alone for each in inputs.read(model, sent[1], SHAPE))


@pytest.mark.parametrize("loss", [focal, F.cross_entropy], ids=["focal", "cross-entropy"])
@named
def test_of_one_image_a_loss_that_follows_the_scores_is_believed(layers, loss, tmp_path):
    model = network(*layers)
    found = asked(model, snapshots(model, loss=loss), tmp_path, attack="division")
    assert found.verdict == "leaked" and psnr(found["division"].images, IMAGES[:1]) > 100


def convolutions():
    return network(
        lambda: nn.Unflatten(1, SHAPE),
        lambda: nn.Conv2d(1, 8, 3, padding=1),
        lambda: nn.BatchNorm2d(8),
        nn.ReLU,
        nn.Flatten,
        linear(512, 10),
    )


@pytest.mark.parametrize("decay", [0.0, 5e-4, 1e-3])
def test_labels_of_a_batch_stand_beside_weight_decay(decay, tmp_path):
    model = convolutions()
    sent = snapshots(model, IMAGES[:3], LABELS[:3], weight_decay=decay)
    found = asked(model, sent, tmp_path, num_images=3, minutes=0.02)
    (label,) = [each for each in found.leaks if each.what == "label"]
    assert set(label.classes) == set(LABELS[:3].tolist()) and found.verdict == "partly"
    assert ("if weight decay left" in str(label)) == (decay > 0)


@pytest.mark.parametrize("factor, told", [(1.0, True), (3.0, False)])
def test_a_decay_of_the_last_bias_is_that_of_its_weight(factor, told):
    """Of a bias that something else moved as a decay would, nothing is said."""
    model = convolutions()
    before, after = snapshots(model, IMAGES[:3], LABELS[:3], weight_decay=5e-4)
    after["6.bias"] -= (factor - 1) * 0.1 * 5e-4 * before["6.bias"]
    seen = observe(model, before, after, SHAPE)
    assert (leaks.of_label(seen, first_look(seen, 3, {})) is not None) == told


def test_no_decay_is_made_up_that_the_weight_does_not_tell_of():
    model = convolutions()
    before, after = snapshots(model, IMAGES[:3], LABELS[:3])
    after["6.bias"] -= 1e-2 * before["6.bias"]
    seen = observe(model, before, after, SHAPE)
    assert leaks.of_label(seen, first_look(seen, 3, {})) is None


def test_of_adam_s_signs_no_decay_is_taken_off():
    model = network(*NETWORKS["ReLU"])
    with torch.no_grad():
        model[3].bias.copy_(torch.linspace(0, 0.3, 10))
    sent = trained(model, lambda client: [torch.optim.Adam(client.parameters(), lr=1e-5)])
    seen = observe(model, *sent, SHAPE)
    label = leaks.of_label(seen, first_look(seen, 1, {}))
    assert label is not None and label.classes == (int(LABELS[0]),)


def test_an_image_of_one_row_is_not_another_upside_down():
    row = (1, 1, 24)
    model = network(
        lambda: nn.Unflatten(1, row),
        lambda: nn.Conv2d(1, 4, (1, 5), padding=(0, 2)),
        nn.Sigmoid,
        nn.Flatten,
        linear(96, 5),
    )
    image = torch.rand(1, *row, generator=torch.Generator().manual_seed(0))
    sent = snapshots(model, image, torch.tensor([2]))
    assert symmetries.against(observe(model, *sent, row)) is None


@pytest.mark.parametrize("classes, number", [(3, 2), (10, 4)])
def test_files_are_held_in_order_by_as_many_images_as_their_update_has(classes, number):
    model = network(linear(64, 48), nn.ReLU, linear(48, classes))
    before, after = snapshots(model, DIGITS[:number], torch.arange(number))
    seen = observe(model, before, after, SHAPE)
    assert not first_look(seen, 1, {}).swapped
    model.load_state_dict(after)
    turned = first_look(observe(model, after, before, SHAPE), 1, {})
    assert turned.swapped == (classes > 2 * number)


def test_a_transposed_weight_is_said_to_be_and_shows_nothing():
    model = network(linear(64, 64), nn.ReLU, linear(64, 10))
    before, after = snapshots(model)
    for each in (before, after):
        each["1.weight"] = each["1.weight"].T.clone()
    model.load_state_dict(before)
    first, last = inputs.read(model, after, SHAPE)
    assert first.values is None and "seems to be transposed" in first.sentence
    assert first.directions == 0 and last.alone and last.confirmed


def test_an_input_that_batch_norm_centres_in_training_is_whole():
    model = network(
        lambda: nn.Unflatten(1, SHAPE), lambda: nn.BatchNorm2d(1), nn.Flatten, linear(64, 10)
    )
    (layer,) = inputs.read(model, snapshots(model)[1], SHAPE)
    image = IMAGES[0].flatten().double()
    expected = (image - image.mean()) / (image.var(correction=0) + 1e-5).sqrt()
    assert torch.allclose(layer.values, expected, atol=1e-4) and not layer.centred


class Text(nn.Module):
    """Counts the words of a text; ``cast`` where it takes the numbers of an image for them."""

    def __init__(self, cast, padding=None):
        super().__init__()
        self.cast = cast
        self.words = nn.Embedding(200, 16, padding_idx=padding)
        self.head = nn.Linear(16, 4)

    def forward(self, x):
        x = x.flatten(1)
        return self.head(self.words(x.long() if self.cast else x).mean(1))


@pytest.mark.parametrize("cast", [True, False])
def test_the_rows_of_an_embedding_that_moved_are_named(cast, tmp_path):
    model = network(lambda: Text(cast))
    text = torch.randint(200, (1, 1, 1, 12), generator=torch.Generator().manual_seed(0))
    sent = snapshots(model, text, torch.tensor([1]))
    found = asked(model, sent, tmp_path, image_shape=(1, 1, 12), minutes=0.02)
    (rows,) = [each for each in found.leaks if "embedding" in each.what]
    assert found.verdict == "partly" and "'1.words'" in rows.what
    expected = sorted(set(text.flatten().tolist()))
    assert f"{len(expected)} of the 200 rows" in str(rows)
    assert ", ".join(map(str, expected)) + ":" in str(rows)


class Tied(Text):
    """Its head is its words, as a language model's."""

    def __init__(self):
        super().__init__(True)
        self.head = nn.Linear(16, 200)
        self.head.weight = self.words.weight


def padded():
    return Text(True, padding=0)


@pytest.mark.parametrize("make", [lambda: Text(True), padded], ids=["all rows", "a row of zeros"])
def test_of_an_embedding_that_decayed_whole_nothing_is_said(make):
    model = network(make)
    text = torch.arange(1, 13).reshape(1, 1, 1, 12)
    after = snapshots(model, text, torch.tensor([1]), weight_decay=0.1)[1]
    assert leaks.of_embeddings(model, after) == []


@pytest.mark.parametrize("rate", [0.1, 1e-4])
def test_of_an_embedding_that_is_the_head_as_well_nothing_is_said(rate):
    model = network(Tied)
    text = torch.arange(1, 13).reshape(1, 1, 1, 12)
    assert leaks.of_embeddings(model, snapshots(model, text, torch.tensor([1]), lr=rate)[1]) == []


def test_rows_that_half_precision_moved_are_not_named():
    model = network(padded)
    text = torch.arange(1, 13).reshape(1, 1, 1, 12)
    after = snapshots(model, text, torch.tensor([1]), lr=10.0)[1]
    halved = {name: w.half().float() for name, w in after.items()}
    (rows,) = leaks.of_embeddings(model, halved, torch.float16)
    assert "12 of the 200 rows" in str(rows)


@pytest.mark.parametrize("head", [lambda: nn.Conv1d(48, 10, 1), linear(48, 10)])
def test_an_image_stays_alone_whatever_kind_of_layer_the_head_is(head):
    class Headed(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.head = nn.Linear(64, 48), head()

        def forward(self, x):
            x = torch.sigmoid(self.first(x))
            one = isinstance(self.head, nn.Conv1d)
            return self.head(x[:, :, None])[:, :, 0] if one else self.head(x)

    model = network(Headed)
    (first,) = [each for each in inputs.read(model, snapshots(model)[1], SHAPE) if each.pixels]
    assert first.alone


def test_no_later_input_is_one_alone_where_the_pixels_have_several_directions():
    """Two of ten scores have slopes, which the last layer's update does not show to be several."""
    model = network(linear(64, 48), nn.ReLU, linear(48, 10))

    def two_scores(scores, targets):
        return F.cross_entropy(scores[:, :2] * torch.tensor([1.0, 0.5]), targets % 2)

    layers = inputs.read(
        model, snapshots(model, DIGITS[:4], CLASSES[:4], loss=two_scores)[1], SHAPE
    )
    assert layers[0].directions > 1 and not layers[1].alone


def test_the_division_is_given_however_little_time_there_is(tmp_path):
    assert Budget(1e-6).until("division", []) == math.inf
    model = network(*NETWORKS["ReLU"])
    found = asked(model, snapshots(model), tmp_path, minutes=1e-6)
    assert found.verdict == "leaked" and psnr(found["division"].images, IMAGES[:1]) > 100
    assert (tmp_path / "found.png").exists()
