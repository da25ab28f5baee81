"""Networks, clients and files as people have them, small: what each combination must not do is in
test_combinations.py.
"""

import copy
import json

import numpy as np
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F

SHAPE = (1, 8, 8)


# --- networks


class Pair(nn.Module):
    """Returns (scores, features), the head registered first."""

    def __init__(self):
        super().__init__()
        self.head, self.body = nn.Linear(32, 10), nn.Linear(64, 32)

    def forward(self, images):
        hidden = torch.relu(self.body(images.flatten(1)))
        return self.head(hidden), hidden


class Named(nn.Sequential):
    """Returns a dict of logits."""

    def forward(self, images):
        return {"logits": super().forward(images)}


class Normed(nn.Sequential):
    """Normalises its input itself."""

    def forward(self, images):
        return super().forward((images - 0.5) / 0.25)


class Residual(nn.Module):
    """A skip around a layer, and an activation in place."""

    def __init__(self):
        super().__init__()
        self.first, self.inner, self.last = nn.Linear(64, 32), nn.Linear(32, 32), nn.Linear(32, 10)

    def forward(self, images):
        z = F.relu_(self.first(images.flatten(1)))
        return self.last(z + torch.tanh(self.inner(z)))


class Attention(nn.Module):
    """A transformer's block over four patches."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(16, 16)
        self.block = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
        self.head = nn.Linear(16, 10)

    def forward(self, images):
        patches = F.unfold(images, 4, stride=4).transpose(1, 2)
        return self.head(self.block(self.embed(patches)).mean(1))


class Single(nn.Sequential):
    """Insists on float32."""

    def forward(self, images):
        return super().forward(images.float() + torch.zeros(1, dtype=torch.float32))


def mlp(activation=nn.ReLU, kind=nn.Sequential, outputs=10, **last):
    return kind(nn.Flatten(), nn.Linear(64, 48), activation(), nn.Linear(48, outputs, **last))


def frozen():
    model = mlp()
    model[1].requires_grad_(False)
    return model


def shared():
    """Two layers of one weight."""
    layer = nn.Linear(64, 64)
    return nn.Sequential(nn.Flatten(), layer, nn.ReLU(), layer, nn.ReLU(), nn.Linear(64, 10))


def convolutions(activation, *, pool=False, norm=False):
    conv = nn.Conv2d(1, 4, 3, padding=1)
    norms = [nn.BatchNorm2d(4)] if norm else []
    down = [nn.MaxPool2d(2), nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10)]
    plain = [nn.Flatten(), nn.Linear(256, 10)]
    return nn.Sequential(conv, *norms, activation(), *(down if pool else plain))


NETWORKS = {
    "softmax": lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 10)),
    "mlp": mlp,
    "sigmoid": lambda: mlp(nn.Sigmoid),
    "no bias": lambda: mlp(bias=False),
    "pair": Pair,
    "named": lambda: mlp(kind=Named),
    "normed": lambda: mlp(kind=Normed),
    "single": lambda: mlp(kind=Single),
    "residual": Residual,
    "attention": Attention,
    "frozen": frozen,
    "shared": shared,
    "one output": lambda: mlp(outputs=1),
    "two classes": lambda: mlp(outputs=2),
    "dropout": lambda: nn.Sequential(
        nn.Flatten(), nn.Linear(64, 48), nn.ReLU(), nn.Dropout(0.5), nn.Linear(48, 10)
    ),
    "batch norm": lambda: convolutions(nn.ReLU, norm=True),
    "layer norm": lambda: nn.Sequential(
        nn.Flatten(), nn.LayerNorm(64), nn.Linear(64, 48), nn.GELU(), nn.Linear(48, 10)
    ),
    "weight norm": lambda: nn.Sequential(
        nn.Flatten(),
        nn.utils.parametrizations.weight_norm(nn.Linear(64, 48)),
        nn.ReLU(),
        nn.Linear(48, 10),
    ),
    "convolution": lambda: convolutions(nn.Sigmoid),
    "pooling": lambda: convolutions(nn.ReLU, pool=True),
    "averaged": lambda: nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.Sigmoid(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 10)
    ),
}


# --- clients


def scores(returned):
    if isinstance(returned, dict):
        return returned["logits"]
    return returned[0] if isinstance(returned, tuple) else returned


def cross_entropy(returned, labels):
    z = scores(returned)
    if z.shape[1] == 1:
        return F.binary_cross_entropy_with_logits(z[:, 0], (labels % 2).float())
    return F.cross_entropy(z, labels % z.shape[1])


def squares(returned, labels):
    z = scores(returned)
    return F.mse_loss(z, F.one_hot(labels % z.shape[1], z.shape[1]).float())


def several_labels(returned, labels):
    z = scores(returned)
    on = F.one_hot(labels % z.shape[1], z.shape[1]) + F.one_hot(5 * labels % z.shape[1], z.shape[1])
    return F.binary_cross_entropy_with_logits(z, on.clamp(max=1).float())


def train(model, images, labels, *, steps=1, batch=None, loss=cross_entropy, clip=None, **how):
    """W_{t+1} of a client in train mode."""
    kind = how.pop("kind", torch.optim.SGD)
    client = copy.deepcopy(model).train()
    trained = [p for p in client.parameters() if p.requires_grad]
    run = kind(trained, **{"lr": 0.1, **how})
    batch = batch or len(images)
    for step in range(steps):
        taken = torch.arange(step * batch, (step + 1) * batch) % len(images)
        run.zero_grad()
        loss(client(images[taken]), labels[taken]).backward()
        if clip:
            nn.utils.clip_grad_norm_(trained, clip)
        run.step()
    return client.state_dict()


# name: (images in all, images told, how the client trains)
CLIENTS = {
    "one": (1, 1, {}),
    "momentum": (1, 1, {"momentum": 0.9, "nesterov": True}),
    "decay": (1, 1, {"weight_decay": 5e-4}),
    "three steps": (1, 1, {"steps": 3}),
    "clipped": (1, 1, {"steps": 2, "clip": 0.1}),
    "large": (1, 1, {"lr": 50.0}),
    "adam": (1, 1, {"kind": torch.optim.Adam, "lr": 1e-3}),
    "adamw": (1, 1, {"kind": torch.optim.AdamW, "lr": 1e-3, "steps": 2}),
    "several labels": (1, 1, {"loss": several_labels}),
    "squares": (1, 1, {"loss": squares}),
    "two": (2, 2, {}),
    "two of a class": (2, 1, {"alike": True}),
    "a darker copy": (2, 2, {"alike": True, "darker": True}),
    "four": (4, 2, {}),
    "an epoch": (4, 2, {"steps": 2, "batch": 2}),
    "normalised": (1, 1, {"normalised": True}),
}


def client_of(name, model, images, labels):
    """(the client's images, W_{t+1}, images told)."""
    count, told, how = CLIENTS[name]
    how = dict(how)
    images, labels = images[:count], labels[:count]
    if how.pop("alike", False):
        labels = labels[:1].repeat(count)
    if how.pop("darker", False):
        images = torch.cat([images[:1], images[:1] / 2])
    if how.pop("normalised", False):
        images = (images - 0.3) / 0.4
    return images, train(model, images, labels, **how), told


# --- files


def _saved(folder, states, name, save):
    for at, state in zip(("before", "after"), states):
        save(state, folder / name.format(at))
    return tuple(folder / name.format(at) for at in ("before", "after"))


def _own(state):
    return {name: w.contiguous().clone() for name, w in state.items()}


def _list(state, path):
    np.savez(path, *[w.numpy() for w in state.values()])


def _nested(state, path):
    inner = {f"module.{name}": w for name, w in state.items()}
    torch.save({"epoch": 3, "state_dict": inner, "optimizer": {"lr": 0.1}}, path)


def _sharded(state, path):
    path.mkdir()
    state = _own(state)
    for name, w in state.items():
        save_file({name: w}, path / f"{name}.safetensors")
    index = {"weight_map": {name: f"{name}.safetensors" for name in state}}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))


def _cast(dtype, which):
    def cast(state):
        return {
            name: w.to(dtype) if w.is_floating_point() and which(name) else w
            for name, w in state.items()
        }

    return cast


def _pickled(state, path):
    torch.save(state, path)


FILES = {
    "dicts": lambda folder, states: states,
    "pt": lambda folder, states: _saved(folder, states, "{}.pt", _pickled),
    "nested": lambda folder, states: _saved(folder, states, "{}.pth", _nested),
    "npz list": lambda folder, states: _saved(folder, states, "{}.npz", _list),
    "arrays": lambda folder, states: tuple([w.numpy() for w in s.values()] for s in states),
    "safetensors": lambda folder, states: _saved(
        folder, states, "{}.safetensors", lambda s, path: save_file(_own(s), path)
    ),
    "sharded": lambda folder, states: _saved(folder, states, "{}", _sharded),
    "double": lambda folder, states: tuple(
        _cast(torch.float64, lambda name: True)(state) for state in states
    ),
    "half": lambda folder, states: (
        states[0], _cast(torch.float16, lambda name: True)(states[1])
    ),
    "mixed": lambda folder, states: (
        states[0], _cast(torch.bfloat16, lambda name: name.endswith("weight"))(states[1])
    ),
}  # fmt: skip
