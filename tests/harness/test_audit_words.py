"""What an audit says is true of the clients that its words were too wide for."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from dlm_core import models
from dlm_core.beyond import inputs
from dlm_core.beyond.preprocessing import KNOWN
from dlm_core.harness import leaks, pictures
from dlm_core.harness.look import first_look
from dlm_core.observation import observe
from tests.harness.audited import IMAGES, LABELS, SHAPE, asked, linear, network, snapshots

MLP = (linear(64, 48), nn.ReLU, linear(48, 10))


def test_of_a_contrastive_pair_a_difference_stands_in_the_update():
    model = network(linear(64, 1))
    both = IMAGES[:2]

    def apart(scores, _):
        return nn.functional.softplus(scores[0] - scores[1]).sum()

    (only,) = inputs.read(model, snapshots(model, both, LABELS[:2], apart)[1], SHAPE)
    difference = (both[0] - both[1]).flatten().double()
    cosine = nn.functional.cosine_similarity(only.values, difference, 0)
    assert cosine.abs() > 0.9999 and "or a difference between them" in only.sentence


@pytest.mark.parametrize("factor", [600.0, 1.5, 0.3])
def test_weights_that_were_scaled_are_not_said_to_have_decayed(factor):
    model = network(*MLP)
    after = {name: factor * w for name, w in snapshots(model)[1].items()}
    first, *_ = inputs.read(model, after, SHAPE)
    assert f"weights that were scaled by {factor:.3g}, which is no weight decay" in first.sentence


def test_a_rate_read_off_a_batch_says_of_how_many_images(tmp_path, capsys):
    model = network(*MLP)
    sent = snapshots(model, IMAGES[:2], LABELS[:2])
    found = asked(model, sent, tmp_path, num_images=2, attack="exact_batch")
    assert found["exact_batch"].learning_rate == pytest.approx(0.1, rel=1e-3)
    assert (
        "learning rate 0.1, if the loss is plain cross-entropy and a step had 2 images and no more"
        in capsys.readouterr().out
    )
    asked(model, snapshots(model), tmp_path, attack="exact")
    assert "a step had" not in capsys.readouterr().out


@pytest.mark.parametrize("told", ["imagenet", "half", "bytes", "mnist"])
def test_pixels_of_no_levels_show_that_nothing_was_normalised(told):
    normalise = KNOWN[told]
    draw = torch.Generator().manual_seed(0)
    seen = torch.rand(1, len(normalise.mean), 8, 8, generator=draw, dtype=torch.float64)
    said = pictures.suspicion(normalise.pixels(seen), normalise)
    assert "the client did not normalise its images, perhaps" in said
    assert pictures.suspicion(seen, normalise) is None  # of one that did
    assert pictures.suspicion(seen, None) is None


def test_grey_in_place_of_images_not_found_is_no_sign_of_preprocessing():
    """Under Fashion-MNIST's constants 0.5 is a whole grey level, as digits in [0, 1] are not."""
    mostly_grey = torch.full((8, 1, 8, 8), 0.5, dtype=torch.float64)
    mostly_grey[3] = IMAGES[0]
    assert pictures.suspicion(mostly_grey, None) is None
    draw = torch.Generator().manual_seed(0)
    levels = torch.randint(256, (1, 8, 8), generator=draw).double() / 255
    mostly_grey[3] = KNOWN["fashion_mnist"].values(levels[None])[0]
    assert "normalised its images as fashion_mnist" in pictures.suspicion(mostly_grey, None)


def test_what_was_not_tried_is_said_in_short_sentences():
    for each in leaks.missing():
        assert all(len(sentence) < 200 for sentence in each.why.split(". "))


def test_black_pixels_are_said_in_a_sentence_of_their_own():
    model = network(*MLP)
    first, *_ = inputs.read(model, snapshots(model)[1], SHAPE)
    stands, zeros, black = first.sentence.split(". ")
    assert stands.startswith("the input of layer '1' (the image, 64 numbers) stands in the update")
    assert zeros.endswith("are 0, as their weights did not move")
    assert black == "They are black, unless the client did not train them"


def looked(model, sent, num_images=1):
    """(the Observation, the first look) of two snapshots."""
    seen = observe(model, *sent, SHAPE)
    return seen, first_look(seen, num_images, {})


def changed(sent, how):
    """The same two snapshots, the update of each tensor changed on its way."""
    before, after = sent
    return before, {name: w + how(after[name] - w) for name, w in before.items()}


def noise(update):
    draw = torch.Generator().manual_seed(0)
    return update + torch.randn(update.shape, generator=draw) * update.square().mean().sqrt()


def largest(update):
    return update * (update.abs() >= update.abs().flatten().topk(update.numel() // 10).values[-1])


def signs(update):
    return update.sign() * update.abs().mean()


def bits(update):
    step = update.abs().max() / 127
    return (update / step).round() * step


@pytest.mark.parametrize("classes, count", [(3, 2), (10, 8)])
def test_labels_are_not_claimed_of_files_that_may_have_changed_places(classes, count):
    model = network(MLP[0], nn.ReLU, linear(48, classes))
    images = IMAGES.repeat(2, 1, 1, 1)[:count] * torch.linspace(0.5, 1, count)[:, None, None, None]
    sent = snapshots(model, images, torch.arange(count) // 2)
    seen, look = looked(model, sent[::-1], count)
    said = leaks.of_label(seen, look)
    if said is not None:  # of the classes that are none of the labels
        assert "if the files have not changed places" in str(said)
    few = looked(network(*MLP), snapshots(network(*MLP), IMAGES[:2], LABELS[:2]), 2)
    assert "changed places" not in str(leaks.of_label(*few))


def test_a_label_by_rows_is_claimed_only_with_its_assumption():
    model = network(MLP[0], nn.ReLU, linear(48, 3, bias=False))
    features = torch.relu(model[1](IMAGES[:1].flatten(1)))[0].detach()
    scores = torch.tensor([0.95, 0.04, 0.01]).log()  # surer of class 0 than its smoothed label is
    with torch.no_grad():
        model[3].weight.copy_(torch.outer(scores, features / features.square().sum()))

    def smoothed(found, labels):
        return F.cross_entropy(found, labels, label_smoothing=0.1)

    after = snapshots(model, IMAGES[:1], torch.tensor([0]), smoothed)[1]
    said = leaks.of_rows(inputs.read(model, after, SHAPE), model, SHAPE)
    assert said.classes == (2,) and "labels are not smoothed" in str(said)


def test_a_last_layer_that_is_made_of_other_weights_ends_in_a_sentence(tmp_path, capsys):
    model = network(*MLP)
    nn.utils.parametrizations.weight_norm(model[3])
    found = asked(model, snapshots(model), tmp_path)
    assert "makes its weight or bias of other parameters" in capsys.readouterr().out
    assert "division" in found and found.look.shown


def test_signs_of_any_size_are_said_to_be_signs():
    model = network(*MLP)
    sent = changed(snapshots(model), signs)
    read = [each for each in inputs.read(model, sent[1], SHAPE) if each.values is not None]
    assert read and all("or only the signs of its numbers" in each.sentence for each in read)


def test_where_one_output_moved_noise_does_not_show():
    model = network(MLP[0], nn.ReLU, linear(48, 1))

    def binary(found, _):
        return F.softplus(found).sum()

    sent = changed(snapshots(model, loss=binary), noise)
    *_, last = inputs.read(model, sent[1], SHAPE)
    assert last.values is not None and "does not show where only one output moved" in last.sentence


@pytest.mark.parametrize("how", [noise, largest, signs, bits])
def test_of_entries_that_were_changed_it_is_said_that_they_may_have_been(how):
    model = network(*MLP)
    _, look = looked(model, changed(snapshots(model), how))
    assert "entries that were changed (noise" in " ".join(look.sentences)


def test_a_small_step_is_not_said_to_decay():
    model = network(*MLP)
    _, look = looked(model, changed(snapshots(model), lambda update: 0.01 * update))
    assert look.optimizer == "sgd"
    _, decayed = looked(model, snapshots(model, weight_decay=5e-4))
    assert decayed.optimizer == "sgd with decay"


def test_of_a_last_bias_alone_no_input_is_said_to_be_told():
    model = network(*MLP)
    before, after = snapshots(model, IMAGES[:4], LABELS[:4])
    only = copy.deepcopy(before) | {"3.bias": after["3.bias"]}
    _, look = looked(model, (before, only), 4)
    assert "tells no more than its inputs and the labels" in " ".join(look.sentences)


@pytest.mark.parametrize("kind", ["division", "exact"])
def test_one_image_of_which_two_were_told_is_found(kind, tmp_path):
    model = models.build("lenet", SHAPE, 10, seed=0)
    model = network(MLP[0], nn.Sigmoid, MLP[2]) if kind == "division" else model
    found = asked(model, snapshots(model), tmp_path, num_images=2)
    assert found.verdict == "leaked" and list(found) == [kind]
    assert all("does not look like" not in each.why for each in found.untried)
