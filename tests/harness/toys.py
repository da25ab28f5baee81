"""A user's module: an attack, a defence, a network and a data set of one's own, registered."""

import torch
from torch import nn

from dlm_core import attacks, records

BRIGHTNESS = 0.25  # a global that the attack reads: part of its key
CONTRAST = 1.0  # one that the data set reads
GAIN = 1.0  # one that the network reads


@records.attack("toy_attack", title="Toy", colour=6, marker="h", client="any client", audited=10**6)
def toy_attack(seen, *, num_images=1, seed=0):
    """Guess a grey of one's own."""
    found = attacks.grey(seen, num_images=num_images)
    found.images.fill_(BRIGHTNESS)
    return found


@records.defence("toy_defence", title="Toy defence", colour=5, marker="x", random=False)
def toy_defence(weights, *, factor, parameters=None):
    """Shrink what is sent."""
    return {name: w * factor if w.is_floating_point() else w for name, w in weights.items()}


@records.network("toy_network", title="Toy network")
def toy_network(image_shape, num_classes, *, hidden=16):
    """One hidden layer."""
    channels, height, width = image_shape
    size = channels * height * width
    layers = [nn.Flatten(), nn.Linear(size, hidden), nn.Sigmoid(), nn.Linear(hidden, num_classes)]
    return nn.Sequential(Gain(), *layers)


class Gain(nn.Module):
    """Amplifies."""

    def __init__(self):
        super().__init__()
        self.gain = GAIN

    def forward(self, x):
        return self.gain * x


@records.data_set("toy_images", title="Toy images", image_shape=(1, 6, 6), num_classes=2)
def toy_images():
    """Two images of noise, one of each class."""
    generator = torch.Generator().manual_seed(0)
    return CONTRAST * torch.rand(2, 1, 6, 6, generator=generator), torch.tensor([0, 1])
