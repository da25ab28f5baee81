"""The noise in Δ: rounding of the weights on their way, and float32 arithmetic in the client.

Per layer one matrix [O, I + 1], or [O, I] without a bias, as in ``stacks``.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, NamedTuple

import torch
from torch import nn

from dlm_core import check
from dlm_core.arrays import Precision
from dlm_core.beyond.recursion import Tensors, signals
from dlm_core.beyond.stacks import Layer
from dlm_core.federated import loss as training_loss
from dlm_core.observation import Observation

# in units in the last place (ulp): what moved less is censored by rounding rather than noisy
RESOLVED = 3.0  # an output unit, root mean square
MOVED = 1.5  # a single entry
# χ²/N for which the noise model is taken to hold; violations give hundreds and more
CHI2_RANGE = (0.3, 4.0)
# What no χ² tests: for two classes p - e_y is a multiple of (1, -1), whatever label and image are.
TWO_CLASSES = (
    "with two classes it need not be one image, as a blend of several may explain the update too, "
    "and η is that of a hard label: a smoothed one gives the same update at another η"
)
# Variance, relative to the square of an entry of Δ, of four roundings in float64: of the client's
# product δ u and its step η g, of our prediction of it, and of the difference.
FLOAT64 = 4 * torch.finfo(torch.float64).eps ** 2 / 12
TINY = 1e-300  # keeps divisors from 0


def _can_be_variances(tensor: torch.Tensor) -> bool:
    return not tensor.is_complex() and bool((tensor.isfinite() & (tensor >= 0)).all())


# Of one entry per parameter, in annotations.
Masks = Sequence[
    Annotated[torch.Tensor, check.Must("of True and False", lambda t: t.dtype == torch.bool)]
]
Variances = Sequence[
    check.NonNegative
    | Annotated[torch.Tensor, check.Must("of finite numbers of at least 0", _can_be_variances)]
]
# What weights were rounded to: all, or some of them by name.
Transmitted = Precision | Mapping[str, Precision]


def precision_of(name: str, transmitted: Transmitted | None) -> torch.dtype | None:
    """The precision that a parameter was rounded to; None where it is its own."""
    return transmitted.get(name) if isinstance(transmitted, Mapping) else transmitted


@dataclass(frozen=True)
class Weighting:
    """How much each entry of Δ counts at one image and learning rate.

    Attributes
    ----------
    weights
        Per layer, 1/σ² of each entry; 0 for those not to be used.
    error_variance
        Of the client's errors in the δ of a first linear layer.
    expected
        χ² at the truth, where that is not the number of entries used; None where it is.
    """

    weights: Tensors
    error_variance: float = 1.0
    expected: float | None = None


class NoiseModel:
    """What is known about the noise in Δ, before and after the image is.

    Parameters
    ----------
    seen, layers, label
        What the observer sees, the network as a stack, the image's class (a scalar).
    trusted, extra_variance, transmitted
        As ``exact.recover`` takes them.

    Attributes
    ----------
    update
        Δ, one matrix per layer.
    variance
        Of each entry, as far as it does not depend on the image.
    keep
        Which entries to use.
    """

    def __init__(
        self,
        seen: Observation,
        layers: Sequence[Layer],
        label: torch.Tensor,
        trusted: Masks | None = None,
        extra_variance: Variances | None = None,
        transmitted: Transmitted | None = None,
    ) -> None:
        self.seen, self.layers, self.label = seen, layers, label
        self.update = pack(seen.model, layers, seen.delta)
        self.variance, self.keep = self._transmitted(trusted, extra_variance, transmitted)

    def guess(self) -> Weighting:
        """The weights before an image is known.

        Arithmetic is taken to have float32's error, relative to an output unit's mean entry.
        """
        eps = torch.finfo(torch.float32).eps
        scatter = [eps**2 * d.square().mean(1, keepdim=True) for d in self.update]
        each = zip(self.keep, self.variance, scatter)
        return Weighting([_precision(k, v + s) for k, v, s in each])

    def at(self, x: torch.Tensor, eta: float) -> Weighting:
        """The weights at image ``x`` [n] (what is longer is cut) and learning rate ``eta``."""
        arithmetic = arithmetic_variance(self.seen, self.layers, self.label, x)
        weights, expected = [], 0.0
        for keep, variance, layer in zip(self.keep, self.variance, arithmetic.layers):
            alone = variance + eta**2 * layer.variance
            # entries that share an error count as one
            weight = _precision(keep, alone + (layer.sharing - 1) * eta**2 * layer.variance)
            expected += float((weight * alone).sum())
            weights.append(weight)
        return Weighting(weights, arithmetic.delta_error_variance, expected)

    def _transmitted(
        self,
        trusted: Masks | None,
        extra_variance: Variances | None,
        transmitted: Transmitted | None,
    ) -> tuple[Tensors, Tensors]:
        """(what of each entry's variance is known without the image, which entries to use).

        Where Δ is below the resolution of the weights, the error of rounding is not noise: it is
        -Δ, for all entries of an output unit alike. Such entries are used only where their output
        unit as a whole is well resolved.
        """
        model, layers = self.seen.model, self.layers
        of_weights = self.seen.rounding_variance
        zeros = [torch.zeros_like(r) for r in of_weights]
        eps = torch.finfo(next(model.parameters()).dtype).eps
        # what a client computed in float64 we have no finer arithmetic to measure it by
        own = FLOAT64 if eps == torch.finfo(torch.float64).eps else 0.0
        coarser = [
            torch.full_like(r, max(1.0, torch.finfo(sent).eps / eps) if sent else 1.0)
            for sent, r in (
                (precision_of(name, transmitted), r)
                for name, r in zip(self.seen.parameter_names, of_weights)
            )
        ]
        every = [z == 0 for z in zeros]
        used = [t.to(e.device) & e for t, e in zip(trusted or every, every)]
        on = self.update[0].device
        extra = [e.to(on) if isinstance(e, torch.Tensor) else e for e in extra_variance or zeros]
        added = [e + z for e, z in zip(extra, zeros)]
        packed = [pack(model, layers, each) for each in (of_weights, coarser, added, used)]
        variances, keep = [], []
        for d, rounding, coarse, extra, mask in zip(self.update, *packed):
            unit = d.square().mean(1, keepdim=True).sqrt()
            # a weight of 0 has no size to be rounded at: that of its unit's update stands in
            rounding = coarse**2 * torch.where(rounding > 0, rounding, (eps * unit) ** 2 / 12)
            ulp = (12 * rounding).sqrt()
            entry_resolved = d.abs() > MOVED * ulp
            unit_resolved = unit > RESOLVED * ulp
            dithered = extra > ulp.square()  # by a defence's noise
            keep.append(mask & (entry_resolved | unit_resolved | dithered))
            variances.append(rounding + extra + own * d.square())
        return variances, keep


def _precision(keep: torch.Tensor, variance: torch.Tensor) -> torch.Tensor:
    """1/σ² of the entries in use, 0 of the others, whose variance may be 0."""
    return torch.where(keep, 1 / variance.clamp(min=TINY), 0.0)


class LayerArithmetic(NamedTuple):
    """The error of one layer's gradient as a client computes it.

    Attributes
    ----------
    variance
        [O, 1] or [O, I + 1], mean square error of its entries.
    sharing
        How many entries share each error.
    """

    variance: torch.Tensor
    sharing: int


class Arithmetic(NamedTuple):
    """The errors of a client's gradient, per layer, and those of a first linear layer's δ."""

    layers: list[LayerArithmetic]
    delta_error_variance: float


def arithmetic_variance(
    seen: Observation, layers: Sequence[Layer], label: torch.Tensor, x: torch.Tensor
) -> Arithmetic:
    """Measure the error of the gradient that the client computes in its own precision.

    Parameters
    ----------
    seen
        What the observer sees.
    layers
        Its network.
    label
        Class index, a scalar.
    x
        [n] the image, where it is measured; what is longer is cut.

    Notes
    -----
    It is computed so, and compared with float64. Errors that many entries share are no independent
    ones:

    - In a convolution the part that all patches share is left out, and with it the softmax's: the
      image hardly feels it.
    - Where the first layer is linear its δ has errors that are unknowns of the fit. They leave each
      product δ_o x_i an error of its own.
    - In every other linear layer whole rows (from δ) or columns (from the features) share theirs.
    """
    x = x[: layers[0].size].to(next(seen.model.parameters()).dtype)
    client, softmax = _as_the_client(seen, layers, label, x)
    exact = signals(layers, label, x.double())
    of_softmax = signals(layers, label, x.double(), softmax)
    errors, delta_error_variance = [], 1.0
    for layer, computed, *either in zip(layers, client, zip(*exact), zip(*of_softmax)):
        delta, u = either[layer.convolves]
        exactly = layer.gradient(delta, u)
        error = computed.double() - exactly
        if layer.convolves:
            errors.append(_of_convolution(layer, error, u))
        elif layer is not layers[0]:
            variance = error.square().mean(1, keepdim=True)
            errors.append(LayerArithmetic(variance, max(error.shape)))
        else:
            if len(layers) > 1:
                common = error[:, -1:]  # the bias's error, which is δ's
                delta_error_variance = _mean_square_of_nonzero(common)
                error = error - layer.gradient(common, u)
            errors.append(_of_products(error, exactly))
    return Arithmetic(errors, max(delta_error_variance, TINY))


def _as_the_client(
    seen: Observation, layers: Sequence[Layer], label: torch.Tensor, x: torch.Tensor
) -> tuple[Tensors, torch.Tensor]:
    """(the gradient in the client's precision, per layer; its softmax [K, 1] as float64)."""
    logits = seen.model(x.reshape(1, *seen.image_shape))
    loss = training_loss(logits, label[None])
    gradient = torch.autograd.grad(loss, list(seen.model.parameters()))
    softmax = logits.detach()[0].softmax(0).double()[:, None]
    return pack(seen.model, layers, gradient), softmax


def _of_convolution(layer: Layer, error: torch.Tensor, u: torch.Tensor) -> LayerArithmetic:
    """Without the part along the sum of all patches, which they share."""
    patches = layer.gradient(torch.ones_like(u[:1]), u)  # their sum [1, I]
    error = error - error @ patches.T @ patches / patches.square().sum()
    return LayerArithmetic(error.square().mean(1, keepdim=True), 1)


def _of_products(error: torch.Tensor, exactly: torch.Tensor) -> LayerArithmetic:
    """Each product δ_o x_i has an error in proportion to it; the bias has none left."""
    variance = error.square().mean(1, keepdim=True)
    without_bias = torch.cat([exactly[:, :-1], torch.zeros_like(exactly[:, -1:])], dim=1)
    products = without_bias.square()
    mean = products.mean(1, keepdim=True).clamp(min=TINY)
    return LayerArithmetic(variance * products / mean, 1)


def _mean_square_of_nonzero(errors: torch.Tensor) -> float:
    nonzero = int((errors != 0).sum())
    return float(errors.square().sum() / max(1, nonzero))


def pack(model: nn.Module, layers: Sequence[Layer], tensors: Sequence[torch.Tensor]) -> Tensors:
    """One matrix per layer, [O, I] or with its bias [O, I + 1], from one tensor per parameter.

    Parameters
    ----------
    model, layers
        The network, and its ``stacks.stack``.
    tensors
        In the order of the model's parameters.
    """
    named = dict(zip((name for name, _ in model.named_parameters()), tensors))
    matrices = []
    for layer in layers:
        parts = [named[f"{layer.name}.weight".lstrip(".")].flatten(1)]
        if layer.has_bias:
            parts.append(named[f"{layer.name}.bias".lstrip(".")][:, None])
        matrices.append(torch.cat(parts, dim=1))
    return matrices


def check_entries(seen: Observation, **given: Sequence[Any] | None) -> None:
    """Raise ValueError unless each argument that is given has one entry per parameter, and its
    tensors the parameters' shapes, or what is broadcast to them.
    """
    parameters = [(name, p.shape) for name, p in seen.model.named_parameters()]
    for argument, entries in given.items():
        if entries is None:
            continue
        if len(entries) != len(parameters):
            raise ValueError(
                f"{argument} has {len(entries)} entries; the model has {len(parameters)} parameters"
            )
        for (name, shape), entry in zip(parameters, entries):
            if not _broadcasts(torch.as_tensor(entry).shape, shape):
                raise ValueError(
                    f"{argument} has a tensor of shape {list(entry.shape)} for the parameter "
                    f"{name!r}, whose shape is {list(shape)}"
                )


def _broadcasts(shape: torch.Size, to: torch.Size) -> bool:
    try:
        return torch.broadcast_shapes(shape, to) == to
    except RuntimeError:
        return False
