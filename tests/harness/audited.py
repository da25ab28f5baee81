"""Small clients on digits, and audits of them."""

import copy

import torch
from torch import nn
from torch.nn import functional as F

from dlm_core import data
from dlm_core.harness.audit import audit

SHAPE = (1, 8, 8)
IMAGES, LABELS, *_ = data.load("digits", n=5)


def network(*layers, kind=nn.Sequential):
    """The same weights each time, of layers that are made one after the other."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return kind(nn.Flatten(), *(layer() for layer in layers))


def linear(inputs, outputs, **options):
    return lambda: nn.Linear(inputs, outputs, **options)


def snapshots(model, images=IMAGES[:1], targets=LABELS[:1], loss=F.cross_entropy, **how):
    """(W_t, W_{t+1}) of one step of SGD in train mode."""
    trained = copy.deepcopy(model).train()
    run = torch.optim.SGD(trained.parameters(), **{"lr": 0.1, **how})
    loss(trained(images), targets).backward()
    run.step()
    return copy.deepcopy(model.state_dict()), trained.state_dict()


def asked(model, sent, tmp_path, **options):
    about = {"image_shape": SHAPE, "out": tmp_path / "found.png", **options}
    return audit(*sent, model=model, **about)
