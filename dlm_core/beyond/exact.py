"""Exact recovery of one image from one SGD step: label, learning rate, pixels, and their errors.

    Δ = η (g(x, y) + λ W) + noise,    unknown: image x, learning rate η, and weight decay λ where
    asked for.

A closed form starts a maximum-likelihood fit (``likelihood``) under the noise that is really there
(``rounding``): the client rounds W_{t+1} to its own precision, and computes its gradient in that
precision. The curvature of the fit is the Fisher information (``information``), so it yields the
Cramér-Rao bound; its χ² refutes the assumptions where another client's update would differ. Nothing
here needs ground truth. Everything is float64, images are flat vectors [n], and each layer has one
matrix (``stacks``).
"""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum

import torch

from dlm_core import arrays, attacks, check, label_inference, records
from dlm_core.beyond import information, preprocessing, recursion, rounding, stacks
from dlm_core.beyond.likelihood import GaussNewton, Point, Problem, Start
from dlm_core.beyond.rounding import CHI2_RANGE, TWO_CLASSES, NoiseModel
from dlm_core.observation import Observation
from dlm_core.results import ClientEstimate, Evidence, Explains, Reconstruction, Status
from dlm_core.threads import for_network

__all__ = ["CHI2_RANGE", "Fit", "Grade", "Singular", "bound", "recover"]

IMPLAUSIBLE = 100.0  # χ²/N of the features' fit above which the image is not fitted
FEW_STEPS = 3  # of the fit where no number of them could determine the image


class Singular(ValueError, torch.linalg.LinAlgError):
    """Too little of the update is left to solve for the image."""


class Grade(StrEnum):
    """How far a fit can be trusted."""

    DETERMINED = "determined"
    OVERSTATED = "determined, noise overstated"
    PARTLY = "partly determined"
    UNSETTLED = "unsettled"
    REFUTED = "not to be trusted"


@dataclass(frozen=True, kw_only=True)
class Fit(Evidence):
    """The evidence of exact recovery: how well one step explains Δ, and what it leaves open.

    That there was one image is an assumption. χ² refutes it where another client's update differs.
    It need not with two classes, nor where small weights make the mean of two images of one class
    explain the update as well.

    Attributes
    ----------
    chi2
        χ²/N, squared residual over noise variance per degree of freedom: 1 where the assumptions
        hold.
    bound_psnr
        PSNR in dB (data range 1) that the Cramér-Rao bound allows; NaN where the assumptions fail,
        or unknown.
    pixel_error
        [C, H, W] standard error of each pixel by the same bound.
    identifiable
        How many of the directions in image space the update determines; along the others the image
        shows a prior, not the client's image.
    directions
        C·H·W, all of them.
    grade
        How far to trust the image.
    counted
        Whether ``identifiable`` was computed, and is not just the number of equations: behind
        convolutions an image of more than ``information.LARGEST`` entries is *partly* determined
        for that.
    two_classes
        Whether the network tells two classes apart, where χ² tests less.
    """

    chi2: float
    bound_psnr: float
    pixel_error: torch.Tensor = field(repr=False)
    identifiable: int
    directions: int
    grade: Grade
    counted: bool
    two_classes: bool

    @property
    def explains(self) -> Explains:
        """All of the update where the image is determined, nothing where the assumptions fail."""
        if self.grade is Grade.REFUTED:
            return Explains.LITTLE
        in_part = (Grade.PARTLY, Grade.UNSETTLED)
        return Explains.PARTLY if self.grade in in_part else Explains.FULLY

    @property
    def vouches(self) -> bool:
        """Whether the image is said to be the client's."""
        return self.grade is Grade.DETERMINED and not self.two_classes

    @property
    def verdict(self) -> str:
        """The grade with its numbers, and what follows."""
        said = self._said()
        tested = self.grade is Grade.REFUTED or not self.two_classes
        return said if tested else f"{said}; {TWO_CLASSES}"

    def _said(self) -> str:
        found = f"chi2/N {self.chi2:.3g}, expected 1"
        if self.grade is Grade.REFUTED:
            return (
                "not to be trusted: one SGD step on this image does not explain the update "
                f"({found}); several local steps, a batch, another loss, momentum, Adam, noise, "
                "sparsification, gradients in half precision or an update hardly above rounding "
                "would, or an image that the fit did not reach. "
                "The image may be shown all the same, the errors beside it are wrong; "
                "dlm_plus assumes less, interval_dlm is for Adam and its kin"
            )
        most = "" if self.counted else "at most "
        fixed = f"{most}{self.identifiable} of {self.directions} directions in image space"
        if self.grade is Grade.UNSETTLED:
            return (
                f"unsettled: the fit ended before its image explained the update ({found}), which "
                "speaks neither for one SGD step on one image nor against it. The layers have "
                f"equations for {fixed}; the image may be near the client's, its errors are unknown"
            )
        if self.grade is Grade.PARTLY:
            few = "; so low, the noise was overstated or too little moved" * self._overstated
            uncounted = "" if self.counted else " (which of them was not counted at this size)"
            return (
                f"partly determined ({found}{few}): the update fixes {fixed}{uncounted}; "
                "along the others the image shows a prior, not the client's image"
            )
        if self.grade is Grade.OVERSTATED:
            return f"determined, but the noise was overstated ({found}), and with it the errors"
        one = "if it was one image, " * self.two_classes
        return (
            f"determined: one SGD step on this image explains the update ({found}); "
            f"{one}{self.bound_psnr:.1f} dB are possible"
        )

    @property
    def _overstated(self) -> bool:
        return self.chi2 <= CHI2_RANGE[0]


@records.attack(
    "exact",
    title="exact",
    colour=3,
    marker="*",
    assumes=("that the client took one SGD step on one image",),
    client=(
        "one step of SGD on one image, convolution and linear layers: every pixel, and a verdict"
    ),
    several=False,
    seeded=False,
    audited=2,
)
@check.arguments
def recover(
    seen: Observation,
    *,
    weight_decay: bool = False,
    trusted: rounding.Masks | None = None,
    extra_variance: rounding.Variances | None = None,
    transmitted: rounding.Transmitted | None = None,
    max_steps: check.Whole = 40,
) -> Reconstruction:
    """Recover image, label and learning rate from one client's single SGD step on a single image.

    Parameters
    ----------
    seen
        What the observer sees.
    weight_decay
        Whether the client may have used weight decay. It is then fitted too.
    trusted
        One boolean tensor per parameter, False for coordinates to ignore (sparsified ones); None
        trusts all.
    extra_variance
        One tensor or number per parameter, at least 0: variance of noise added to Δ beyond rounding
        (a defence's).
    transmitted
        Precision that the weights were rounded to on their way, where coarser than the one they are
        held in; or of some of them, by name.
    max_steps
        Of the fit, at least 0. 0 leaves the closed form as it is, with errors that take no account
        of it.

    Returns
    -------
    Reconstruction
        Its evidence is a ``Fit``. Of the client it tells nothing where a fit of one step on one
        image does not explain the update (the closed form alone, ``max_steps=0``, still tells η),
        and no error of η where χ² does not test it. η is that of the mean cross-entropy: a loss
        with other weights multiplies it.

    Raises
    ------
    ValueError
        For a model that is not a stack of supported layers, naming the layer; for arguments out of
        range.
    Singular
        Where too little of the update is left to solve for the image: a ValueError, too.

    Notes
    -----
    Where the layers offer fewer equations than there are pixels, DLM+ chooses what they leave open.
    Where it is a single layer that offers too few for its own input, DLM+ provides the start.

    With two classes the update fixes η times the slope of the loss, whatever the loss: η is that of
    cross-entropy with a hard label, and goes without an error, as no χ² tests it.

    Small images that convolutions overdetermine feel errors of the client's arithmetic that the
    noise model leaves out: at η of 0.1 and more the fit ends some dB below its bound there, at 110
    dB and more.
    """
    rounding.check_entries(seen, trusted=trusted, extra_variance=extra_variance)
    began = time.perf_counter()
    network, told = preprocessing.bare(seen)
    with for_network(seen.model):
        layers = stacks.stack(network.model, seen.image_shape)
        label = label_inference.infer(seen, trusted=trusted)[0]
        noise = NoiseModel(network, layers, label, trusted, extra_variance, transmitted)
        prior = _prior(seen)
        problem = Problem(layers, label, noise.update, noise.guess(), weight_decay, *prior)
        try:
            fit, evidence, client = _fit(seen, problem, noise, trusted, max_steps)
        except torch.linalg.LinAlgError:
            every = sum(w.numel() for w in problem.weights)
            in_use = sum(int((w > 0).sum()) for w in problem.weights)
            raise Singular(
                "weights_after leaves too little to solve for the image: the equations of those "
                f"weights that moved by more than their rounding, {in_use} of {every}, have no one "
                "solution"
            ) from None
    images = fit.point.x[: evidence.directions].reshape(1, *seen.image_shape)
    return Reconstruction(
        images=images if told is None else told.pixels(images),
        labels=label[None],
        status=fit.status,
        vouched=torch.tensor([evidence.vouches], device=fit.point.x.device),
        evidence=evidence,
        client=client,
        seconds=time.perf_counter() - began,
    )


@check.arguments
def bound(
    seen: Observation, images: arrays.Images, labels: arrays.Labels, learning_rate: check.Positive
) -> float:
    """Return the Cramér-Rao bound at a known image, as PSNR in dB (data range 1), η granted.

    It is for analysis where no attack succeeds.

    Parameters
    ----------
    seen
        What the observer sees.
    images
        [1, C, H, W] in [0, 1], what the client had.
    labels
        [1] its class index.
    learning_rate
        η > 0 of the client's one step.

    Raises
    ------
    ValueError
        For a model that is not a stack of supported layers; for arguments of another shape or out
        of range.
    """
    if tuple(images.shape) != (1, *seen.image_shape):
        allowed = [1, *seen.image_shape]
        raise ValueError(f"images has shape {list(images.shape)}; the bound takes one, {allowed}")
    if tuple(labels.shape) != (1,):
        raise ValueError(f"labels has shape {list(labels.shape)}; the bound takes one, [1]")
    if labels[0] >= seen.num_classes:
        raise ValueError(f"labels is [{int(labels[0])}]; the model has {seen.num_classes} classes")
    network, told = preprocessing.bare(seen)
    with for_network(seen.model):
        layers = stacks.stack(network.model, seen.image_shape)
        pixels = arrays.for_model(images, network.model).double()
        values = pixels if told is None else told.values(pixels)
        x = _with_errors(layers, values.flatten())
        known = NoiseModel(network, layers, labels[0]).at(x, learning_rate)
        curvature = information.curvature(
            *(layers, labels[0], known.weights, x, learning_rate, known.error_variance),
            prior_variance=_prior(seen)[1],
        )
        if curvature.variance is None:
            raise ValueError(
                f"images has {x.numel()} entries; before a convolution the bound takes up to "
                f"{information.LARGEST}"
            )
        return _psnr(_of_pixels(curvature.variance, seen))


def _fit(
    seen: Observation,
    problem: Problem,
    noise: NoiseModel,
    trusted: rounding.Masks | None,
    max_steps: int,
) -> tuple[GaussNewton, Fit, ClientEstimate]:
    """(the fit of the image, its evidence, what it says of the client)."""
    layers = problem.layers
    features = _fit_features(problem, max_steps)
    plausible = features.losses[-1] < IMPLAUSIBLE
    steps = max_steps if plausible else min(1, max_steps)
    equations = recursion.count_equations(layers)
    enough = equations >= layers[0].size
    if enough and _walkable(problem):
        image = _walk_down(problem, features)
    else:
        found = attacks.dlm_plus(seen, trusted=trusted, labels=problem.label[None])
        told = preprocessing.told_to(seen.model)
        image = (found.images if told is None else told.values(found.images)).flatten()
        problem = replace(problem, mean=image)
        steps = steps if enough else min(steps, FEW_STEPS)

    start = Start(_with_errors(layers, image), features.point.eta, features.point.decay)
    fit = GaussNewton(problem, start, weigh=noise.at).run(steps)
    evidence, rate_error = _judge(seen, fit, equations, plausible)
    unsettled = evidence.grade is Grade.UNSETTLED
    if evidence.grade is Grade.REFUTED or unsettled and max_steps > 0:
        return fit, evidence, ClientEstimate()
    untold = evidence.two_classes or unsettled
    client = ClientEstimate(
        learning_rate=fit.point.eta,
        learning_rate_error=None if untold or math.isnan(rate_error) else rate_error,
        local_steps=1,
        weight_decay=fit.point.decay if problem.decays else None,
    )
    return fit, evidence, client


def _fit_features(problem: Problem, max_steps: int) -> GaussNewton:
    """The fit of the first linear layer's input, from the layers above alone."""
    top = problem.above(stacks.first_linear(problem.layers))
    x = _divide(top)
    return GaussNewton(top, Start(x, *top.scales(x))).run(max_steps)


def _divide(problem: Problem) -> torch.Tensor:
    """A first linear layer's input: the ratio of its weight's update to its bias's."""
    layer, update, weights = problem.layers[0], problem.update[0], problem.weights[0]
    if not layer.has_bias:
        raise ValueError(
            f"layer {layer.name!r} (Linear) has no bias; "
            "the first linear layer needs one to be divided by"
        )
    bias = update[:, -1:] * (weights[:, -1:] > 0)
    numerator = (weights * update).T @ bias
    denominator = weights.T @ bias.square()
    ratio = numerator / denominator.clamp(min=rounding.TINY)
    return ratio[:-1, 0]


def _walkable(problem: Problem) -> bool:
    """Whether each convolution has an equation for each entry of its input.

    Its outputs are equations, and so are the entries of Δ in use.
    """
    for depth in range(stacks.first_linear(problem.layers)):
        layer, above = problem.layers[depth], problem.layers[depth + 1]
        entries = layer.kernel.shape[1]
        in_use = int((problem.weights[depth][:, :entries] > 0).sum())
        if above.size + in_use < layer.size:
            return False
    return True


def _walk_down(problem: Problem, features: GaussNewton) -> torch.Tensor:
    """The image [n], from the first linear layer's input, convolution by convolution."""
    first = stacks.first_linear(problem.layers)
    point = features.point
    layer = problem.layers[first]
    deltas, _ = recursion.signals(problem.layers[first:], problem.label, point.x)
    back = layer.spread(layer.kernel.T @ deltas[0])
    variance = features.final_curvature.variance
    assert variance is not None  # the curvature of a linear layer's input is always formed
    found = recursion.Recovered(point.x, variance, back)
    for depth in reversed(range(first)):
        layer = problem.layers[depth]
        gradient = problem.update[depth] / point.eta - point.decay * layer.weight
        weights = point.eta**2 * problem.weights[depth]
        prior = () if depth else (problem.mean, problem.prior_variance)
        found = recursion.input_of(layer, found, gradient, weights, *prior)
    return found.x


def _with_errors(layers: Sequence[stacks.Layer], x: torch.Tensor) -> torch.Tensor:
    """x with room for the errors of a first linear layer's δ, where another layer follows it."""
    if layers[0].convolves or len(layers) == 1:
        return x
    return torch.cat([x, x.new_zeros(len(layers[0].weight))])


def _judge(
    seen: Observation, fit: GaussNewton, equations: int, plausible: bool
) -> tuple[Fit, float]:
    """(the evidence, the standard error of η; NaN where arithmetic does not tell it)."""
    if not fit.fresh:  # errors are those at the image that was found
        fit.refresh()
    point, curvature = fit.point, fit.final_curvature
    n = math.prod(seen.image_shape)
    equations = min(equations, n)
    coupled = curvature.solve(point.cross)
    of_scale = point.scale - point.cross.T @ coupled
    separable = bool((torch.linalg.eigvalsh(of_scale) > 0).all())
    scale_covariance = torch.linalg.inv(of_scale) if separable else of_scale * math.nan
    counted = curvature.variance is not None
    if curvature.variance is None:
        variance = torch.full_like(point.x[:n], math.nan)
        identifiable = equations
    else:
        # what not knowing η and λ adds
        of_scales = ((coupled[:n] @ scale_covariance) * coupled[:n]).sum(1)
        variance = curvature.variance + of_scales
        undetermined = float(curvature.variance.sum()) / fit.problem.prior_variance
        identifiable = min(equations, round(n - undetermined))
    chi2 = point.chi2 / _degrees_of_freedom(point, identifiable)
    # where equations are few the fit is short, and led by a prior
    cut_short = fit.status is Status.BUDGET or equations < n
    explained = plausible and CHI2_RANGE[0] < chi2 < CHI2_RANGE[1]
    evidence = Fit(
        losses=fit.losses,
        loss=fit.losses[-1],
        chi2=chi2,
        bound_psnr=_psnr(_of_pixels(variance, seen)) if explained else math.nan,
        pixel_error=_of_pixels(variance, seen).sqrt().reshape(seen.image_shape),
        identifiable=identifiable,
        directions=n,
        grade=_grade(chi2, plausible, identifiable < n or not counted, cut_short),
        counted=counted,
        two_classes=seen.num_classes == 2,
    )
    return evidence, point.eta * math.sqrt(float(scale_covariance[0, 0]))


def _prior(seen: Observation) -> tuple[float | torch.Tensor, float]:
    """(mean, variance) of what the network sees of a pixel that is uniform on [0, 1].

    Where channels are normalised unlike, one variance is taken for all, with which the mean over
    pixels is right.
    """
    told = preprocessing.told_to(seen.model)
    if told is None:
        return recursion.PRIOR_MEAN, recursion.PRIOR_VARIANCE
    grey = torch.full(tuple(seen.image_shape), recursion.PRIOR_MEAN, dtype=torch.float64)
    mean = told.values(grey.to(next(seen.model.parameters()).device)).flatten()
    return mean, recursion.PRIOR_VARIANCE / told.error**2


def _of_pixels(variance: torch.Tensor, seen: Observation) -> torch.Tensor:
    """The variance of each pixel [n], from that of what the network sees of it (what is longer is
    cut).
    """
    told = preprocessing.told_to(seen.model)
    if told is None:
        return variance
    errors = variance[: math.prod(seen.image_shape)].sqrt().reshape(seen.image_shape)
    return told.errors(errors).square().flatten()


def _degrees_of_freedom(point: Point, identifiable: int) -> float:
    """Entries in use, less what was fitted to them."""
    return max(1.0, point.expected - identifiable - len(point.scale))


def _grade(chi2: float, plausible: bool, open_directions: bool, cut_short: bool) -> Grade:
    low, high = CHI2_RANGE
    if not plausible:
        return Grade.REFUTED
    if not chi2 < high:  # a fit that was still under way refutes nothing
        return Grade.UNSETTLED if cut_short else Grade.REFUTED
    if open_directions:
        return Grade.PARTLY
    return Grade.DETERMINED if low < chi2 else Grade.OVERSTATED


def _psnr(variance: torch.Tensor) -> float:
    """In dB, for data of range 1, at this variance of each pixel."""
    return -10 * math.log10(float(variance.mean()))
