"""Exact recovery of one image from one SGD step: label, learning rate and pixels, with their errors.

    Δ = η (g(x, y) + λ W) + noise,    unknown: image x, learning rate η, and weight decay λ where asked for.

A closed form starts a maximum-likelihood fit under the noise that is really there: the client rounds W_{t+1} to its own
precision, and computes its gradient in that precision. The curvature of the fit is the Fisher information, so it yields the
Cramér-Rao bound; its χ² tells whether the assumptions hold. Nothing here needs ground truth. Everything is float64, images
are flat vectors [n], and each layer has one matrix [O, I]: the weight, with the bias as its last column (``recursion``).
"""

import math
import time
from dataclasses import dataclass, field, replace
from enum import StrEnum
from functools import partial

import torch
from torch.func import vjp

from dlm_core import attacks, check, label_inference, records
from dlm_core.beyond import information, recursion, rounding
from dlm_core.beyond.recursion import PRIOR_MEAN, PRIOR_VARIANCE, signals
from dlm_core.results import ClientEstimate, Evidence, Explains, Reconstruction, Status

CONVERGED = 0.01  # standard errors per unknown: the length of a step too short to matter
IMPLAUSIBLE = 100.0  # χ²/N of the features' fit above which the image is not fitted
FEW_STEPS = 3  # of the fit where no number of them could determine the image
CHI2_RANGE = (0.3, 4.0)  # χ²/N for which the noise model is taken to hold; violations give hundreds and more


class Grade(StrEnum):
    """How far a fit can be trusted."""

    DETERMINED = "determined"
    OVERSTATED = "determined, noise overstated"
    PARTLY = "partly determined"
    REFUTED = "not to be trusted"


@dataclass(frozen=True, kw_only=True)
class Fit(Evidence):
    """The evidence of exact recovery: how well one SGD step on the image explains the update, and what that leaves open.

    Attributes
    ----------
    chi2
        χ²/N, squared residual over noise variance per degree of freedom: 1 where the assumptions hold.
    bound_psnr
        PSNR in dB (data range 1) that the Cramér-Rao bound allows; NaN where the assumptions fail, or unknown.
    pixel_error
        [C, H, W] standard error of each pixel by the same bound.
    identifiable
        How many of the directions in image space the update determines; along the others the image shows a prior, not the
        client's image.
    directions
        C·H·W, all of them.
    grade
        How far to trust the image.
    counted
        Whether ``identifiable`` was computed, and is not just the number of equations.
    """

    chi2: float
    bound_psnr: float
    pixel_error: torch.Tensor = field(repr=False)
    identifiable: int
    directions: int
    grade: Grade
    counted: bool

    @property
    def explains(self) -> Explains:
        """All of the update where the image is determined, nothing where the assumptions fail."""
        if self.grade is Grade.REFUTED:
            return Explains.LITTLE
        return Explains.PARTLY if self.grade is Grade.PARTLY else Explains.FULLY

    @property
    def verdict(self) -> str:
        """The grade with its numbers, and what follows."""
        found = f"chi2/N {self.chi2:.3g}, expected 1"
        if self.grade is Grade.REFUTED:
            return (
                f"not to be trusted: one SGD step on one image does not explain the update ({found}); several local steps, "
                "a batch, momentum, Adam, noise or sparsification would. The image may be shown all the same, the numbers "
                "beside it are wrong; dlm_plus assumes less, interval_dlm is for Adam and its kin"
            )
        if self.grade is Grade.PARTLY:
            most = "" if self.counted else "at most "
            return (
                f"partly determined ({found}): the update fixes {most}{self.identifiable} of {self.directions} directions in "
                "image space; along the others the image shows a prior, not the client's image"
            )
        if self.grade is Grade.OVERSTATED:
            return f"determined, but the noise was overstated ({found}), and with it the errors"
        return (
            f"determined: one SGD step on this image explains the update ({found}); {self.bound_psnr:.1f} dB are possible"
        )


@dataclass(frozen=True)
class _Problem:
    """What is to be explained: per layer the update Δ and the weights 1/σ² of its entries, 0 for those not to be used.

    The unknown x is the image, whose prior ``mean`` shows where no data do, and in the final fit of a first linear layer
    also the client's error in its δ (float32 arithmetic), as all its row shares it: of variance ``error_variance``.
    ``expected`` is χ² at the truth, where that is not the number of entries used.
    """

    layers: list
    label: torch.Tensor
    update: list
    weights: list
    decays: bool
    mean: float | torch.Tensor = PRIOR_MEAN
    error_variance: float = 1.0
    expected: float | None = None

    def above(self, first):
        """The same for the layers from ``first`` on, whose input takes the place of the image."""
        return replace(self, layers=self.layers[first:], update=self.update[first:], weights=self.weights[first:])

    def prior(self, x):
        """(mean, precision) of each entry of x."""
        n = math.prod(self.layers[0].shape)
        mean, precision = torch.zeros_like(x), torch.full_like(x, 1 / PRIOR_VARIANCE)
        mean[:n], precision[n:] = self.mean, 1 / self.error_variance
        return mean, precision

    def dot(self, a, b):
        """Weighted inner product of two updates."""
        return sum((w * p * q).sum() for w, p, q in zip(self.weights, a, b))


@dataclass(frozen=True)
class _Point:
    """The fit at one (x, η, λ): χ², what it would be at the truth, χ² plus prior, minus half the latter's slope in x and in
    (log η, λ), and the parts of the information matrix that concern these: cross [n, 1 or 2], scale [1 or 2, 1 or 2]."""

    x: torch.Tensor
    eta: float
    decay: float
    chi2: float
    expected: float
    merit: float
    slope: torch.Tensor
    scale_slope: torch.Tensor
    cross: torch.Tensor
    scale: torch.Tensor


@records.attack(
    "exact",
    title="exact",
    colour=3,
    marker="*",
    assumes=("that the client took one SGD step on one image",),
    client="one step of SGD on one image, convolution and linear layers: every pixel, and a verdict",
    several=False,
    seeded=False,
    audited=2,
)
def recover(seen, *, weight_decay=False, trusted=None, extra_variance=None, transmitted=None, max_steps=40):
    """Recover image, label and learning rate from one client's single SGD step on a single image. Returns a
    Reconstruction whose evidence is a ``Fit``.

    weight_decay    whether the client may have used weight decay; it is then fitted too.
    trusted         one boolean tensor per parameter, False for coordinates to ignore (sparsified ones); None trusts all.
    extra_variance  one tensor or number per parameter: variance of noise added to Δ beyond rounding (a defence's).
    transmitted     dtype the weights were rounded to on their way, where coarser than the one they are held in.
    max_steps       of the fit; 0 leaves the closed form as it is, with errors that take no account of it.

    Small images that convolutions overdetermine feel errors of the client's arithmetic that the noise model leaves out: at
    η of 0.1 and more the fit ends some dB below its bound there, at 110 dB and more.

    Where the layers offer fewer equations than there are pixels, DLM+ chooses what they leave open; where a single layer
    does, it provides the start. Raises ValueError for a model that is not a stack of supported layers, naming the layer.
    """
    check.at_least("max_steps", max_steps, 0)
    began = time.perf_counter()
    layers = recursion.stack(seen.model, seen.image_shape)
    label = label_inference.infer(seen, trusted=trusted)[0]
    update, guess, weigh = _noise_model(seen, layers, label, trusted, extra_variance, transmitted)
    problem = _Problem(layers, label, update, guess, weight_decay)
    n, equations = math.prod(seen.image_shape), recursion.count_equations(layers)
    features, curvature, plausible = _fit_features(problem, max_steps)
    if equations < n or not _walkable(problem):
        x = attacks.dlm_plus(seen, trusted=trusted, labels=label[None]).images.flatten()
        problem, max_steps = replace(problem, mean=x), min(max_steps, FEW_STEPS) if equations < n else max_steps
    else:
        x = _walk_down(problem, features, curvature.variance)
    start = _with_errors(layers, x), features.eta, features.decay
    point, curvature, status, losses = _fit(problem, start, max_steps if plausible else min(1, max_steps), weigh)
    fit, rate_error = _judge(seen.image_shape, point, curvature, losses, min(equations, n), plausible)
    vouched = fit.grade is Grade.DETERMINED
    estimate = ClientEstimate(
        learning_rate=point.eta, learning_rate_error=rate_error, local_steps=1, weight_decay=point.decay
    )
    return Reconstruction(
        images=point.x[:n].reshape(1, *seen.image_shape),
        labels=label[None],
        status=status,
        vouched=torch.tensor([vouched]),
        evidence=fit,
        client=estimate,
        seconds=time.perf_counter() - began,
    )


def bound(seen, images, labels, learning_rate):
    """Cramér-Rao bound at a known image, as PSNR in dB (data range 1), η granted: for analysis where no attack succeeds.

    images, labels  what the client had, [1, C, H, W] and [1].     learning_rate  η.
    """
    layers = recursion.stack(seen.model, seen.image_shape)
    x = _with_errors(layers, images.double().flatten())
    known = _noise_model(seen, layers, labels[0])[2](x, learning_rate)
    curvature = information.curvature(layers, labels[0], known["weights"], x, learning_rate, known["error_variance"])
    return -10 * math.log10(float(curvature.variance.mean()))


def _noise_model(seen, layers, label, trusted=None, extra_variance=None, transmitted=None):
    """(update, weights, weigh): Δ as matrices, a first guess of the weights of its entries, and how to get them at (x, η)."""
    pack = partial(rounding.pack, seen.model, layers)
    update = pack(seen.delta)
    variance, keep = rounding.transmitted_variance(seen, pack, update, trusted, extra_variance, transmitted)
    scatter = [torch.finfo(torch.float32).eps ** 2 * d.square().mean(1, keepdim=True) for d in update]

    def weigh(x, eta):
        arithmetic, shared, errors = rounding.arithmetic_variance(seen, layers, label, x, pack)
        alone = [v + eta**2 * a for v, a in zip(variance, arithmetic)]
        weights = [k / (v + (repeats - 1) * eta**2 * a) for k, v, a, repeats in zip(keep, alone, arithmetic, shared)]
        expected = sum(float((w * v).sum()) for w, v in zip(weights, alone))
        return {"weights": weights, "error_variance": errors, "expected": expected}

    return update, [k / (v + s) for k, v, s in zip(keep, variance, scatter)], weigh


def _with_errors(layers, x):
    """x with room for the errors of a first linear layer's δ."""
    return torch.cat([x, x.new_zeros(len(layers[0].weight))]) if layers[0].window is None and len(layers) > 1 else x


def _fit_features(problem, max_steps):
    """(point, curvature, plausible) of the fit of the first linear layer's input, from the layers above alone.

    Not plausible: what it leaves unexplained is so far above the noise that fitting more is in vain.
    """
    top = problem.above(_first_linear(problem))
    point, curvature, _, losses = _fit(top, _divide(top), max_steps)
    return point, curvature, losses[-1] < IMPLAUSIBLE


def _walk_down(problem, features, variance):
    """The image, from the first linear layer's input (a _Point) and its ``variance``, convolution by convolution."""
    first, x = _first_linear(problem), features.x
    top = problem.above(first)
    layer, delta = top.layers[0], signals(top.layers, top.label, x)[0][0]
    back = layer.spread(layer.kernel.T @ delta)
    for layer, update, weights in reversed(list(zip(problem.layers, problem.update, problem.weights))[:first]):
        gradient = update / features.eta - features.decay * layer.weight
        x, variance, back = recursion.input_of(layer, x, variance, back, gradient, features.eta**2 * weights)
    return x


def _walkable(problem):
    """Whether each convolution has an equation for each entry of its input: its outputs, and the entries of Δ in use."""
    layers = list(zip(problem.layers, problem.weights))[: _first_linear(problem)]
    sizes = [math.prod(layer.shape) for layer in problem.layers]
    return all(
        above + int((w[:, : len(a.kernel[0])] > 0).sum()) >= size for (a, w), size, above in zip(layers, sizes, sizes[1:])
    )


def _first_linear(problem):
    return next(i for i, layer in enumerate(problem.layers) if layer.window is None)


def _divide(problem):
    """(x, η, λ) from a first linear layer: its input is the ratio of its weight's update to its bias's."""
    layer, update, weights = problem.layers[0], problem.update[0], problem.weights[0]
    if not layer.has_bias:
        raise ValueError(f"layer {layer.name!r} (Linear) has no bias; the first linear layer needs one to be divided by")
    bias = update[:, -1:] * (weights[:, -1:] > 0)
    x = ((weights * update).T @ bias / (weights.T @ bias.square()).clamp(min=1e-300))[:-1, 0]
    return x, *_regress(problem, x)


def _regress(problem, x):
    """(η, λ) that explain the update best, given x."""
    deltas, inputs = signals(problem.layers, problem.label, x)
    gradient = [layer.gradient(d, u) for layer, d, u in zip(problem.layers, deltas, inputs)]
    columns = [gradient, [layer.weight for layer in problem.layers]][: 1 + problem.decays]
    eta, *decay = torch.linalg.lstsq(_gram(problem, columns), _project(problem, columns, problem.update)).solution.tolist()
    eta = max(eta, 1e-12)
    return eta, decay[0] / eta if decay else 0.0


def _fit(problem, start, max_steps, weigh=None):
    """Gauss-Newton from ``start``; returns (point, curvature, stop_reason, losses).

    A curvature serves for further steps (they cost a hundredth) as long as each halves the distance. ``weigh`` gives the
    weights anew for each curvature.
    """
    point, curvature, fresh, losses, length = _evaluate(problem, *start), None, False, [], math.inf
    for _ in range(max_steps):
        if curvature is None:
            if weigh:
                problem = replace(problem, **weigh(point.x, point.eta))
                point = _evaluate(problem, point.x, point.eta, point.decay)
            curvature, fresh = _curvature(problem, point), True
        losses.append(point.chi2 / point.expected)
        step = _newton_step(point, curvature.solve)
        before, length = length, abs(float(point.slope @ step[0] + point.scale_slope @ step[1]))
        if length < CONVERGED**2 * len(point.x):
            return point, curvature, Status.CONVERGED, losses
        trial = _line_search(problem, point, step, shortest=1e-4 if fresh else 1.0)
        if trial is None and fresh:
            return point, curvature, Status.STALLED, losses
        if trial is None or (not fresh and length > before / 4):
            curvature = None
        point, fresh = trial or point, False
    return point, curvature or _curvature(problem, point), Status.BUDGET, losses or [point.chi2 / point.expected]


def _line_search(problem, point, step, shortest):
    """The first of the points at 1, 1/4, 1/16 … of the step that is better, or None."""
    size = 1.0
    while size >= shortest:
        dx, scales = size * step[0], (size * step[1]).tolist()
        eta = point.eta * math.exp(min(scales[0], 10.0))
        decay = point.decay + scales[1] if problem.decays else 0.0
        trial = _evaluate(problem, point.x + dx, eta, decay)
        if trial.merit < point.merit:
            return trial
        size /= 4
    return None


def _evaluate(problem, x, eta, decay):
    (deltas, inputs), pull = vjp(partial(signals, problem.layers, problem.label), x)

    def transpose(matrices):  # Jᵀ of the update's Jacobian J in x, times an update
        each = zip(problem.layers, problem.weights, matrices, deltas, inputs)
        back = [layer.gradient_transpose(w * m, d, u) for layer, w, m, d, u in each]
        return eta * pull(([d for d, _ in back], [u for _, u in back]))[0]

    per_decay = [eta * layer.weight for layer in problem.layers]
    gradient = [layer.gradient(d, u) for layer, d, u in zip(problem.layers, deltas, inputs)]
    expected = [eta * g + decay * w for g, w in zip(gradient, per_decay)]
    residual = [a - b for a, b in zip(problem.update, expected)]
    columns = [expected, per_decay][: 1 + problem.decays]
    chi2 = float(problem.dot(residual, residual))
    mean, precision = problem.prior(x)
    return _Point(
        x=x,
        eta=eta,
        decay=decay,
        chi2=chi2,
        expected=max(1.0, problem.expected or sum(int((w > 0).sum()) for w in problem.weights)),
        merit=chi2 + float((precision * (x - mean).square()).sum()),
        slope=transpose(residual) + precision * (mean - x),
        scale_slope=_project(problem, columns, residual),
        cross=torch.stack([transpose(column) for column in columns], dim=1),
        scale=_gram(problem, columns),
    )


def _curvature(problem, point):
    return information.curvature(problem.layers, problem.label, problem.weights, point.x, point.eta, problem.error_variance)


def _project(problem, columns, update):
    return torch.stack([problem.dot(column, update) for column in columns])


def _gram(problem, columns):
    return torch.stack([_project(problem, columns, column) for column in columns])


def _newton_step(point, solve):
    """(step in x, step in (log η, λ)), the latter eliminated blockwise."""
    free, coupled = solve(point.slope[:, None])[:, 0], solve(point.cross)
    scale_step = torch.linalg.solve(point.scale - point.cross.T @ coupled, point.scale_slope - point.cross.T @ free)
    return free - coupled @ scale_step, scale_step


def _judge(shape, point, curvature, losses, equations, plausible):
    """(the Fit, the standard error of η)."""
    n = math.prod(shape)
    coupled = curvature.solve(point.cross)
    scale_covariance = torch.linalg.inv(point.scale - point.cross.T @ coupled)
    counted = curvature.variance is not None
    if counted:
        variance = curvature.variance + ((coupled[:n] @ scale_covariance) * coupled[:n]).sum(1)
        identifiable = min(equations, round(n - curvature.ridge * float(curvature.variance.sum())))
    else:
        variance, identifiable = torch.full_like(point.x[:n], math.nan), equations
    chi2 = point.chi2 / max(1.0, point.expected - identifiable - len(point.scale))
    fits = plausible and CHI2_RANGE[0] < chi2 < CHI2_RANGE[1]
    if not plausible or (chi2 >= CHI2_RANGE[1] and equations == n):
        grade = Grade.REFUTED
    elif identifiable < n:
        grade = Grade.PARTLY
    else:
        grade = Grade.DETERMINED if fits else Grade.OVERSTATED
    fit = Fit(
        losses=losses,
        loss=losses[-1],
        chi2=chi2,
        bound_psnr=-10 * math.log10(float(variance.mean())) if fits else math.nan,
        pixel_error=variance.sqrt().reshape(shape),
        identifiable=identifiable,
        directions=n,
        grade=grade,
        counted=counted,
    )
    return fit, point.eta * math.sqrt(abs(float(scale_covariance[0, 0])))
