"""What the update of one linear layer says about what passed through it, also in words."""

import math
from dataclasses import dataclass, field

import torch

from dlm_core.beyond import ratios
from dlm_core.beyond.tracing import NOISE

SHRUNK = 0.5  # of the weights, from which what was taken off them is no decay


@dataclass(frozen=True, kw_only=True)
class LayerInput:
    """What the update of one linear layer says about what passed through it.

    Attributes
    ----------
    name
        Of the layer.
    features, outputs
        Numbers in one input, and in what the layer makes of it.
    rank
        Directions in the layer's update above rounding, 0 where it did not move.
    standing
        Those of them that stand out over what a little weight decay, half precision on the way or
        the rounding of many steps leave, which falls without a gap.
    rows
        Inputs that pass through it for one image: 1, or its patches or tokens.
    pixels
        Whether its input is the pixels of an image, perhaps in another order and normalised by the
        network; then nothing but another image gives another input.
    fixed
        Whether no parameter stands in front of it, so that several steps on an image leave its
        input.
    values
        [features] float64, the input itself where ``rank`` and ``rows`` are 1, or where of an
        image's pixels one direction ``standing`` is much the largest, or by ``entries``; of a layer
        without bias, or whose bias moved by no more than rounding or is ``bias_apart``, its
        direction, of length 1. None elsewhere.
    error
        Root mean square error of ``values`` from rounding and from what else is in the update,
        relative to their root mean square; of ``shared`` the largest.
    scaled
        Whether the length of ``values`` is known: the layer has a bias, and it moved by more than
        its rounding.
    single
        Whether the layer's update tells one input from several; else ``values`` may be a weighted
        mean of several that are alike to it.
    alone
        Whether it does, and neither another layer nor its mean (``centred``) speaks against it.
    mixed
        How far, relative, inputs of several images are from each other, where all images' inputs
        are so alike that a mean of them would not show; 0 where it would. Of smooth random images.
    one_row
        Whether only one of its outputs moved: then any update has rank one, and a change of its
        entries does not show.
    decay
        What multiple of the weights was taken off the update, as weight decay leaves it: the
        learning rate times λ; 0 where none was found.
    signs
        Whether ``values`` are all of one size but for zeros: they may be an input's signs, which
        Adam's kin leave.
    odd
        The one output whose row moved against all others, where there is one among three or more:
        of a last layer, the label's.
    still
        Numbers of the input that moved no weight, which are 0 in ``values``: the input is 0 there,
        or the client did not train them.
    untrained
        Whether it did not: the network itself has no weight there, or a later layer's input is not
        that of this image.
    disputed
        Whether the image or the input that it or an earlier layer shows leaves other inputs of
        later layers than their updates show: then weight and bias did not move by one gradient at
        one rate, and ``values`` may be a multiple or a projection of the input.
    confirmed
        Whether later layers' updates speak of this length of ``values``; or, where chance keeps
        them from it, of another layer's. Else they are a multiple of the input if weight and bias
        had two rates.
    centred
        Whether ``values`` have a mean of 0, though inputs there have another: then a client that
        takes the mean off each row of its gradient left what else is in the input.
    bias_apart
        Whether the weight's update has one direction and the bias's is another: it moved by another
        rule, or by further images that are multiples of one or black.
    transposed
        Whether, of a square weight whose update has one direction, the bias moved as its columns
        did: the weight was sent the other way round, and nothing is told.
    bias_alone
        Whether the bias moved and the weight did not: its input was 0, or it was not trained.
    entries
        Whether ``values`` were read entry by entry, as others were changed one by one.
    image
        [1, C, H, W] where ``values`` are ``pixels``: in the client's own range, whatever that is.
        None elsewhere.
    patches
        How many, where ``values`` were solved for by their positions; 0 elsewhere.
    open
        Directions among these that the update leaves open; of ``entries`` the numbers on which they
        do not agree.
    shared
        Where there are no ``values``: inputs that several outputs each show by themselves.
    images
        [k, C, H, W] these, where they are ``pixels``; None elsewhere.
    combined
        Whether they may be sums and differences of inputs as well: where the scores are one or two,
        or they are more than the directions of the weight's update.
    faint
        [1, C, H, W] where ``values`` are the direction of ``pixels``: with 1 for the largest; None
        elsewhere.
    """

    name: str
    features: int
    outputs: int
    rank: int
    standing: int
    rows: int
    pixels: bool
    fixed: bool
    values: torch.Tensor | None = field(repr=False, default=None)
    error: float = math.nan
    scaled: bool = True
    single: bool = False
    alone: bool = False
    mixed: float = 0.0
    one_row: bool = False
    decay: float = 0.0
    signs: bool = False
    odd: int | None = None
    still: int = 0
    untrained: bool = False
    disputed: bool = False
    confirmed: bool = False
    centred: bool = False
    bias_apart: bool = False
    transposed: bool = False
    bias_alone: bool = False
    entries: bool = False
    image: torch.Tensor | None = field(repr=False, default=None)
    patches: int = 0
    open: int = 0
    shared: list[ratios.Shared] = field(repr=False, default_factory=list)
    images: torch.Tensor | None = field(repr=False, default=None)
    combined: bool = False
    faint: torch.Tensor | None = field(repr=False, default=None)

    @property
    def pictures(self) -> torch.Tensor | None:
        """[N, C, H, W], what it shows of images."""
        return next((p for p in (self.images, self.image, self.faint) if p is not None), None)

    @property
    def directions(self) -> int:
        """Inputs, at least, that left the update, unless the client changed it entry by entry; 0
        where that says nothing, since the rank is full or an image has several inputs here.
        """
        if self.transposed:
            return 0
        full = self.rank >= min(self.outputs, self.features)
        return 0 if self.rows > 1 or (full and self.rank > 1) else self.standing

    @property
    def linear(self) -> bool:
        """Whether gradients alone moved it: fewer directions than it has room for, and no signs."""
        few = 0 < self.rank < min(self.outputs, self.features)
        return few and not (self.signs or self.transposed)

    @property
    def halved(self) -> bool:
        """Whether ``values`` stand alone in an update of full rank, whose rest is what arithmetic
        in half precision leaves.
        """
        full = self.rank == min(self.outputs, self.features) > 1
        told = self.values is not None and not (self.entries or self.signs)
        return told and full and self.standing == 1

    @property
    def told(self) -> str | None:
        """The inputs that it shows, in words; None for none."""
        return self._by_rows() if self.values is None else self._shown()

    @property
    def sentence(self) -> str | None:
        """What it says, in words; None for nothing."""
        if self.values is not None:
            return self.told
        if self.transposed:
            return (
                f"the weight of layer {self.name!r} seems to be transposed: the bias moved as the "
                "weight's columns did, where PyTorch has rows for outputs (Keras has them the "
                "other way round); its input is not read"
            )
        if self.bias_alone:
            black = " (a black image)" if self.pixels else ""
            return (
                f"the bias of layer {self.name!r} moved and its weight did not: its input was 0"
                f"{black}, or the client did not train this weight"
            )
        said = [self._several(), self._by_rows(), self._silhouette()]
        return ". ".join(filter(None, said)) or None

    def _silhouette(self) -> str | None:
        if not (self.pixels and 0 < self.still < self.features) or self.untrained:
            return None
        return (
            f"{self.still:,} of the {self.features:,} weights' columns of layer {self.name!r} did "
            "not move: so many pixels are black in all of the client's images, or so dark that "
            "rounding or thinning took their moves away, unless it did not train these"
        )

    def _by_rows(self) -> str | None:
        if not self.shared:
            return None
        what = "image" if self.pixels else "input"
        many = len(self.shared) > 1
        kinds = " or ".join(f"{each}s" for each in (what, *["mixture"] * self.combined))
        shown = f"{len(self.shared)} {kinds}" if many else f"an {what}"
        moved = ", ".join(str(each.outputs) for each in self.shared)
        mean = "a sum or a difference" if self.combined else "a mean"
        return (
            f"{shown} of layer {self.name!r} ({self.features:,} numbers{' each' * many}) "
            f"stand{'s' * (not many)} in the update, "
            f"to {self.error:.0e}, by outputs that agree ({moved} of {self.outputs:,}): one input "
            f"alone moved these, or {mean} of several for which the loss's slopes are alike"
        )

    def _several(self) -> str | None:
        if self.directions < 2:
            return None
        of = "images" if self.pixels and self.fixed else "images or steps"
        return (
            f"the update of layer {self.name!r} has {self.directions} directions: so many inputs "
            f"or more are in it, of several {of}, or of earlier ones that momentum has kept, "
            "unless its entries were changed one by one (Adam's kin, clipping by value, "
            "sparsifying, quantising, half precision)"
        )

    def _shown(self) -> str:
        if self.patches:
            return self._by_patches()
        which = "the image, " if self.pixels else ""
        beside = f" beside {self._beside}" if self.decay else ""
        said = (
            f"the input of layer {self.name!r} ({which}{self.features:,} numbers) "
            f"stands in the update{beside}, {self._to}"
        )
        if self.centred:
            return (
                f"{said}, but for its mean: its numbers add up to 0, as where the client takes the "
                "mean off its gradients' rows, or off each of its images"
            )
        if self.bias_apart:
            return (
                f"{said}: the weight's update has one direction, and the bias moved by another "
                "rule, or by further images that are darker copies of it or black; or an optimizer "
                "of low rank left this mixture of several inputs; or an optimizer that scales "
                "columns, as Adafactor does, scaled its numbers one by one"
                f"{self._mixture * self.signs}"
            )
        if self.entries:
            return f"{said}, {self._agreeing}"
        mixture = "" if self.single else self._mixture
        if not self.scaled:
            said += (
                " (or a projection of it, if the client trains adapters or by an optimizer of low "
                "rank)"
            )
        if self.untrained:
            return f"{said}{self._but_for}{mixture}"
        if self.disputed:
            return (
                f"{said}, or a multiple or a projection of it, or of several: layers' updates do "
                "not agree on one image, as where the client sets rates or clips tensor by tensor, "
                f"projects its updates, or trains adapters{mixture}"
            )
        if self.scaled and not self.confirmed:
            said += (
                " (or a multiple of it, if the client's rates for weight and bias differ: nothing "
                "else in the update fixes its length)"
            )
        return f"{said}{mixture}{self._zeros * bool(self.pixels and self.still)}"

    @property
    def _but_for(self) -> str:
        """Which of its numbers are not told, and what the others may be."""
        scaled = (
            "; or all of it is a multiple of the input, as of two rates, or scaled number by "
            "number, as by an optimizer that scales columns"
        )
        return (
            f", but for {self.still:,} of them. Their weights did not move: the client did not "
            "train these, which are not 0 then as they seem, unless it took its gradients at other "
            "weights than W_t, as SAM does, or gave the network more than an image"
            f"{scaled * (not self.confirmed)}"
        )

    @property
    def _agreeing(self) -> str:
        """How its entries show it."""
        unmoved = f". {self.still:,} of these numbers moved no weight: they are 0, or left out"
        apart = f". On {self.open:,} of them the entries do not agree: they are 0 here"
        return (
            "by the entries that agree on it: others were changed one by one, as clipping by value "
            f"or a mask changes them{self._mixture}{unmoved * bool(self.still)}"
            f"{apart * bool(self.open)}"
        )

    def _by_patches(self) -> str:
        of = f"layer {self.name!r} and of the {self.patches:,} patches' positions"
        left = (
            f", but for {self.open:,} of {self.patches:,} directions among its patches, along "
            "which it is 0"
        )
        unsure = " (or a multiple of it: no later layer's input speaks of its length)"
        return (
            f"the image ({self.features:,} numbers) stands in the updates of {of}, to "
            f"{self.error:.0e}{left * bool(self.open)}"
            f"{unsure * (not self.confirmed and not self.open)}"
            f"{(not self.single) * self._mixture}"
        )

    @property
    def _zeros(self) -> str:
        """What the pixels are whose weights did not move."""
        assert self.values is not None
        said = f". Of these numbers {self.still:,} are 0, as their weights did not move. "
        lowest, size = self.values.min(), self.values.square().mean().sqrt()
        if lowest < -NOISE * self.error * size:
            return f"{said}Others are below 0, so these need not be black"
        return f"{said}They are black, unless the client did not train them"

    @property
    def _to(self) -> str:
        """How exactly."""
        known = f"to {self.error:.0e}" if self.scaled else f"up to its length, to {self.error:.0e}"
        if self.mixed <= self.error:
            return known
        return (
            f"{known} if one image left it. A mean of several images' inputs would look the same "
            f"here, and be off by about {self.mixed:.0e}"
        )

    @property
    def _mixture(self) -> str:
        """What else than one input may stand in the update."""
        if self.signs:
            return (
                ", or only the signs of its numbers, as Adam and its kin leave them; "
                "and several inputs may have left them"
            )
        changed = (
            ", or what noise, quantising or sparsifying made of it, which does not show where only "
            "one output moved"
        )
        return (
            ", or a mean of several inputs or a difference between them, "
            f"which this update cannot tell apart{changed * self.one_row}"
        )

    @property
    def _beside(self) -> str:
        """What multiple of the weights was taken off, in words."""
        if 0 < self.decay < SHRUNK:
            return f"weight decay of {self.decay:.2g}·W"
        return f"weights that were scaled by {1 - self.decay:.7g}, which is no weight decay"
