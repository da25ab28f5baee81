"""Networks of the kinds that people federate, small: that of beginners' tutorials, one like VGG and
a vision transformer.

Their own initial weights are PyTorch's: ``models.build("tutorial", …, init="default")``, which
knows them once this module is imported.
"""

import torch
from torch import nn

from dlm_core import check, records
from dlm_core.arrays import ImageShape
from dlm_core.beyond.attention import plain_attention
from dlm_core.models import Classes


@records.network("tutorial", title="tutorials' CNN")
@check.arguments
def tutorial(image_shape: ImageShape, num_classes: Classes) -> nn.Sequential:
    """The network of PyTorch's and Flower's tutorials: two convolutions 5x5 of 6 and 16 channels,
    each with ReLU and max-pooling, and linear layers of 120 and 84 units.

    Parameters
    ----------
    image_shape, num_classes
        As in ``models.build``; height and width at least 16. Of (3, 32, 32) and 10 classes it has
        62,006 weights.

    Raises
    ------
    ValueError
        For a smaller image.
    """
    channels, *sides = image_shape
    check.at_least("height and width of image_shape", min(sides), 16)
    height, width = (((side - 4) // 2 - 4) // 2 for side in sides)
    return nn.Sequential(
        *(nn.Conv2d(channels, 6, 5), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()),
        *(nn.Linear(16 * height * width, 120), nn.ReLU()),
        *(nn.Linear(120, 84), nn.ReLU()),
        nn.Linear(84, num_classes),
    )


@records.network("vgg", title="VGG, small")
@check.arguments
def vgg(image_shape: ImageShape, num_classes: Classes, *, width: check.Count = 16) -> nn.Sequential:
    """Three stages of two convolutions 3x3 with ReLU and max-pooling, and two linear layers.

    Parameters
    ----------
    image_shape, num_classes
        As in ``models.build``; height and width at least 8.
    width
        Channels of the first stage, at least 1; each further one has twice as many. The hidden
        linear layer has eight times as many units. VGG-16's first stage has 64.

    Raises
    ------
    ValueError
        For a smaller image.

    Notes
    -----
    After Simonyan and Zisserman, *Very deep convolutional networks for large-scale image
    recognition*, ICLR 2015.
    """
    last, *sides = image_shape
    check.at_least("height and width of image_shape", min(sides), 8)
    layers: list[nn.Module] = []
    for stage in range(3):
        for _ in range(2):
            layers += [nn.Conv2d(last, width << stage, 3, padding=1), nn.ReLU()]
            last = width << stage
        layers.append(nn.MaxPool2d(2))
    features = last * (sides[0] // 8) * (sides[1] // 8)
    hidden = 8 * width
    layers += [nn.Flatten(), nn.Linear(features, hidden), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(hidden, num_classes))


class Transformer(nn.Module):
    """A vision transformer: a linear layer on patches, a learned position of each, blocks of
    attention, and a linear layer on the patches' mean.

    Parameters
    ----------
    image_shape, num_classes
        As in ``models.build``.
    patch
        Side of the patches, which divides height and width.
    width
        Numbers that stand for a patch, a multiple of ``heads``.
    blocks, heads
        Blocks, and heads of each one's attention.
    """

    def __init__(
        self,
        image_shape: ImageShape,
        num_classes: int,
        patch: int,
        width: int,
        blocks: int,
        heads: int,
    ) -> None:
        super().__init__()
        channels, height, width_of_image = image_shape
        count = (height // patch) * (width_of_image // patch)
        self.patches = nn.Unfold(patch, stride=patch)
        self.embed = nn.Linear(channels * patch**2, width)
        self.position = nn.Parameter(0.02 * torch.randn(count, width))
        self.blocks = nn.Sequential(
            *(
                nn.TransformerEncoderLayer(
                    *(width, heads, 2 * width),
                    dropout=0.0,
                    activation="gelu",
                    batch_first=True,
                    norm_first=True,
                )
                for _ in range(blocks)
            )
        )
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, num_classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """[B, C, H, W] -> [B, classes]."""
        embedded = self.embed(self.patches(images).transpose(1, 2)) + self.position
        with plain_attention():  # attacks differentiate its gradients
            return self.head(self.norm(self.blocks(embedded)).mean(1))


@records.network("vit", title="ViT, small")
@check.arguments
def vit(
    image_shape: ImageShape,
    num_classes: Classes,
    *,
    patch: check.Count = 4,
    width: check.Count = 64,
    blocks: check.Count = 2,
    heads: check.Count = 4,
) -> nn.Module:
    """A small vision transformer, whose first layer is linear in each patch.

    Parameters
    ----------
    image_shape, num_classes
        As in ``models.build``.
    patch
        Side of the patches, which divides height and width.
    width
        Numbers that stand for a patch, a multiple of ``heads``.
    blocks, heads
        Blocks, and heads of each one's attention, at least 1.

    Raises
    ------
    ValueError
        For sizes that do not divide one another.

    Notes
    -----
    After Dosovitskiy et al., *An image is worth 16x16 words*, ICLR 2021; the mean of the patches
    instead of a class token, and no dropout.
    """
    for side in image_shape[1:]:
        if side % patch:
            raise ValueError(f"patch is {patch}; it must divide the image's sides, one is {side}")
    if width % heads:
        raise ValueError(f"heads is {heads}; it must divide the width, {width}")
    return Transformer(image_shape, num_classes, patch, width, blocks, heads)
