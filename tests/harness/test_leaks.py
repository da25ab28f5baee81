"""What an audit says has leaked, by which attack and how exactly; and what was not tried."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from dlm_core import data, models, records
from dlm_core.harness.audit import audit, tried

SHAPE = (1, 8, 8)
IMAGES, LABELS, *_ = data.load("digits", n=5)


def mlp(classes=10):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layers = nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, classes)
        return nn.Sequential(nn.Flatten(), *layers)


def sent(model, images, targets, loss=F.cross_entropy, only=""):
    """The snapshots of one step of SGD, of which only the tensors named ``only…`` were sent."""
    trained = copy.deepcopy(model).train()
    run = torch.optim.SGD(trained.parameters(), lr=0.1)
    loss(trained(images), targets).backward()
    run.step()
    before, after = copy.deepcopy(model.state_dict()), trained.state_dict()
    return before, {name: after[name] if name.startswith(only) else w for name, w in before.items()}


def asked(model, files, tmp_path, **options):
    about = {"image_shape": SHAPE, "out": tmp_path / "found.png", "attack": "division", **options}
    return audit(*files, model=model, **about)


def of(found, what):
    return [each for each in found.leaks if each.what.startswith(what)]


def test_an_image_s_leak_says_by_which_attack_and_how_exactly(tmp_path):
    found = asked(mlp(), sent(mlp(), IMAGES[:1], LABELS[:1]), tmp_path)
    (image,) = of(found, "image")
    true = float((found["division"].images - IMAGES[:1]).square().mean().sqrt())
    assert image.attack == "division" and true / 3 <= image.error * IMAGES[:1].std() < 1e-4
    assert str(image) == image.sentence and "the image that division found" in str(image)
    (label,) = of(found, "label")
    assert label.attack == "label inference" and f"class {int(LABELS[0])}" in str(label)
    assert label.classes == (int(LABELS[0]),)
    assert "if the loss" not in str(label)  # one image, and the last bias moved along p - e_y
    (features,) = of(found, "input of layer '3'")
    assert features.error < 1e-3 and found.tried == ["division"]


def test_the_last_bias_alone_shows_the_label_and_not_the_image(tmp_path):
    model = mlp()
    found = asked(
        model, sent(model, IMAGES[:1], LABELS[:1], only="3.bias"), tmp_path, attack="dlm_plus"
    )
    (label,) = found.leaks
    assert found.verdict == "partly" and f"class {int(LABELS[0])} is among" in str(label)
    assert label.classes == (int(LABELS[0]),)


def smoothed(scores, labels):
    return F.cross_entropy(scores, labels, label_smoothing=0.1)


def confident():
    """A network which is surer of its class 0 than a smoothed label is, and least of class 2."""
    model = mlp(3)
    with torch.no_grad():
        model[3].weight.mul_(0.01)
        model[3].bias.copy_(torch.tensor([0.95, 0.04, 0.01]).log())
    return model


@pytest.mark.parametrize(
    "model, targets, loss",
    [
        (mlp(), torch.eye(10)[[1]] + torch.eye(10)[[4]], F.binary_cross_entropy_with_logits),
        (mlp(), torch.eye(10)[[3]], F.mse_loss),
        (mlp(), 0.6 * torch.eye(10)[[1]] + 0.4 * torch.eye(10)[[4]], F.cross_entropy),
        (mlp(2), LABELS[:1] % 2, F.cross_entropy),
    ],
    ids=["several labels", "squares", "a mixture of labels", "two classes"],
)
def test_where_another_loss_may_have_moved_the_last_bias_no_label_is_claimed(
    tmp_path, model, targets, loss
):
    found = asked(model, sent(model, IMAGES[:1], targets, loss), tmp_path)
    assert not of(found, "label") and (of(found, "image") or model[3].out_features == 2)


def test_a_label_that_smoothing_may_feign_is_claimed_only_with_its_assumption(tmp_path):
    model = confident()
    found = asked(model, sent(model, IMAGES[:1], torch.tensor([0]), smoothed), tmp_path)
    assert all("labels are not smoothed" in str(each) for each in of(found, "label"))


@pytest.mark.parametrize("attack", ["all", "division"])
def test_each_attack_is_tried_or_untried_with_its_reason(tmp_path, attack):
    found = asked(mlp(), sent(mlp(), IMAGES[:1], LABELS[:1]), tmp_path, attack=attack)
    untried = {each.what: each.why for each in found.untried}
    assert set(tried()) == {*found.tried, *untried} & set(tried())
    assert not set(found.tried) & set(untried) and all(untried.values())
    why = {"all": "not needed: division explains the update", "division": "not asked for"}[attack]
    assert untried["dlm_plus"].startswith(why)
    told = [key for key, each in records.ATTACKS.items() if each.told and each.audited is None]
    assert all(key in untried["attacks that are told more than two snapshots"] for key in told)
    kinds = ("batch-norm statistics", "learned priors", "other rounds", "optimiser state")
    assert all(any(what.startswith(kind) for what in untried) for kind in kinds)


def test_an_attack_that_failed_is_untried_with_its_error(tmp_path, monkeypatch):
    def fails(seen, **options):
        raise RuntimeError("derivative not implemented\nand more")

    monkeypatch.setitem(
        records.ATTACKS, "division", replace(records.ATTACKS["division"], function=fails)
    )
    files = sent(mlp(), IMAGES[:1], LABELS[:1])
    found = asked(mlp(), files, tmp_path, attack="all")
    why = {each.what: each.why for each in found.untried}
    assert why["division"] == "does not apply: RuntimeError: derivative not implemented"
    assert found.verdict == "leaked" and "exact" in found.tried


def test_equal_files_are_an_answer_and_no_error(tmp_path, capsys):
    state = mlp().state_dict()
    found = asked(mlp(), (state, copy.deepcopy(state)), tmp_path, attack="all")
    assert found.verdict == "nothing was sent" and found == {} and found.leaks == []
    assert "nothing was sent: no weight changed" in capsys.readouterr().out
    assert {*tried()} <= {each.what for each in found.untried}
    assert not (tmp_path / "found.png").exists()


def test_equal_weights_and_moved_statistics_are_no_nothing(tmp_path, capsys):
    model = models.build("resnet18_bn", SHAPE, 10, seed=0, width=2, blocks=1)
    before = copy.deepcopy(model.state_dict())
    model.train()(IMAGES)
    found = asked(model, (before, model.state_dict()), tmp_path)
    (leak,) = found.leaks
    assert found.verdict == "partly" and leak.what == "running statistics"
    assert "running statistics did" in capsys.readouterr().out and "as much" in str(leak)


def test_a_count_that_moved_alone_is_no_nothing(tmp_path):
    """Batch norm without a momentum of its own counts batches, and so may any buffer."""
    model = nn.Sequential(nn.BatchNorm2d(1, momentum=0.0), *mlp())
    before = copy.deepcopy(model.state_dict())
    model.train()(IMAGES)
    found = asked(model, (before, model.state_dict()), tmp_path)
    (leak,) = found.leaks
    assert found.verdict == "partly" and leak.what == "counts"
    assert "'0.num_batches_tracked'" in str(leak)


@pytest.mark.parametrize("place", ["gradients", "optimizer"])
def test_numbers_beside_equal_weights_are_no_nothing(tmp_path, capsys, place):
    state = mlp().state_dict()
    beside = {
        "gradients": [torch.ones(3)],
        "optimizer": {"state": {0: {"momentum_buffer": torch.ones(2)}}, "param_groups": []},
    }
    before, after = {"model": state, "epoch": 1}, {"model": state, place: beside[place]}
    torch.save(before, tmp_path / "before.pt")
    torch.save(after, tmp_path / "after.pt")
    found = asked(mlp(), (tmp_path / "before.pt", tmp_path / "after.pt"), tmp_path)
    assert found.verdict == "not shown" and f"'{place}" in capsys.readouterr().out
    same = asked(mlp(), (tmp_path / "after.pt", tmp_path / "after.pt"), tmp_path)
    assert same.verdict == "nothing was sent"
