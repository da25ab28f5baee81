"""Small clients on digits, and audits of them."""

import copy

import torch
from torch import nn
from torch.nn import functional as F

from dlm_core import data, metrics
from dlm_core.harness.audit import audit

SHAPE = (1, 8, 8)
IMAGES, LABELS, *_ = data.load("digits", n=5)


def seeded(make, seed=0):
    """What it makes, the same each time."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return make()


def network(*layers, kind=nn.Sequential):
    """The same weights each time, of layers that are made one after the other."""
    return seeded(lambda: kind(nn.Flatten(), *(layer() for layer in layers)))


def linear(inputs, outputs, **options):
    return lambda: nn.Linear(inputs, outputs, **options)


def photograph():
    """One picture in colour, of one of ten classes."""
    image, label, *_ = data.load("cifar100", n=1, source="bundled")
    return image, label % 10


def psnr(found, image):
    return metrics.psnr(found.double(), image.double(), data_range=1.0)


def sgd(client):
    return [torch.optim.SGD(client.parameters(), lr=0.1)]


def focal(scores, targets):
    """A loss of the label's probability alone: its slopes follow the softmax."""
    plain = F.cross_entropy(scores, targets, reduction="none")
    return ((1 - (-plain).exp()) ** 2 * plain).mean()


def trained(
    model, optimizers, images=IMAGES[:1], targets=LABELS[:1], change=None, loss=F.cross_entropy
):
    """(W_t, W_{t+1}) of one step of optimizers, made for the model, with changed gradients; in
    train mode, where chance is the same each time.
    """
    client = copy.deepcopy(model).train()
    steps = optimizers(client)
    loss(seeded(lambda: client(images)), targets).backward()
    if change is not None:
        change(client)
    for each in steps:
        each.step()
    return copy.deepcopy(model.state_dict()), client.state_dict()


def snapshots(model, images=IMAGES[:1], targets=LABELS[:1], loss=F.cross_entropy, **how):
    """(W_t, W_{t+1}) of one step of SGD."""

    def run(client):
        return [torch.optim.SGD(client.parameters(), **{"lr": 0.1, **how})]

    return trained(model, run, images, targets, loss=loss)


def asked(model, sent, tmp_path, image_shape=SHAPE, **options):
    about = {"image_shape": image_shape, "out": tmp_path / "found.png"}
    return audit(*sent, model=model, **about, **options)
