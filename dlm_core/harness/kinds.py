"""Clients of many kinds, small, each with the truth that no audit sees: what an audit is calibrated
on, and tested by.

A kind is a network, its images and how it trains; its clients differ in images, initial weights and
learning rate. ``make`` makes one of them.
"""

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from dlm_core import check, data, defenses, models, weights
from dlm_core.federated import loss as cross_entropy
from dlm_core.threads import own_generator
from dlm_core.weights import StateDict

RATES = (0.01, 0.03, 0.1)  # of SGD; a client has one of them
MEAN, STD = 0.5, 0.25  # of clients that normalise their images
SECOND = 3  # classes from an image's label to its second one, where it has two

Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
Optimizer = Callable[[Iterable[nn.Parameter], float], torch.optim.Optimizer]


def _sgd(parameters: Iterable[nn.Parameter], learning_rate: float, **options: Any) -> Any:
    return torch.optim.SGD(parameters, lr=learning_rate, **options)


def _adam(parameters: Iterable[nn.Parameter], learning_rate: float) -> Any:
    return torch.optim.Adam(parameters, lr=learning_rate / 100)


@dataclass(frozen=True, kw_only=True)
class Kind:
    """What clients of one kind have in common.

    Attributes
    ----------
    network
        Of (image_shape, num_classes); initial weights are the global generator's.
    num_images
        In a step.
    local_steps
        On the same images; on others each where ``others``.
    dataset
        Of ``data.load``.
    optimizer, loss
        Of the client's training.
    one_class
        Whether its images are of one class.
    darker
        Whether its second image is the first one at half its brightness.
    num_classes
        Where labels are taken modulo it; None for the data set's own.
    normalised
        Whether it normalises its images by ``MEAN`` and ``STD``.
    two_labels
        Whether an image has a second label, ``SECOND`` classes further.
    sent
        What becomes of W_{t+1} on the way, with a seed; None for nothing.
    """

    network: Callable[[tuple[int, int, int], int], nn.Module]
    num_images: int = 1
    local_steps: int = 1
    others: bool = False
    dataset: str = "digits"
    optimizer: Optimizer = _sgd
    loss: Loss = field(default_factory=lambda: cross_entropy)
    one_class: bool = False
    darker: bool = False
    num_classes: int | None = None
    normalised: bool = False
    two_labels: bool = False
    sent: Callable[[StateDict, int], StateDict] | None = None


class Client(NamedTuple):
    """One client.

    Attributes
    ----------
    network
        With its weights W_t, as whoever asks for an audit has it.
    images
        [N, C, H, W], as the network was given them.
    classes
        All labels that any of them has.
    before, after
        W_t and W_{t+1}, as they were sent.
    inputs
        {linear layer: [rows, features]}: all that passed through it.
    white
        How far white is from black in ``images``.
    """

    network: nn.Module
    images: torch.Tensor
    classes: set[int]
    before: StateDict
    after: StateDict
    inputs: dict[str, torch.Tensor]
    white: float


# --- networks


def _of(name: str, init: str = "default", **options: Any) -> Callable[..., nn.Module]:
    """A network of ours, whose weights the global generator's seed decides."""

    def build(image_shape: tuple[int, int, int], num_classes: int) -> nn.Module:
        seed = int(torch.randint(2**31, ()))
        return models.build(name, image_shape, num_classes, seed=seed, init=init, **options)

    return build


def _dropout(image_shape: tuple[int, int, int], num_classes: int) -> nn.Module:
    layers = list(_of("mlp", hidden=64)(image_shape, num_classes).children())
    return nn.Sequential(*layers[:-1], nn.Dropout(0.5), layers[-1])


def _one_output(image_shape: tuple[int, int, int], num_classes: int) -> nn.Module:
    pixels = torch.Size(image_shape).numel()
    return nn.Sequential(nn.Flatten(), nn.Linear(pixels, 32), nn.ReLU(), nn.Linear(32, 1))


def _regression(image_shape: tuple[int, int, int], num_classes: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(torch.Size(image_shape).numel(), num_classes))


def _pooled(image_shape: tuple[int, int, int], num_classes: int) -> nn.Module:
    convolution = nn.Conv2d(image_shape[0], 4, 5, stride=2, padding=2)
    pooling = nn.Sequential(nn.Sigmoid(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return nn.Sequential(convolution, *pooling, nn.Linear(4, num_classes))


def _max_pooled(image_shape: tuple[int, int, int], num_classes: int) -> nn.Module:
    """The beginners' tutorials' convolutions, for pictures of this size."""
    channels, height, width = image_shape
    return nn.Sequential(
        *(nn.Conv2d(channels, 6, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(6, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()),
        *(nn.Linear(height * width, 32), nn.ReLU(), nn.Linear(32, num_classes)),
    )


class _Attention(nn.Module):
    """A small transformer on patches of 4x4."""

    def __init__(self, image_shape: tuple[int, int, int], num_classes: int) -> None:
        super().__init__()
        self.embed = nn.Linear(16 * image_shape[0], 32)
        self.block = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True)
        self.head = nn.Linear(32, num_classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        patches = F.unfold(images, 4, stride=4).transpose(1, 2)
        return self.head(self.block(self.embed(patches)).mean(1))


def _frozen(image_shape: tuple[int, int, int], num_classes: int) -> nn.Module:
    network = _of("lenet", init="paper")(image_shape, num_classes)
    next(network.children()).requires_grad_(False)
    return network


# --- losses, and what happens on the way


def _binary(scores: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return F.binary_cross_entropy_with_logits(scores[:, 0], (labels % 2).to(scores))


def _several(scores: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Two labels an image."""
    count = scores.shape[1]
    on = F.one_hot(labels, count) + F.one_hot((labels + SECOND) % count, count)
    return F.binary_cross_entropy_with_logits(scores, on.to(scores))


def _squared(scores: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return F.mse_loss(scores, F.one_hot(labels, scores.shape[1]).to(scores))


def _smoothed(scores: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(scores, labels, label_smoothing=0.1)


def _halved(state: StateDict, seed: int) -> StateDict:
    return weights.rounded(state, torch.bfloat16)


def _noised(state: StateDict, seed: int) -> StateDict:
    return defenses.noise(state, scale=1e-4, seed=seed)


_LENET, _MLP = _of("lenet", init="paper"), _of("mlp", hidden=64)
_WIDE = _of("mlp", hidden=200)
KINDS: dict[str, Kind] = {
    "MLP": Kind(network=_MLP),
    "MLP, dropout": Kind(network=_dropout),
    "MLP, one output": Kind(network=_one_output, loss=_binary),
    "MLP, two labels an image": Kind(network=_MLP, loss=_several, two_labels=True),
    "MLP, squared loss": Kind(network=_MLP, loss=_squared),
    "MLP, momentum, 3 steps": Kind(
        network=_MLP, local_steps=3, optimizer=partial(_sgd, momentum=0.9)
    ),
    "MLP, Adam, 3 steps": Kind(network=_MLP, local_steps=3, optimizer=_adam),
    "MLP, sent in half precision": Kind(network=_MLP, sent=_halved),
    "MLP, sent with noise": Kind(network=_MLP, sent=_noised),
    "MLP, 4 images": Kind(network=_WIDE, num_images=4),
    "MLP, image and darker copy": Kind(network=_WIDE, num_images=2, darker=True),
    "linear, 2 classes, 4 images": Kind(network=_regression, num_images=4, num_classes=2),
    "linear, 4 images": Kind(network=_regression, num_images=4),
    "LeNet": Kind(network=_LENET),
    "LeNet, weight decay": Kind(network=_LENET, optimizer=partial(_sgd, weight_decay=5e-4)),
    "LeNet, smoothed labels": Kind(network=_LENET, loss=_smoothed),
    "LeNet, 2 steps": Kind(network=_LENET, local_steps=2),
    "LeNet, 2 steps, normalised": Kind(network=_LENET, local_steps=2, normalised=True),
    "LeNet, epoch of 3 images": Kind(network=_LENET, local_steps=3, others=True),
    "LeNet, PyTorch's weights": Kind(network=_of("lenet")),
    "LeNet, 2 images": Kind(network=_LENET, num_images=2),
    "LeNet, 2 images of a class": Kind(network=_LENET, num_images=2, one_class=True),
    "LeNet, first layer frozen": Kind(network=_frozen),
    "LeNet, ReLU": Kind(network=_of("lenet", activation="relu")),
    "pooled": Kind(network=_pooled),
    "pooled, colour": Kind(network=_pooled, dataset="cifar100"),
    "max-pooled": Kind(network=_max_pooled),
    "attention": Kind(network=_Attention),
    "MLP, colour": Kind(network=_of("mlp", init="paper"), dataset="cifar100"),
    "LeNet, colour": Kind(network=_LENET, dataset="cifar100"),
    # after the audit had been found wrong on such clients
    "LeNet, PyTorch's weights, 2 images of a class": Kind(
        network=_of("lenet"), num_images=2, one_class=True
    ),
    "LeNet, PyTorch's weights, 2 images of a class, 2 steps": Kind(
        network=_of("lenet"), num_images=2, one_class=True, local_steps=2
    ),
}


@check.arguments
def make(kind: str, index: check.Whole = 0) -> Client:
    """Return a client.

    Parameters
    ----------
    kind
        Key of ``KINDS``.
    index
        Which of its clients.

    Raises
    ------
    ValueError
        For a kind that is unknown.
    """
    check.one_of("kind", kind, KINDS)
    about = KINDS[kind]
    draw = torch.Generator().manual_seed(1000 * list(KINDS).index(kind) + index)
    images, labels, num_classes = _drawn(about, draw)
    rate = RATES[int(torch.randint(len(RATES), (), generator=draw))]
    seed = int(torch.randint(2**31, (), generator=draw))
    with own_generator(seed):
        shape = (images.shape[1], images.shape[2], images.shape[3])
        network = about.network(shape, num_classes)
        before = copy.deepcopy(network.state_dict())
        trained = copy.deepcopy(network).train()
        with Inputs(trained) as inputs:
            _train(trained, images, labels, about, rate)
    after = trained.state_dict()
    if about.sent:
        after = about.sent(after, seed)
    others = (labels + SECOND) % num_classes if about.two_labels else labels
    classes = {*labels.tolist(), *others.tolist()}
    white = 1 / STD if about.normalised else 1.0
    return Client(network, images, classes, before, after, inputs.seen(), white)


def _drawn(about: Kind, draw: torch.Generator) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Images, labels and the number of classes."""
    every = data.load(about.dataset, source="bundled")
    count = about.num_images * (about.local_steps if about.others else 1)
    order = torch.randperm(len(every.labels), generator=draw)
    if about.one_class:
        order = order[every.labels[order] == every.labels[order[0]]]
    images, labels = every.images[order[:count]], every.labels[order[:count]]
    if about.darker:
        images, labels = torch.cat([images[:1], images[:1] / 2]), labels[:1].repeat(2)
    if about.normalised:
        images = (images - MEAN) / STD
    classes = about.num_classes or every.num_classes
    return images, labels % classes, classes


def _train(
    network: nn.Module, images: torch.Tensor, labels: torch.Tensor, about: Kind, rate: float
) -> None:
    moving = [weight for weight in network.parameters() if weight.requires_grad]
    optimizer = about.optimizer(moving, rate)
    parts = list(zip(images.split(about.num_images), labels.split(about.num_images)))
    for step in range(about.local_steps):
        batch, targets = parts[step % len(parts)]
        optimizer.zero_grad()
        about.loss(network(batch), targets).backward()
        optimizer.step()


class Inputs:
    """Within it, what passes through a network's linear layers is kept."""

    def __init__(self, network: nn.Module) -> None:
        self.layers = {n: m for n, m in network.named_modules() if isinstance(m, nn.Linear)}
        self.kept: dict[str, list[torch.Tensor]] = {name: [] for name in self.layers}

    def __enter__(self) -> "Inputs":
        self.hooks = [
            layer.register_forward_pre_hook(partial(self._keep, name))
            for name, layer in self.layers.items()
        ]
        return self

    def __exit__(self, *_: Any) -> None:
        for hook in self.hooks:
            hook.remove()

    def seen(self) -> dict[str, torch.Tensor]:
        """{layer: [rows, features]} of those through which something passed."""
        return {name: torch.cat(each) for name, each in self.kept.items() if each}

    def _keep(self, name: str, layer: nn.Module, given: tuple[Any, ...]) -> None:
        self.kept[name].append(given[0].detach().clone().flatten(0, -2))
