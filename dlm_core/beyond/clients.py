"""The client's local training as a function of its images and its learning rate.

It can be differentiated in both. Each optimizer is a pure function of one tensor, ``(weight,
gradient, state, rate, **options) -> (weight, state)``, with the names, defaults and order of
operations of ``torch.optim``. The state before the first step is None.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any

import torch
from torch import nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from dlm_core import check, federated, objectives, records
from dlm_core.arrays import Images, Labels
from dlm_core.observation import find_head

CHECKPOINT_FROM = 100  # steps: from here on memory is worth up to twice the time

Rate = torch.Tensor | float
Decay = Annotated[float, check.Range(0, 1, open_high=True)]  # of a moving average
Step = Callable[..., tuple[torch.Tensor, Any]]


def sgd(
    weight: torch.Tensor,
    gradient: torch.Tensor,
    state: torch.Tensor | None,
    rate: Rate,
    *,
    momentum: check.NonNegative = 0.0,
    dampening: check.Finite = 0.0,
    nesterov: bool = False,
    weight_decay: check.NonNegative = 0.0,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """SGD with heavy-ball or Nesterov momentum; the buffer starts as the first gradient.

    Parameters
    ----------
    weight, gradient
        Of one shape.
    state
        The momentum's buffer; None before the first step.
    rate
        η, a number or a scalar tensor.
    momentum, dampening, nesterov, weight_decay
        As in ``torch.optim.SGD``.

    Returns
    -------
    weight, state
        After the step.
    """
    gradient = gradient + weight_decay * weight if weight_decay else gradient
    if momentum:
        state = gradient if state is None else momentum * state + (1 - dampening) * gradient
        gradient = gradient + momentum * state if nesterov else state
    return weight - rate * gradient, state


def adam(
    weight: torch.Tensor,
    gradient: torch.Tensor,
    state: tuple[torch.Tensor, torch.Tensor, int] | None,
    rate: Rate,
    *,
    betas: Sequence[Decay] = (0.9, 0.999),
    eps: check.NonNegative = 1e-8,
    weight_decay: check.NonNegative = 0.0,
) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor, int]]:
    """Adam (Kingma and Ba 2015), weight decay as part of the gradient.

    Its first step is ``η g/(|g| + ε)``.

    Parameters
    ----------
    weight, gradient, rate
        As in ``sgd``.
    state
        (first moment, second moment, number of steps); None before the first step.
    betas, eps, weight_decay
        As in ``torch.optim.Adam``.

    Returns
    -------
    weight, state
        After the step.
    """
    gradient = gradient + weight_decay * weight if weight_decay else gradient
    first, second, t = state or (0.0, 0.0, 0)
    first = betas[0] * first + (1 - betas[0]) * gradient
    second = betas[1] * second + (1 - betas[1]) * gradient**2
    t = t + 1
    size = _root(second / (1 - betas[1] ** t)) + eps
    return weight - rate * first / (1 - betas[0] ** t) / size, (first, second, t)


def adamw(
    weight: torch.Tensor,
    gradient: torch.Tensor,
    state: tuple[torch.Tensor, torch.Tensor, int] | None,
    rate: Rate,
    *,
    betas: Sequence[Decay] = (0.9, 0.999),
    eps: check.NonNegative = 1e-8,
    weight_decay: check.NonNegative = 1e-2,
) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor, int]]:
    """AdamW (Loshchilov and Hutter 2019): Adam on weights that shrink by ηλ in each step.

    Parameters
    ----------
    weight, gradient, state, rate
        As in ``adam``.
    betas, eps, weight_decay
        As in ``torch.optim.AdamW``.

    Returns
    -------
    weight, state
        After the step.
    """
    shrunk = weight * (1 - rate * weight_decay)
    return adam(shrunk, gradient, state, rate, betas=betas, eps=eps)


def rmsprop(
    weight: torch.Tensor,
    gradient: torch.Tensor,
    state: torch.Tensor | None,
    rate: Rate,
    *,
    alpha: Decay = 0.99,
    eps: check.NonNegative = 1e-8,
    weight_decay: check.NonNegative = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """RMSprop (Hinton 2012). Its first step is ``η g/(√(1-α) |g| + ε)``.

    Parameters
    ----------
    weight, gradient, rate
        As in ``sgd``.
    state
        The mean square of the gradient; None before the first step.
    alpha, eps, weight_decay
        As in ``torch.optim.RMSprop``.

    Returns
    -------
    weight, state
        After the step.
    """
    gradient = gradient + weight_decay * weight if weight_decay else gradient
    state = alpha * (0.0 if state is None else state) + (1 - alpha) * gradient**2
    return weight - rate * gradient / (_root(state) + eps), state


OPTIMIZERS: dict[str, Step] = {"sgd": sgd, "adam": adam, "adamw": adamw, "rmsprop": rmsprop}

for _key, _step in OPTIMIZERS.items():  # federated has a record of each, with its torch.optim class
    records.add(replace(federated.CLIENT_OPTIMIZERS[_key], step=_step))


@check.arguments
def step_of(argument: str, key: str) -> Step:
    """The differentiable step of a registered client optimizer.

    Parameters
    ----------
    argument
        Name of the argument that ``key`` came as, for the error.
    key
        Of ``records.CLIENT_OPTIMIZERS``.

    Raises
    ------
    ValueError
        For an unknown optimizer, or one whose record has no ``step``.
    """
    every = records.CLIENT_OPTIMIZERS
    steps = {name: record.step for name, record in every.items() if record.step is not None}
    check.one_of(argument, key, steps)
    return steps[key]


@check.renamed(
    rate="learning_rate",
    steps="local_steps",
    options="optimizer_options",
    optimizer="client_optimizer",
)
@check.arguments
def update(
    model: nn.Module,
    loss: Callable[..., torch.Tensor],
    images: Images,
    labels: torch.Tensor,
    *,
    learning_rate: torch.Tensor | check.Positive,
    local_steps: check.Count = 1,
    batch_size: check.Count | None = None,
    client_optimizer: Step = sgd,
    optimizer_options: Mapping[str, Any] | None = None,
    checkpointed: bool | None = None,
) -> list[torch.Tensor]:
    """Δ = W_t - W_{t+1} of a client that takes ``local_steps`` steps from the model's weights.

    Parameters
    ----------
    model
        With the weights W_t. Batch norm in training mode moves its running statistics.
    loss
        (logits, labels) -> scalar.
    images
        [N, C, H, W] in [0, 1].
    labels
        [N] class indices or [N, K] distributions.
    learning_rate
        η > 0, a tensor [] or a number.
    local_steps
        E >= 1.
    batch_size
        Images per step, in order and cyclically; None takes all in each step.
    client_optimizer
        A step of this module, or another of its form.
    optimizer_options
        Its keyword arguments, e.g. {"momentum": 0.9}.
    checkpointed
        Whether to keep the weights after each step alone, and compute the rest again on the way
        back. That takes up to twice the time; what it saves on LeNet is little (notebook 14
        measures it). None does so from 100 steps on.

    Returns
    -------
    list of torch.Tensor
        One per parameter, differentiable in images, soft labels and rate; zeros for a parameter
        that is frozen or unused. ``federated.train_locally`` is the same without that.

    Raises
    ------
    ValueError
        For arguments out of range, and for images and labels that do not fit the model.
    """
    if not labels.is_floating_point():
        labels = check.fitting("labels", labels, Labels)
        federated.head_for(model, images, labels)
    elif labels.shape != (len(images), find_head(model, images.shape[1:])[1].out_features):
        raise ValueError(
            f"labels has shape {tuple(labels.shape)} and {labels.dtype}; "
            f"it takes {len(images)} class indices, or a distribution over the classes for each"
        )
    check_options("optimizer_options", client_optimizer, optimizer_options or {})
    return simulate(
        model,
        loss,
        images,
        labels,
        learning_rate=learning_rate,
        local_steps=local_steps,
        batch_size=batch_size,
        client_optimizer=client_optimizer,
        optimizer_options=optimizer_options,
        checkpointed=checkpointed,
    )


def simulate(
    model: nn.Module,
    loss: Callable[..., torch.Tensor],
    images: torch.Tensor,
    labels: torch.Tensor,
    *,
    learning_rate: Rate,
    local_steps: int = 1,
    batch_size: int | None = None,
    client_optimizer: Step = sgd,
    optimizer_options: Mapping[str, Any] | None = None,
    checkpointed: bool | None = None,
) -> list[torch.Tensor]:
    """``update`` without its checks, for the inner loop of a search, whose images may be any."""
    names, weights = zip(*model.named_parameters())
    batch_size = len(images) if batch_size is None else batch_size
    options = optimizer_options or {}

    def step(number, images, labels, rate, states, *weights):
        positions = torch.arange(
            number * batch_size, (number + 1) * batch_size, device=images.device
        )
        if batch_size != len(images):
            batch = positions % len(images)
            images, labels = images[batch], labels[batch]
        value = loss(functional_call(model, dict(zip(names, weights)), images), labels)
        # Like torch.optim, it leaves alone what has no gradient: a frozen or an unused layer.
        gradients = objectives.gradients_of(value, weights)
        stepped = [
            (w, state) if g is None else client_optimizer(w, g, state, rate, **options)
            for w, g, state in zip(weights, gradients, states)
        ]
        return tuple(zip(*stepped))

    if checkpointed is None:
        checkpointed = local_steps >= CHECKPOINT_FROM
    before, states = weights, [None] * len(weights)
    for number in range(local_steps):
        arguments = (number, images, labels, learning_rate, states, *weights)
        if checkpointed:
            weights, states = checkpoint(step, *arguments, use_reentrant=False)
        else:
            weights, states = step(*arguments)
    return [a - b for a, b in zip(before, weights)]


def check_options(argument: str, step: Step, options: Mapping[str, Any]) -> None:
    """Raise ValueError for an option that an optimizer's step does not take, or not so.

    Parameters
    ----------
    argument
        Name of the argument that the options came as, for the error.
    step
        Of the form of those of this module.
    options
        Its keyword arguments.
    """
    for name in options:
        check.one_of(argument, name, records.keyword_names(step))
    check.named(step, options)


def _root(square: torch.Tensor) -> torch.Tensor:
    """√, whose slope at 0 is finite, so that a gradient of zero leaves zero and not NaN."""
    return (square + torch.finfo(square.dtype).tiny).sqrt()
