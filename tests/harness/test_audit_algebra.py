"""What a division shows is no more than it is: lengths, projections, other layers' weights."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from dlm_core import data, metrics
from dlm_core.harness.audit import audit

SHAPE = (3, 16, 16)
PIXELS = 768
PHOTOS, LABELS, *_ = data.load("cifar100", n=2, source="bundled")
IMAGE, LABEL = F.avg_pool2d(PHOTOS[:1], 2), LABELS[:1] % 10


def mlp():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Flatten(), nn.Linear(PIXELS, 64), nn.ReLU(), nn.Linear(64, 10))


def sent(model, change=None, steps=1):
    """(W_t, W_{t+1}) of a client that changes its gradients before a step."""
    trained = copy.deepcopy(model).train()
    run = torch.optim.SGD(trained.parameters(), lr=0.1)
    for _ in range(steps):
        run.zero_grad()
        F.cross_entropy(trained(IMAGE), LABEL).backward()
        if change:
            change(trained)
        run.step()
    return copy.deepcopy(model.state_dict()), trained.state_dict()


def asked(model, both, tmp_path, **options):
    options = {"attack": "division", **options}
    return audit(*both, model=model, image_shape=SHAPE, out=tmp_path / "found.png", **options)


def psnr(found):
    return metrics.psnr(found["division"].images, IMAGE, data_range=1.0)


def scaled(model):
    """Each tensor's gradient as long as a part of the tensor, as of LARS and LAMB."""
    for w in model.parameters():
        w.grad *= 0.1 * w.norm() / w.grad.norm()


def clipped(model):
    for w in model.parameters():
        nn.utils.clip_grad_norm_([w], 0.05)


def faster(model):
    """A bias's rate is twice the weight's."""
    for name, w in model.named_parameters():
        w.grad *= 2 if name.endswith("bias") else 1


def orthogonal(model):
    for w in model.parameters():
        if w.ndim == 2:
            left, _, right = torch.linalg.svd(w.grad, full_matrices=False)
            w.grad = left[:, :1] @ right[:1]


def projected(model):
    """As of a merged adapter, or an optimizer that works in a few dimensions."""
    draw = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(PIXELS, 8, generator=draw)).Q
    model[1].weight.grad = model[1].weight.grad @ basis @ basis.T


@pytest.mark.parametrize("change", [scaled, clipped, faster, orthogonal, projected])
def test_an_image_of_another_length_or_a_projection_has_not_leaked(change, tmp_path, capsys):
    model = mlp()
    found = asked(model, sent(model, change), tmp_path)
    assert psnr(found) < 20 and found.verdict == "partly" and not found.look.leaked
    assert "or a multiple or a projection of it" in capsys.readouterr().out


def whole(model):
    nn.utils.clip_grad_norm_(model.parameters(), 0.05)


@pytest.mark.parametrize("steps", [1, 3])
def test_clipping_all_of_an_update_hides_nothing(steps, tmp_path):
    model = mlp()
    found = asked(model, sent(model, whole, steps), tmp_path)
    assert psnr(found) > 80 and found.verdict == "leaked"


class Own(nn.Module):
    """A matrix of its own in place of a layer."""

    def __init__(self):
        super().__init__()
        draw = torch.Generator().manual_seed(0)
        self.matrix = nn.Parameter(torch.randn(PIXELS, 32, generator=draw) / 30)
        self.offset, self.head = nn.Parameter(torch.zeros(32)), nn.Linear(32, 10)

    def forward(self, images):
        return self.head(torch.relu(images.flatten(1) @ self.matrix + self.offset))


class Recurrent(nn.Module):
    """An image is its only input."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.LSTM(PIXELS, 16, batch_first=True), nn.Linear(16, 10)

    def forward(self, images):
        return self.head(self.body(images.flatten(1)[:, None])[0][:, -1])


def convolution():
    return nn.Sequential(nn.Conv2d(3, 32, 16), nn.ReLU(), nn.Flatten(), nn.Linear(32, 10))


@pytest.mark.parametrize("make", [Own, Recurrent, convolution])
@pytest.mark.parametrize("steps", [1, 3])
def test_an_image_behind_other_weights_is_shown(make, steps, tmp_path, capsys):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = make()
    found = asked(model, sent(model, steps=steps), tmp_path)
    assert psnr(found) > 60 and found.verdict == "partly"
    assert "(the image, 768 numbers) stands in the update" in capsys.readouterr().out
