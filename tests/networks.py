"""Networks that several tests train."""

import torch


class Idle(torch.nn.Module):
    """For 8x8 digits: a frozen layer in front, and one that is never used."""

    def __init__(self):
        super().__init__()
        self.first, self.unused = torch.nn.Linear(64, 16), torch.nn.Linear(3, 3)
        self.head = torch.nn.Linear(16, 10)
        self.first.requires_grad_(False)

    def forward(self, x):
        return self.head(self.first(x.flatten(1)).tanh())
