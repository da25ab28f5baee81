"""What an audit says of networks and files that are not what attacks assume."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from dlm_core import metrics, models
from dlm_core.observation import Unchanged, observe
from tests.harness import audited
from tests.harness.audited import SHAPE, asked, linear, network, snapshots

IMAGES, LABELS = audited.IMAGES[:4], audited.LABELS[:4]
MLP = (linear(64, 48), nn.ReLU, linear(48, 10))


def shows_the_image(found):
    images = found["division"].images.to(IMAGES)
    return metrics.psnr(images, IMAGES[:1], data_range=1.0) > 60


def test_an_observation_does_not_say_that_moved_statistics_leak_nothing():
    model = models.build("resnet18_bn", SHAPE, 10, seed=0, width=2, blocks=1)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(Unchanged, match="or sent what it received"):
        observe(model, before, before, SHAPE)
    model.train()(IMAGES)
    with pytest.raises(Unchanged, match="running statistics did.*leak as much"):
        observe(model, before, model.state_dict(), SHAPE)


class Single(nn.Sequential):
    """Insists on float32."""

    def forward(self, images):
        return super().forward(images.float() + torch.zeros(1, dtype=torch.float32))


def test_a_network_that_insists_on_float32_is_looked_at_in_it(tmp_path):
    model = network(*MLP, kind=Single)
    found = asked(model, snapshots(model), tmp_path)
    assert found.verdict == "leaked" and shows_the_image(found)


def test_in_float32_as_well_a_mean_is_not_called_one_image(tmp_path):
    model = network(linear(64, 2), kind=Single)
    sent = snapshots(model, IMAGES, LABELS % 2)
    assert asked(model, sent, tmp_path, attack="division").verdict == "partly"


@pytest.mark.parametrize("which", ["weight", "bias"])
def test_precision_counts_tensor_by_tensor(which, tmp_path, capsys):
    model = network(*MLP)
    before, after = snapshots(model, lr=1.0)
    after = {n: w.bfloat16() if n.endswith(which) else w for n, w in after.items()}
    found = asked(model, (before, after), tmp_path, attack="division")
    assert found.verdict == "leaked"
    assert "2 of 4 tensors of weights that came back are rounded to torch.bfloat16" in (
        capsys.readouterr().out
    )
    error = (found["division"].images.to(IMAGES) - IMAGES[:1]).square().mean().sqrt()
    expected = found["division"].evidence.error * IMAGES[:1].square().mean().sqrt()
    assert 1e-6 < error < 5 * expected < 0.05


def untrained(model):
    """A client that keeps half the columns of the first layer as they are."""
    before, after = snapshots(model)
    kept = torch.arange(64) % 8 < 4
    after["1.weight"][:, kept] = before["1.weight"][:, kept]
    return before, after


def test_columns_that_were_not_trained_are_not_called_black(tmp_path, capsys):
    model = network(*MLP)
    found = asked(model, untrained(model), tmp_path, attack="division")
    assert found.verdict == "partly"
    said = capsys.readouterr().out
    assert "the client did not train these, which are not 0 then as they seem" in said


def test_columns_without_weights_are_not_called_black(tmp_path):
    model = network(linear(64, 10))
    with torch.no_grad():
        model[1].weight[:, 32:] = 0
    before, after = snapshots(model)
    after["1.weight"][:, 32:] = 0  # of a client that trains a pruned network
    assert asked(model, (before, after), tmp_path, attack="division").verdict == "partly"


def test_black_pixels_of_a_trained_layer_are_black(tmp_path, capsys):
    model = network(*MLP)
    found = asked(model, snapshots(model), tmp_path)
    assert found.verdict == "leaked" and shows_the_image(found)
    assert "are 0, as their weights did not move. They are black, unless" in capsys.readouterr().out


@pytest.mark.parametrize("scale", [1.0, 1e-3])
def test_a_gradient_in_place_of_weights_is_noticed(scale, tmp_path):
    model = network(*MLP)
    F.cross_entropy(model(IMAGES[:1]), LABELS[:1]).backward()
    gradient = {name: scale * w.grad for name, w in model.named_parameters()}
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="after is not near before .* give before minus it"):
        asked(model, (before, gradient), tmp_path)
    after = {name: w - gradient[name] for name, w in before.items()}
    assert asked(model, (before, after), tmp_path).verdict == "leaked"


def test_a_step_that_moves_the_weights_far_is_no_gradient(tmp_path):
    model = network(*MLP)
    assert asked(model, snapshots(model, lr=1e3), tmp_path).verdict == "leaked"


@pytest.mark.filterwarnings("ignore::FutureWarning")  # torch.jit will go
def test_compiled_and_complex_networks_are_refused_in_a_sentence(tmp_path):
    model = network(*MLP)
    sent = snapshots(model)
    with pytest.raises(ValueError, match="compiled by torch.jit.*in Python"):
        asked(torch.jit.script(model), sent, tmp_path)
    turned = copy.deepcopy(model)
    turned.register_buffer("turns", torch.ones(3, dtype=torch.complex64), persistent=False)
    with pytest.raises(ValueError, match="complex numbers in 'turns'.*view_as_real"):
        asked(turned, sent, tmp_path)


def test_a_last_bias_that_never_moves_is_said_and_not_read(tmp_path):
    bare = network(*MLP[:2], linear(48, 10, bias=False))
    model = network(*MLP)
    sent = [{**each, "3.bias": torch.zeros(10)} for each in snapshots(bare)]
    found = asked(model, sent, tmp_path)
    assert found.verdict == "leaked" and list(found) == ["division"]  # which needs no last bias
    assert any("'3.bias' did not move" in note and "invented" in note for note in found.notes)
    lenet = models.build("lenet", SHAPE, 10, seed=0)
    before, after = snapshots(lenet)
    last = [name for name in before if name.endswith("bias")][-1]
    found = asked(lenet, (before, {**after, last: before[last]}), tmp_path)
    assert not found and any("invented to fit" in note for note in found.notes)


def test_of_a_last_bias_that_did_not_move_no_labels_are_read(tmp_path):
    lenet = models.build("lenet", SHAPE, 10, seed=0)
    before, after = snapshots(lenet, IMAGES[:2], LABELS[:2])
    found = asked(lenet, (before, {**after, "7.bias": before["7.bias"]}), tmp_path, num_images=2)
    assert not found and "'7.bias' did not move" in found.notes[0]
    assert not any(each.what == "label" for each in found.leaks)


def test_without_a_last_bias_the_label_is_read_off_the_rows(tmp_path, capsys):
    model = network(*MLP[:2], linear(48, 10, bias=False))
    found = asked(model, snapshots(model, targets=torch.tensor([7])), tmp_path)
    assert any("class 7 is the label" in str(each) for each in found.leaks)
    assert "'3.weight' moved against all others" in capsys.readouterr().out


def test_batch_norm_that_never_moves_is_said(tmp_path, capsys):
    layers = (lambda: nn.Conv2d(1, 4, 3), lambda: nn.BatchNorm2d(4), nn.ReLU, nn.Flatten)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(*(layer() for layer in layers), nn.Linear(144, 10))
    before, after = snapshots(model)
    after |= {name: w for name, w in before.items() if name.startswith("1.")}
    found = asked(model, (before, after), tmp_path, attack="dlm_plus")
    said = capsys.readouterr().out
    assert "batch norm's '1.weight', '1.bias' did not move" in said and "invented" in said
    assert found["dlm_plus"].images.isfinite().all()


@pytest.mark.parametrize("kept", ["3.", "3.bias"])
def test_of_the_last_layer_alone_no_steps_are_simulated(kept, tmp_path, capsys):
    model = network(*MLP)
    before, after = snapshots(model)
    after = {name: w if name.startswith(kept) else before[name] for name, w in after.items()}
    found = asked(model, (before, after), tmp_path)
    said = capsys.readouterr().out
    assert "the last layer alone moved" in said and "several" not in said
    assert found.verdict == "partly" and any(each.what == "label" for each in found.leaks)


def test_searches_leave_out_what_did_not_move(tmp_path):
    lenet = models.build("lenet", SHAPE, 10, seed=1)
    before, after = snapshots(lenet)
    after["0.weight"] = before["0.weight"]  # frozen, and not marked so
    found = asked(lenet, (before, after), tmp_path, attack="dlm_plus")
    assert found["dlm_plus"].evidence.loss < 1e-3


class Pair(nn.Sequential):
    def forward(self, images):
        return super().forward(images), images


def test_what_is_taken_for_scores_is_said(tmp_path, capsys):
    model = network(*MLP, kind=Pair)
    sent = snapshots(model, loss=lambda returned, y: F.cross_entropy(returned[0], y))
    assert asked(model, sent, tmp_path).verdict == "leaked"
    assert "returns a tuple of 2; its first is taken for the class scores" in (
        capsys.readouterr().out
    )


def smooth(kind):
    return network(linear(64, 48), nn.Sigmoid, linear(48, 10), kind=kind)


@pytest.mark.parametrize("kind", [Pair, Single])
def test_searches_go_on_where_a_network_returns_more_or_insists_on_float32(kind, tmp_path):
    model = smooth(kind)

    def loss(returned, labels):
        return F.cross_entropy(returned[0] if kind is Pair else returned, labels)

    found = asked(model, snapshots(model, loss=loss), tmp_path, attack="dlm_plus")
    assert found["dlm_plus"].evidence.loss < 1e-3
    assert metrics.psnr(found["dlm_plus"].images.to(IMAGES), IMAGES[:1], data_range=1.0) > 20


def test_of_several_images_and_no_last_bias_the_directions_are_said(tmp_path, capsys):
    model = network(*MLP[:2], linear(48, 10, bias=False))
    found = asked(model, snapshots(model, IMAGES, LABELS), tmp_path)
    assert "has 4 directions" in capsys.readouterr().out
    assert list(found) == ["division"] and not found["division"].vouched.any()
    assert found.verdict != "leaked" and found.untried


def test_dropout_is_said(tmp_path, capsys):
    model = network(MLP[0], nn.ReLU, nn.Dropout, MLP[2])
    assert asked(model, snapshots(model), tmp_path).verdict == "leaked"
    assert "two forward passes of one image differ in train mode" in capsys.readouterr().out


def test_of_one_output_no_softmax_is_assumed(tmp_path, capsys):
    model = network(linear(64, 48), nn.ReLU, linear(48, 1))
    sent = snapshots(model, targets=torch.ones(1, 1), loss=F.binary_cross_entropy_with_logits)
    found = asked(model, sent, tmp_path)
    assert list(found) == ["division"] and found.verdict == "partly" and shows_the_image(found)
    assert "one output: its loss is no cross-entropy of a softmax" in capsys.readouterr().out


def test_a_batch_in_one_layer_is_not_called_adam_s(tmp_path, capsys):
    model = network(linear(64, 10))
    asked(model, snapshots(model, IMAGES, LABELS), tmp_path, attack="dlm_plus")
    assert "looks like sgd or its kin" in capsys.readouterr().out
