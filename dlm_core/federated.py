"""FedAvg: what a client does with the weights it receives, and what the server does with those that
come back.
"""

import copy
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from dlm_core import check
from dlm_core.arrays import Images, Labels, Precision, for_model
from dlm_core.observation import Observation, Unchanged, find_head, observe
from dlm_core.records import CLIENT_OPTIMIZERS, ClientOptimizer, add, keyword_names
from dlm_core.weights import StateDict, check_fit, held_as, load_weights, rounded

__all__ = [
    "Client",
    "Observation",
    "Unchanged",
    "average",
    "descend",
    "load_weights",
    "loss",
    "observe",
    "rounds",
    "train_locally",
]

Client = tuple[Images, Labels]
# Of logits [B, K] against class indices [B] or distributions [B, K]; client and attacker share it.
loss = F.cross_entropy

for _key, _class in (
    ("sgd", torch.optim.SGD),
    ("adam", torch.optim.Adam),
    ("adamw", torch.optim.AdamW),
    ("rmsprop", torch.optim.RMSprop),
):
    add(ClientOptimizer(key=_key, function=_class, title=_class.__name__))


@check.renamed(
    lr="learning_rate",
    steps="local_steps",
    optimizer="client_optimizer",
    options="optimizer_options",
)
@check.arguments
def train_locally(
    model: nn.Module,
    images: Images,
    labels: Labels,
    *,
    learning_rate: check.Positive,
    local_steps: check.Count = 1,
    batch_size: check.Count | None = None,
    client_optimizer: str | type[torch.optim.Optimizer] = "sgd",
    optimizer_options: Mapping[str, Any] | None = None,
    clear_gradients: bool = True,
    transmitted: Precision | None = None,
) -> Observation:
    """Train a copy of ``model`` as a FedAvg client does and return what an observer sees of it.

    Parameters
    ----------
    model
        With the weights that the client receives; it is left as it was.
    images
        [N, C, H, W] in [0, 1], or 8-bit values; they are taken in the model's dtype, on its device.
    labels
        [N] class indices.
    learning_rate
        η > 0.
    local_steps
        E >= 1, the number of optimizer steps.
    batch_size
        Images per step, taken in order and cyclically; None takes all of them in each step.
    client_optimizer
        Key of ``records.CLIENT_OPTIMIZERS``, or a class of ``torch.optim``.
    optimizer_options
        Its further arguments, e.g. {"momentum": 0.9}.
    clear_gradients
        False reproduces the released client, whose gradients accumulate over the local steps.
    transmitted
        Precision, such as ``torch.bfloat16``, to which all weights are rounded on their way, to the
        client and back.

    Raises
    ------
    ValueError
        For data that do not fit the model, or numbers out of range.
    FloatingPointError
        Where the client's own training diverged.
    """
    if isinstance(client_optimizer, str):
        check.one_of("client_optimizer", client_optimizer, CLIENT_OPTIMIZERS)
        kind: Callable[..., Any] = CLIENT_OPTIMIZERS[client_optimizer].function
    else:
        kind = client_optimizer
    model = copy.deepcopy(model)
    model.load_state_dict(rounded(model.state_dict(), transmitted))
    client = copy.deepcopy(model)
    stepper = optimizer_of(kind, client.parameters(), learning_rate, optimizer_options or {})
    given = images.detach(), labels  # no gradient of the client's is left in the caller's images
    seen = descend(model, client, stepper, *given, local_steps, batch_size, clear_gradients)
    if transmitted is None:
        return seen
    return replace(seen, weights_after=rounded(seen.weights_after, transmitted))


def optimizer_of(
    kind: Callable[..., Any],
    parameters: Iterable[torch.Tensor],
    learning_rate: float,
    options: Mapping[str, Any],
) -> torch.optim.Optimizer:
    """A client's optimizer.

    Parameters
    ----------
    kind
        A class of ``torch.optim``.
    parameters
        What it steps.
    learning_rate, options
        Its arguments.

    Raises
    ------
    ValueError
        For options that it has not, or whose values it refuses; for one that needs a closure.
    """
    takes = [name for name in keyword_names(kind) if name != "lr"]
    for name in options:
        check.one_of("optimizer_options", name, takes)
    try:
        made = kind(parameters, lr=learning_rate, **options)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"optimizer_options is {check.shown(dict(options))}; "
            f"{kind.__name__} refuses it ({error})"
        ) from None
    if _needs_closure(made):
        raise ValueError(
            f"client_optimizer is {kind.__name__}, whose steps evaluate the loss several times; "
            "it takes an optimizer whose step() needs no closure"
        )
    return made


def _needs_closure(stepper: torch.optim.Optimizer) -> bool:
    closure = inspect.signature(stepper.step).parameters.get("closure")
    return closure is not None and closure.default is inspect.Parameter.empty


@check.arguments
def descend(
    model: nn.Module,
    client: nn.Module,
    stepper: torch.optim.Optimizer,
    images: Images,
    labels: Labels,
    local_steps: check.Count = 1,
    batch_size: check.Count | None = None,
    clear_gradients: bool = True,
) -> Observation:
    """Train a client by an optimizer of its own, and return what an observer sees of it.

    Parameters
    ----------
    model
        With the weights that the client receives.
    client
        A copy of it, which is trained in place.
    stepper
        The optimizer of the copy's parameters.
    images, labels, local_steps, batch_size, clear_gradients
        As in ``train_locally``.

    Raises
    ------
    ValueError, FloatingPointError
        As ``train_locally`` does.
    """
    name, head = head_for(model, images, labels)
    images, labels = for_model(images, model), labels.to(next(model.parameters()).device)
    batch_size = len(images) if batch_size is None else batch_size
    for step in range(local_steps):
        batch = torch.arange(step * batch_size, (step + 1) * batch_size) % len(images)
        if clear_gradients:
            stepper.zero_grad()
        with torch.enable_grad():  # whatever the caller has switched off
            value = loss(client(images[batch]), labels[batch])
        if not value.requires_grad:
            raise ValueError("model has nothing to train: its scores hang on no unfrozen parameter")
        value.backward()
        stepper.step()
    weights_after = {name: tensor.detach().clone() for name, tensor in client.state_dict().items()}
    if not all(tensor.isfinite().all() for tensor in weights_after.values()):
        raise FloatingPointError(
            f"the client's training diverged within {local_steps} steps; lower learning_rate"
        )
    return Observation(model, weights_after, tuple(images.shape[1:]), head.out_features, name)


@check.arguments
def average(snapshots: Sequence[StateDict], sizes: Sequence[check.NonNegative]) -> StateDict:
    """FedAvg's server step (McMahan et al. 2017, algorithm 1): the weighted mean of state dicts.

    Parameters
    ----------
    snapshots
        What the clients sent, at least one.
    sizes
        Their weights, one each, not all 0: how many images a client has.

    Returns
    -------
    dict of str to torch.Tensor
        In the first one's dtypes. A count, such as batch norm's of its batches, is the nearest
        whole number to the mean.

    Raises
    ------
    ValueError
        Where the state dicts do not fit each other, or the sizes do not fit them.
    """
    if not snapshots or not snapshots[0]:
        raise ValueError(f"snapshots is {snapshots}; it takes at least one state dict of tensors")
    for number, snapshot in enumerate(snapshots):
        check_fit(f"snapshots[{number}]", snapshot, snapshots[0])
    total = float(sum(sizes))
    if len(sizes) != len(snapshots) or total == 0:
        raise ValueError(
            f"sizes is {check.shown(sizes)}; it takes a number for each of the {len(snapshots)} "
            "snapshots, not all of them 0"
        )
    mean = {}
    for name, first in snapshots[0].items():
        weighted = [
            snapshot[name].to(first.device).double() * (size / total)
            for snapshot, size in zip(snapshots, sizes)
        ]
        mean[name] = held_as(torch.stack(weighted).sum(0), first)
    return mean


@check.renamed(number="num_rounds")
@check.arguments
def rounds(
    model: nn.Module,
    clients: Sequence[Client],
    *,
    num_rounds: check.Count,
    train: Callable[..., Observation] = train_locally,
    defend: Callable[[Observation, int, int], Observation] | None = None,
    **training: Any,
) -> Iterator[tuple[nn.Module, list[Observation]]]:
    """FedAvg: yield, for each round, (model after the round, the clients' Observations of it).

    Parameters
    ----------
    model
        With the weights of the start; it is left as it was.
    clients
        (images, labels) of each, at least one; they train locally from the round's model.
    num_rounds
        How many rounds, at least 1.
    train
        How a client trains; ``training`` are its keyword arguments.
    defend
        What of it is sent: (Observation, number of the round, number of the client) -> Observation.
    """
    check.at_least("number of clients", len(clients), 1)
    model = copy.deepcopy(model)  # which leaves gradients behind, and with them all trace of data
    for turn in range(num_rounds):
        seen = [train(model, images, labels, **training) for images, labels in clients]
        if defend:
            seen = [defend(each, turn, client) for client, each in enumerate(seen)]
        sizes = [len(labels) for _, labels in clients]
        model.load_state_dict(average([each.weights_after for each in seen], sizes))
        yield copy.deepcopy(model), seen  # whoever measures it may change its mode


def head_for(model: nn.Module, images: Images, labels: Labels) -> tuple[str, nn.Linear]:
    """The model's head with its name, once images and labels are found to suit it.

    Raises
    ------
    ValueError
        Where images and labels do not fit the model or each other.
    """
    if len(labels) != len(images):
        raise ValueError(
            f"labels has shape {tuple(labels.shape)}; it takes {len(images)} class indices, "
            "one for each of the images"
        )
    name, head = find_head(model, images.shape[1:])
    if labels.max() >= head.out_features:
        raise ValueError(
            f"labels run from {labels.min()} to {labels.max()}; "
            f"the model has classes 0 to {head.out_features - 1}"
        )
    return name, head
