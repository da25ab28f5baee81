"""What an audit says is true of the clients that its words were too wide for."""

import pytest
import torch
from torch import nn

from dlm_core.beyond import inputs
from dlm_core.beyond.preprocessing import KNOWN
from dlm_core.harness import leaks, pictures
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
    assert "learning rate 0.1, if a step had 2 images and no more" in capsys.readouterr().out
    asked(model, snapshots(model), tmp_path, attack="exact")
    assert "if a step had" not in capsys.readouterr().out


@pytest.mark.parametrize("told", ["imagenet", "half", "bytes", "mnist"])
def test_pixels_of_no_levels_show_that_nothing_was_normalised(told):
    normalise = KNOWN[told]
    draw = torch.Generator().manual_seed(0)
    seen = torch.rand(1, len(normalise.mean), 8, 8, generator=draw, dtype=torch.float64)
    said = pictures.suspicion(normalise.pixels(seen), normalise)
    assert "the client did not normalise its images, perhaps" in said
    assert pictures.suspicion(seen, normalise) is None  # of one that did
    assert pictures.suspicion(seen, None) is None


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
