"""Weight decay is found in a layer's update, and taken off it."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from dlm_core import data, metrics
from dlm_core.beyond import decay, inputs

SHAPE = (1, 8, 8)
IMAGES, LABELS, *_ = data.load("digits", n=4)


def matrix(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("directions", [1, 3, 8])
@pytest.mark.parametrize("factor", [1e-6, 5e-5, 0.5])
def test_the_factor_and_the_directions_beside_it_are_found(directions, factor):
    weights = matrix(40, 100)
    update = factor * weights + matrix(40, directions, seed=1) @ matrix(directions, 100, seed=2)
    found = decay.find(update, weights)
    assert found.directions == directions
    assert found.factor == pytest.approx(factor, rel=1e-4)


def test_where_there_is_none_none_is_found():
    weights = matrix(40, 100)
    assert decay.find(matrix(40, 100, seed=1), weights) is None  # of full rank, as Adam's
    assert decay.find(matrix(2, 3, seed=1), matrix(2, 3)) is None  # which one number can always fit
    assert decay.find(matrix(40, 100, seed=1), 0 * weights) is None


def update(images, labels, *, of_bias=True, steps=1, **how):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 10))
    before = {name: w.clone() for name, w in model.state_dict().items()}
    biases = [w for name, w in model.named_parameters() if "bias" in name]
    weights = [w for name, w in model.named_parameters() if "weight" in name]
    groups = [{"params": weights}, {"params": biases, **({} if of_bias else {"weight_decay": 0})}]
    run = torch.optim.SGD(groups, **{"lr": 0.1, "weight_decay": 5e-4, **how})
    for _ in range(steps):
        run.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        run.step()
    after = {name: w.clone() for name, w in model.state_dict().items()}
    model.load_state_dict(before)
    return inputs.read(model, after, SHAPE)


@pytest.mark.parametrize("of_bias, steps", [(True, 1), (True, 4), (False, 1)])
def test_an_image_behind_decay_is_read_to_rounding(of_bias, steps):
    shown = update(IMAGES[:1], LABELS[:1], of_bias=of_bias, steps=steps, momentum=0.9)[0]
    assert shown.rank == 1 and shown.alone and shown.error < 1e-4
    assert metrics.psnr(shown.image, IMAGES[:1].double(), data_range=1.0) > 80
    assert "beside weight decay of" in shown.sentence
    if steps == 1:
        assert shown.decay == pytest.approx(0.1 * 5e-4, rel=1e-2)


def test_the_images_of_a_batch_are_counted_behind_decay():
    assert [each.directions for each in update(IMAGES, LABELS)] == [4, 4]


def test_without_decay_nothing_is_taken_off():
    shown = update(IMAGES[:1], LABELS[:1], weight_decay=0.0)[0]
    assert shown.decay == 0 and "decay" not in shown.sentence
