"""The tutorials' network and training, on bundled images of four clients."""

from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from dlm_core import data

LEARNING_RATE, MOMENTUM = 0.01, 0.9
SHAPE = (3, 32, 32)
NORMALISE = "half"  # (pixels - 0.5) / 0.5
HELD_OUT = 500


class Net(nn.Module):
    """Two ReLU convolutions with max-pooling and three linear layers, for 3x32x32 images."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 5)
        self.pool = nn.MaxPool2d(2, 2)
        self.conv2 = nn.Conv2d(6, 16, 5)
        self.fc1 = nn.Linear(16 * 5 * 5, 120)
        self.fc2 = nn.Linear(120, 84)
        self.fc3 = nn.Linear(84, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.pool(F.relu(self.conv1(x)))
        x = self.pool(F.relu(self.conv2(x)))
        x = F.relu(self.fc1(x.flatten(1)))
        return self.fc3(F.relu(self.fc2(x)))


class Data(NamedTuple):
    """What a client trains on, and how."""

    images: torch.Tensor
    labels: torch.Tensor
    epochs: int
    batch: int


CLIENTS = (
    "one digit, one step",
    "one face, one step",
    "20 digits, five epochs",
    "many digits, one epoch",
)


def load(partition: int, many: int) -> Data:
    """The client's images in [0, 1], as colour images of the network's size."""
    if partition == 1:
        face = data.load("lfw", indices=[0])
        return Data(_colour(face.images), torch.tensor([0]), 1, 1)
    first, count = ((HELD_OUT, 1), None, (HELD_OUT + 1, 20), (HELD_OUT + 21, many))[partition]
    digits = data.load("digits", indices=list(range(first, first + count)))
    epochs, batch = ((1, 1), None, (5, 4), (1, 32))[partition]
    return Data(_colour(digits.images), digits.labels, epochs, batch)


def held_out() -> tuple[torch.Tensor, torch.Tensor]:
    """Digits that no client has, and their labels."""
    digits = data.load("digits", n=HELD_OUT)
    return _colour(digits.images), digits.labels


def _colour(grey: torch.Tensor) -> torch.Tensor:
    size = F.interpolate(grey, SHAPE[1:], mode="bilinear", align_corners=False)
    return size.clamp(0, 1).repeat(1, 3, 1, 1)


def train(net: nn.Module, mine: Data, seed: int) -> float:
    """Train on a client's images; the last loss."""
    shuffled = torch.Generator().manual_seed(seed)
    run = torch.optim.SGD(net.parameters(), lr=LEARNING_RATE, momentum=MOMENTUM)
    for _ in range(mine.epochs):
        for some in torch.randperm(len(mine.images), generator=shuffled).split(mine.batch):
            run.zero_grad()
            seen = (mine.images[some] - 0.5) / 0.5
            loss = F.cross_entropy(net(seen), mine.labels[some])
            loss.backward()
            run.step()
    return loss.item()


@torch.no_grad()
def accuracy(net: nn.Module) -> float:
    """The share of held-out digits that it knows."""
    images, labels = held_out()
    return float((net((images - 0.5) / 0.5).argmax(1) == labels).float().mean())
