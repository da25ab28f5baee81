"""The client's local training as a function of its images and its learning rate, to be differentiated in both.

Each optimizer is a pure function of one tensor: (weight, gradient, state, rate, **options) -> (weight, state), with the
names, defaults and order of operations of ``torch.optim``; the state before the first step is None.
"""

from dataclasses import replace

import torch
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from dlm_core import check
from dlm_core.records import CLIENT_OPTIMIZERS, add

CHECKPOINT_FROM = 100  # steps: from here on memory is worth up to twice the time


def sgd(weight, gradient, state, rate, *, momentum=0.0, dampening=0.0, nesterov=False, weight_decay=0.0):
    """SGD with heavy-ball or Nesterov momentum; the buffer starts as the first gradient."""
    gradient = gradient + weight_decay * weight if weight_decay else gradient
    if momentum:
        state = gradient if state is None else momentum * state + (1 - dampening) * gradient
        gradient = gradient + momentum * state if nesterov else state
    return weight - rate * gradient, state


def adam(weight, gradient, state, rate, *, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0):
    """Adam (Kingma and Ba 2015), weight decay as part of the gradient. Its first step is η g/(|g| + ε)."""
    gradient = gradient + weight_decay * weight if weight_decay else gradient
    first, second, t = state or (0.0, 0.0, 0)
    first, second, t = betas[0] * first + (1 - betas[0]) * gradient, betas[1] * second + (1 - betas[1]) * gradient**2, t + 1
    size = _root(second / (1 - betas[1] ** t)) + eps
    return weight - rate * first / (1 - betas[0] ** t) / size, (first, second, t)


def adamw(weight, gradient, state, rate, *, betas=(0.9, 0.999), eps=1e-8, weight_decay=1e-2):
    """AdamW (Loshchilov and Hutter 2019): Adam on weights that shrink by η λ in each step."""
    return adam(weight * (1 - rate * weight_decay), gradient, state, rate, betas=betas, eps=eps)


def rmsprop(weight, gradient, state, rate, *, alpha=0.99, eps=1e-8, weight_decay=0.0):
    """RMSprop (Hinton 2012). Its first step is η g/(√(1-α) |g| + ε)."""
    gradient = gradient + weight_decay * weight if weight_decay else gradient
    state = alpha * (0.0 if state is None else state) + (1 - alpha) * gradient**2
    return weight - rate * gradient / (_root(state) + eps), state


OPTIMIZERS = {"sgd": sgd, "adam": adam, "adamw": adamw, "rmsprop": rmsprop}
for _key, _step in OPTIMIZERS.items():
    add(replace(CLIENT_OPTIMIZERS[_key], step=_step))


@check.renamed(rate="learning_rate", steps="local_steps", options="optimizer_options", optimizer="client_optimizer")
def update(
    model, loss, images, labels, *, learning_rate, local_steps=1, batch_size=None, client_optimizer=sgd,
    optimizer_options=None, checkpointed=None,
):
    """Δ = W_t - W_{t+1} of a client that takes ``local_steps`` steps from the model's weights, one tensor per parameter.

    images, labels  as in ``objectives.gradient``.      learning_rate  η, a tensor [] or a number.
    batch_size      images per step, in order and cyclically; None takes all in each step.
    client_optimizer  of this module, with ``optimizer_options`` of its own, e.g. {"momentum": 0.9}.
    checkpointed    keep the weights after each step alone and compute the rest again on the way back: up to twice the time;
                    LeNet's memory falls by a third at most. None does so from 100 steps on.

    Differentiable in images, soft labels and rate; ``federated.train_locally`` is the same without that.
    """
    names, weights = zip(*model.named_parameters())
    batch_size = len(images) if batch_size is None else batch_size

    def step(number, images, labels, rate, states, *weights):
        batch = torch.arange(number * batch_size, (number + 1) * batch_size, device=images.device) % len(images)
        if batch_size != len(images):
            images, labels = images[batch], labels[batch]
        value = loss(functional_call(model, dict(zip(names, weights)), images), labels)
        gradients = torch.autograd.grad(value, weights, create_graph=True)
        stepped = [client_optimizer(w, g, s, rate, **(optimizer_options or {})) for w, g, s in zip(weights, gradients, states)]
        return tuple(zip(*stepped))

    before, states = weights, [None] * len(weights)
    for number in range(local_steps):
        arguments = (number, images, labels, learning_rate, states, *weights)
        keeps = local_steps < CHECKPOINT_FROM if checkpointed is None else not checkpointed
        weights, states = step(*arguments) if keeps else checkpoint(step, *arguments, use_reentrant=False)
    return [a - b for a, b in zip(before, weights)]


def _root(square):
    """√, whose slope at 0 is finite, so that a gradient of zero leaves zero and not NaN."""
    return (square + torch.finfo(square.dtype).tiny).sqrt()
