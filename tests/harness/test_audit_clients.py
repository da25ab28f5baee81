"""Clients as people have them: what leaks is not called hidden, and no blend is called a leak."""

import copy
import threading
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from dlm_core import data, metrics, models
from dlm_core.beyond.batches import Reason
from dlm_core.harness.belief import believe
from dlm_core.results import Explains
from tests.harness.audited import IMAGES, LABELS, SHAPE, asked, linear, network, snapshots


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.head = network(linear(64, 32), nn.ReLU), nn.Linear(32, 10)

    def forward(self, images):
        hidden = self.body(images)
        return self.head(hidden), hidden


class Normed(nn.Sequential):
    def forward(self, images):
        return super().forward((images - 0.5) / 0.25)


def first(scores, labels):
    return F.cross_entropy(scores[0], labels)


MLP = (linear(64, 64), nn.ReLU, linear(64, 10))
BINARY = F.binary_cross_entropy_with_logits
SHOWN = {  # network, targets, loss
    "dropout": (network(MLP[0], nn.ReLU, nn.Dropout, MLP[2]), LABELS[:1], F.cross_entropy),
    "several labels": (network(*MLP), torch.eye(10)[[1]] + torch.eye(10)[[4]], BINARY),
    "no last bias": (
        network(*MLP[:2], linear(64, 10, bias=False)),
        LABELS[:1],
        F.cross_entropy,
    ),
    "a pair": (Pair(), LABELS[:1], first),
    "a forward of its own": (Normed(*network(*MLP)), LABELS[:1], F.cross_entropy),
    "squares": (network(*MLP), torch.eye(10)[[3]], F.mse_loss),
}


@pytest.mark.parametrize("kind", SHOWN)
def test_an_image_that_a_division_shows_has_leaked(kind, tmp_path, capsys):
    model, targets, loss = SHOWN[kind]
    found = asked(model, snapshots(model, IMAGES[:1], targets, loss), tmp_path)
    assert found.verdict == "leaked" and list(found) == ["division"]
    assert metrics.psnr(found["division"].images, IMAGES[:1], data_range=1.0) > 90
    assert "(the image, 64 numbers) stands in the update" in capsys.readouterr().out
    assert (tmp_path / "found.png").is_file()


def test_of_one_output_it_is_said_that_it_may_be_a_mean(tmp_path, capsys):
    model = network(linear(64, 32), nn.ReLU, linear(32, 1))
    sent = snapshots(model, IMAGES[:1], torch.ones(1, 1), BINARY)
    found = asked(model, sent, tmp_path, attack="division")
    assert found.verdict == "partly" and len(found.look.shown) == 2 and not found.leaks
    assert metrics.psnr(found["division"].images, IMAGES[:1], data_range=1.0) > 90
    said = capsys.readouterr().out
    assert "or a mean of several inputs" in said and "of one image or mixed of several" in said
    assert "leaked" not in said


def test_a_blend_of_two_images_is_no_leak(tmp_path, capsys):
    model = models.build("lenet", SHAPE, 10, seed=0)
    sent = snapshots(model, IMAGES[:2], torch.tensor([3, 3]), lr=0.01)
    found = asked(model, sent, tmp_path, attack="dlm_plus")
    assert found.verdict != "leaked" and found.look.directions == 2
    assert "2 directions" in capsys.readouterr().out
    # where the search itself is sure, the directions contradict it
    sure = replace(found["dlm_plus"], evidence=replace(found["dlm_plus"].evidence, loss=1e-9))
    belief = believe(sure, 60.0, found.look)
    assert belief.grade is Explains.PARTLY and "1 image in 1 step leave 1" in belief.doubt


def test_more_images_than_told_are_looked_for(tmp_path):
    model = network(linear(64, 200), nn.ReLU, linear(200, 10))
    sent = snapshots(model, IMAGES[:4], LABELS[:4])
    found = asked(model, sent, tmp_path, num_images=2)
    assert found.verdict == "leaked" and len(found["exact_batch"].images) == 4
    order = metrics.match(found["exact_batch"].images, IMAGES[:4].double())
    images = found["exact_batch"].images[order]
    assert metrics.psnr(images, IMAGES[:4].double(), data_range=1.0) > 60


def test_a_darker_copy_and_its_image_are_not_vouched_for(tmp_path):
    model = network(linear(64, 200), nn.ReLU, linear(200, 10))
    both = torch.cat([IMAGES[:1], IMAGES[:1] / 2])
    sent = snapshots(model, both, LABELS[:1].repeat(2))
    assert asked(model, sent, tmp_path, num_images=2, attack="exact_batch").verdict != "leaked"


@pytest.mark.parametrize("attack", ["division", "exact"])
def test_two_classes_leave_the_mean_of_a_batch(tmp_path, attack):
    model = network(linear(64, 2))
    found = asked(model, snapshots(model, IMAGES[:4], LABELS[:4] % 2), tmp_path, attack=attack)
    assert found.verdict == "partly" and not found.leaks


def test_two_classes_among_ten_leave_the_mean_of_a_batch(tmp_path):
    model = network(linear(64, 10))
    with torch.no_grad():
        model[-1].bias[2:] = -30.0
    sent = snapshots(model, IMAGES[:4], LABELS[:4] % 2)
    assert asked(model, sent, tmp_path, attack="exact").verdict == "partly"


def test_of_two_images_that_half_precision_leaves_as_one_none_is_vouched_for(tmp_path):
    model = network(linear(64, 32), nn.Sigmoid, linear(32, 10))
    model.load_state_dict({name: w.bfloat16() for name, w in model.state_dict().items()})
    before, after = snapshots(model, IMAGES[:2], torch.tensor([3, 3]))
    sent = before, {name: w.bfloat16() for name, w in after.items()}
    found = asked(model, sent, tmp_path, attack="exact")
    assert found.verdict == "partly" and "their mean" in found.beliefs["exact"].doubt


def test_a_little_decay_does_not_make_one_image_several(tmp_path):
    model = network(linear(64, 32), nn.ReLU, linear(32, 10))
    sent = snapshots(model, IMAGES[:1], LABELS[:1], weight_decay=1e-5)
    assert asked(model, sent, tmp_path, attack="exact").verdict == "leaked"


def test_what_few_numbers_carry_is_not_found_twice(tmp_path):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layers = nn.Conv2d(1, 4, 5, 2, 2), nn.Sigmoid(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
        model = nn.Sequential(*layers, nn.Linear(4, 10))
    found = asked(model, snapshots(model, IMAGES[:1], LABELS[:1]), tmp_path, attack="dlm_plus")
    assert found.verdict != "leaked" and found.leaks  # what the pooling leaves of it


def test_a_walk_that_is_not_the_network_s_own_is_refused(tmp_path):
    lenet = models.build("lenet", SHAPE, 10, seed=0)
    model = Normed(*lenet)
    sent = snapshots(model, IMAGES[:1], LABELS[:1])
    with pytest.raises(ValueError, match="does more than to call its layers"):
        asked(model, sent, tmp_path, attack="exact")


def test_the_decay_that_was_recognised_is_passed_on(tmp_path):
    model = models.build("lenet", SHAPE, 10, seed=1)
    sent = snapshots(model, IMAGES[:1], LABELS[:1], weight_decay=5e-4)
    found = asked(model, sent, tmp_path)
    assert found.verdict == "leaked" and list(found) == ["exact"]
    assert found["exact"].weight_decay == pytest.approx(5e-4, rel=0.01)


def test_attention_is_searched_through_its_plain_kernel(tmp_path):
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.embed = nn.Linear(16, 32)
            self.block = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True)
            self.head = nn.Linear(32, 10)

        def forward(self, images):
            patches = F.unfold(images, 4, stride=4).transpose(1, 2)
            return self.head(self.block(self.embed(patches)).mean(1))

    model = Attention()
    found = asked(model, snapshots(model, IMAGES[:1], LABELS[:1]), tmp_path, attack="dlm_plus")
    assert found["dlm_plus"].images.isfinite().all()


def test_pixels_outside_0_to_1_are_said_and_the_picture_stretched(tmp_path, capsys):
    model = network(*MLP)
    normalised = (IMAGES[:1] - 0.5) / 0.25
    found = asked(model, snapshots(model, normalised, LABELS[:1]), tmp_path)
    assert torch.allclose(found["division"].images.float(), normalised, atol=1e-4)
    said = capsys.readouterr().out
    assert "the pixels run from -2 to 1.75, outside [0, 1]: the client normalised" in said
    assert "perhaps; --normalise (normalise) takes mean and std" in said  # of none that is known
    assert "from -2 to 1.75: the picture shows (value + 2) / 3.75" in said


def test_the_silhouette_that_adam_leaves_is_not_called_the_image(tmp_path, capsys):
    model = network(*MLP)
    trained = copy.deepcopy(model)
    run = torch.optim.Adam(trained.parameters(), lr=1e-3)
    for _ in range(20):
        run.zero_grad()
        F.cross_entropy(trained(IMAGES[:1]), LABELS[:1]).backward()
        run.step()
    sent = model.state_dict(), trained.state_dict()
    found = asked(model, sent, tmp_path, attack="division")
    assert found.verdict == "partly"
    assert "or only the signs of its numbers" in capsys.readouterr().out


def kept():
    model = network(*MLP)
    model.kept = model(IMAGES[:1])  # with its graph, which deepcopy refuses
    return model


def locked():
    model = network(*MLP)
    model.lock = threading.Lock()
    return model


@pytest.mark.parametrize("make", [kept, locked])
def test_a_network_that_cannot_be_copied_is_said_in_one_sentence(make, tmp_path):
    model = make()
    sent = model.state_dict(), {name: w + 0.1 for name, w in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"the model \(Sequential\) cannot be copied") as error:
        asked(model, sent, tmp_path)
    assert "\n" not in str(error.value)


def test_lazy_layers_are_to_be_called_once(tmp_path):
    lazy = nn.Sequential(nn.Flatten(), nn.LazyLinear(10))
    called = network(linear(64, 10))
    sent = snapshots(called, IMAGES[:1], LABELS[:1])
    with pytest.raises(ValueError, match="call it once on an image"):
        asked(lazy, sent, tmp_path)


def test_a_mixture_that_no_zeros_settle_is_vouched_for_by_nothing_that_is_said(tmp_path, capsys):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 2))
    images = data.load("digits", n=2).images
    sent = snapshots(model, images, torch.tensor([0, 1]))
    found = asked(model, sent, tmp_path, num_images=2, attack="exact_batch")
    said = capsys.readouterr().out
    assert found["exact_batch"].evidence.reason == "unsettled" and found.verdict == "partly"
    assert "it vouches for none of its pictures" in said
    assert "the client normalised" not in said


@pytest.mark.parametrize("reason", [Reason.UNSETTLED, Reason.UNTESTED, Reason.NOT_ONE_STEP])
def test_a_whole_batch_that_nothing_confirms_is_partly(reason, tmp_path):
    model = network(linear(64, 200), nn.ReLU, linear(200, 10))
    sent = snapshots(model, IMAGES[:2], LABELS[:2])
    found = asked(model, sent, tmp_path, num_images=2, attack="exact_batch")
    whole = found["exact_batch"]
    assert found.verdict == "leaked" and whole.evidence.recovered.all()
    shown = replace(whole, evidence=replace(whole.evidence, reason=reason))
    believed = believe(shown, None, found.look)
    assert believed.grade is Explains.PARTLY and believed.doubt


def test_an_image_beside_black_is_shown_as_a_direction_and_not_as_an_image(tmp_path, capsys):
    torch.manual_seed(0)
    model = network(linear(64, 200), nn.ReLU, linear(200, 10))
    images = torch.cat([IMAGES[:1], 0 * IMAGES[:1]])
    sent = snapshots(model, images, torch.tensor([3, 4]))
    found = asked(model, sent, tmp_path, num_images=2, attack="exact_batch")
    said = capsys.readouterr().out
    assert found.verdict == "partly" and "a direction stands for several images" in said
    assert "it vouches for none of its pictures" in said
