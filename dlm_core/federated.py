"""What a client does, and what the observer sees of it: two snapshots of the weights.

Sign convention, here and everywhere: Δ = W_t - W_{t+1}, so that one SGD step of learning rate η gives Δ = η·g.
"""

import copy
from dataclasses import dataclass, field, replace

import torch
from torch import nn
from torch.nn import functional as F

from dlm_core import check

loss = F.cross_entropy  # of logits [B, K] against class indices [B] or distributions [B, K]; client and attacker share it


class Unchanged(ValueError):
    """The two snapshots are identical: nothing can leak."""


@dataclass(frozen=True)
class Observation:
    """All that an honest-but-curious observer of FedAvg holds about one client in one round.

    model          the network with the weights the client received, W_t.
    weights_after  the state dict that the client sent back, W_{t+1}, batch norm's running statistics included.
    image_shape    (C, H, W), as public as the architecture.
    num_classes    width of the last layer.

    Raises ValueError, naming the tensor, where the snapshots do not fit each other or hold NaN or infinity; Unchanged where
    they are identical.
    """

    model: nn.Module = field(repr=False)
    weights_after: dict = field(repr=False)
    image_shape: tuple
    num_classes: int

    def __post_init__(self):
        before = self.model.state_dict()
        _check_fit("weights_after", self.weights_after, before)
        for label, snapshot in (("the model", before), ("weights_after", self.weights_after)):
            for name, tensor in snapshot.items():
                if tensor.is_floating_point() and not tensor.isfinite().all():
                    raise ValueError(f"{label} holds NaN or infinity in {name!r}; a snapshot must be finite")
        if all(torch.equal(p, self.weights_after[name].to(p.device)) for name, p in self.model.named_parameters()):
            raise Unchanged("weights_after equals the model's weights: the client has not trained, nothing can leak")


def observe(model, before, after, image_shape):
    """An Observation from two state dicts of ``model``'s architecture, as a practitioner holds them.

    Raises ValueError, naming the tensor, where ``before`` or ``after`` does not fit the model.
    """
    _check_fit("before", before, model.state_dict())
    model = copy.deepcopy(model)
    model.load_state_dict(before)
    return Observation(model, dict(after), tuple(image_shape), last_layer(model)[0].out_features)


def load_weights(path):
    """Read a state dict from a safetensors file, or from a torch file without running anything in it."""
    from safetensors.torch import load_file

    try:
        foreign = {"weights_only": True, "map_location": "cpu"}
        weights = load_file(path) if str(path).endswith(".safetensors") else torch.load(path, **foreign)
    except FileNotFoundError:
        raise ValueError(f"snapshot {str(path)!r} does not exist") from None
    except Exception as error:
        raise ValueError(
            f"snapshot {str(path)!r} cannot be read as weights ({type(error).__name__}); "
            "it takes a .safetensors file, or a torch file that holds tensors alone"
        ) from None
    return check_weights(f"snapshot {str(path)!r}", weights)


def check_weights(argument, weights):
    """``weights``; ValueError unless they are a state dict of tensors alone."""
    if not isinstance(weights, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in weights.values()):
        kind = f"dict of {_some(list(weights))}" if isinstance(weights, dict) else type(weights).__name__
        raise ValueError(f"{argument} is a {kind}, no state dict of tensors; load_weights reads a file of one")
    return weights


def weight_delta(seen):
    """Δ = W_t - W_{t+1}, one float64 tensor per parameter in the model's order, on the model's device."""
    named = seen.model.named_parameters()
    return [p.detach().double() - seen.weights_after[name].to(p.device).double() for name, p in named]


def rounding_variance(seen):
    """Variance that rounding W_{t+1} to its own dtype adds to each entry of Δ: ulp²/12, one tensor per parameter."""
    variances = []
    for name, _ in seen.model.named_parameters():
        after = seen.weights_after[name]
        ulp = torch.finfo(after.dtype).eps * torch.exp2(after.abs().double().clamp(min=1e-300).log2().floor())
        variances.append(ulp.square() / 12)
    return variances


def rounding_share(seen):
    """The part of ‖Δ‖² that is rounding of W_{t+1}, as far as the observer can tell: nothing explains Δ better than to this misfit.

    A weight that moved by less than its rounding error adds no more than it moved.
    """
    squares = [layer.square() for layer in weight_delta(seen)]
    noise = sum(float(torch.minimum(v, s).sum()) for v, s in zip(rounding_variance(seen), squares))
    return noise / sum(float(s.sum()) for s in squares)


def last_layer(model):
    """The final nn.Linear and the names of its (weight, bias). Raises ValueError where there is none with a bias."""
    linear = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    if not linear or linear[-1][1].bias is None:
        raise ValueError("the model does not end in an nn.Linear layer with bias; class scores must come from one")
    name, module = linear[-1]
    return module, (f"{name}.weight".lstrip("."), f"{name}.bias".lstrip("."))


def last_layer_update(seen):
    """(layer, its part of Δ: weight [K, n], bias [K]), the layer as in ``last_layer``."""
    layer, names = last_layer(seen.model)
    named = update_by_name(seen)
    return layer, *(named[name] for name in names)


def update_by_name(seen):
    """Δ as {parameter's name: tensor}."""
    return dict(zip((name for name, _ in seen.model.named_parameters()), weight_delta(seen)))


def train_locally(
    model,
    images,
    labels,
    *,
    lr,
    steps=1,
    batch_size=None,
    optimizer=torch.optim.SGD,
    options=None,
    clear_gradients=True,
    transmitted=None,
):
    """Train a copy of ``model`` as a FedAvg client does and return what an observer sees of it, an Observation.

    images           [N, C, H, W] in [0, 1].       labels  [N] class indices.
    lr               learning rate η > 0.          steps   number of local optimizer steps E >= 1.
    batch_size       images per step, taken in order and cyclically; None takes all of them in each step.
    optimizer        a class of torch.optim; ``options`` are its further arguments, e.g. {"momentum": 0.9}.
    clear_gradients  False reproduces the released client, whose gradients accumulate over the local steps.
    transmitted      dtype, such as torch.bfloat16, to which all weights are rounded on their way, to the client and back.

    The model given is left as it was. Raises ValueError for data that do not fit it, or numbers out of range;
    FloatingPointError where the client's own training diverged.
    """
    check.in_range("lr", lr, 0, float("inf"), open_low=True)
    model = copy.deepcopy(model)
    model.load_state_dict(rounded(model.state_dict(), transmitted))
    client = copy.deepcopy(model)
    stepper = optimizer(client.parameters(), lr=lr, **(options or {}))
    seen = descend(model, client, stepper, images, labels, steps, batch_size, clear_gradients)
    return replace(seen, weights_after=rounded(seen.weights_after, transmitted))


def descend(model, client, stepper, images, labels, steps=1, batch_size=None, clear_gradients=True):
    """Move ``client``, a copy of ``model``, by ``stepper``, its optimizer; the rest as in ``train_locally``."""
    check.at_least("steps", steps, 1)
    num_classes = _check_data(model, images, labels)
    batch_size = len(images) if batch_size is None else batch_size
    check.at_least("batch_size", batch_size, 1)
    for step in range(steps):
        batch = torch.arange(step * batch_size, (step + 1) * batch_size) % len(images)
        if clear_gradients:
            stepper.zero_grad()
        loss(client(images[batch]), labels[batch]).backward()
        stepper.step()
    weights_after = {name: tensor.detach().clone() for name, tensor in client.state_dict().items()}
    if not all(tensor.isfinite().all() for tensor in weights_after.values()):
        raise FloatingPointError(f"the client's training diverged within {steps} steps; lower lr")
    return Observation(model, weights_after, tuple(images.shape[1:]), num_classes)


def average(snapshots, sizes):
    """FedAvg's server step (McMahan et al. 2017, algorithm 1): the mean of the clients' state dicts weighted by ``sizes``."""
    total = float(sum(sizes))
    mean = {}
    for name, first in snapshots[0].items():
        stacked = torch.stack([snapshot[name].double() * (size / total) for snapshot, size in zip(snapshots, sizes)])
        mean[name] = stacked.sum(0).to(first.dtype)
    return mean


def rounds(model, clients, *, number, train=train_locally, defend=None, **training):
    """FedAvg: yield, for each of ``number`` rounds, (model after the round, the clients' Observations of it).

    clients   a list of (images, labels); each trains locally from the round's model with ``training``,
              the keyword arguments of ``train``.
    defend    what of it is sent: a function (Observation, number of the round, number of the client) -> Observation.
    """
    check.at_least("number", number, 1)
    model = copy.deepcopy(model)  # which leaves gradients behind, and with them all trace of data
    for turn in range(number):
        seen = [train(model, images, labels, **training) for images, labels in clients]
        if defend:
            seen = [defend(each, turn, client) for client, each in enumerate(seen)]
        model = copy.deepcopy(model)
        model.load_state_dict(average([each.weights_after for each in seen], [len(labels) for _, labels in clients]))
        yield model, seen


def rounded(weights, dtype):
    """``weights`` to the precision of ``dtype``, held in their own."""
    if dtype is None:
        return weights
    return {name: w.to(dtype).to(w.dtype) if w.is_floating_point() else w for name, w in weights.items()}


def _check_fit(argument, weights, expected):
    check_weights(argument, weights)
    unlike = {"lacks": [n for n in expected if n not in weights], "has": [n for n in weights if n not in expected]}
    if any(unlike.values()):
        differ = " and ".join(f"{verb} {_some(names)}" for verb, names in unlike.items() if names)
        cure = "; rename its entries, or give snapshots.audit or observe the network that they come from"
        raise ValueError(f"{argument} does not fit the model: it {differ}{cure if argument == 'before' else ''}")
    for what, of in (("shape", lambda tensor: list(tensor.shape)), ("dtype", lambda tensor: tensor.dtype)):
        for name, tensor in expected.items():
            if of(weights[name]) != of(tensor):
                raise ValueError(f"{argument}[{name!r}] has {what} {of(weights[name])}; the model's has {of(tensor)}")


def _check_data(model, images, labels):
    if images.ndim != 4 or len(images) == 0:
        raise ValueError(f"images has shape {tuple(images.shape)}; it takes [N, C, H, W] with N at least 1")
    if labels.shape != images.shape[:1] or labels.is_floating_point():
        raise ValueError(
            f"labels has shape {tuple(labels.shape)} and dtype {labels.dtype}; it takes {len(images)} class indices"
        )
    if not images.isfinite().all():
        raise ValueError("images holds NaN or infinity; pixels lie in [0, 1]")
    num_classes = last_layer(model)[0].out_features
    if labels.min() < 0 or labels.max() >= num_classes:
        raise ValueError(f"labels run from {labels.min()} to {labels.max()}; the model has classes 0 to {num_classes - 1}")
    return num_classes


def _some(names):
    return ", ".join(map(repr, names[:2])) + (f" and {len(names) - 2} more" if len(names) > 2 else "")
