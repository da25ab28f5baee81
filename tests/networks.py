"""Networks that several tests train."""

import torch
from torch.nn import functional as F


class Idle(torch.nn.Module):
    """For 8x8 digits: a frozen layer in front, and one that is never used."""

    def __init__(self):
        super().__init__()
        self.first, self.unused = torch.nn.Linear(64, 16), torch.nn.Linear(3, 3)
        self.head = torch.nn.Linear(16, 10)
        self.first.requires_grad_(False)

    def forward(self, x):
        return self.head(self.first(x.flatten(1)).tanh())


class Tutorial(torch.nn.Module):
    """For 8x8 digits: a convolution, max-pool and three linear layers."""

    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(1, 6, 3)
        self.fc1, self.fc2 = torch.nn.Linear(54, 40), torch.nn.Linear(40, 30)
        self.fc3 = torch.nn.Linear(30, 10)

    def forward(self, images):
        pooled = F.max_pool2d(F.relu(self.conv(images)), 2).flatten(1)
        return self.fc3(F.relu(self.fc2(F.relu(self.fc1(pooled)))))


class Standardised(torch.nn.Module):
    """What networks do that take the mean off each image and divide by its spread."""

    def forward(self, x):
        mean, std = x.mean((1, 2, 3), keepdim=True), x.std((1, 2, 3), keepdim=True)
        return (x - mean) / std
