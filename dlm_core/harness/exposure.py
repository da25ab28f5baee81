"""How much a client's update would tell of its own images: their owner's audit, before any attack.

The client's images are known here, as no attacker knows them. What it sends is not asked for: the
update follows from images, weights and training.
"""

import copy
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from torch import nn

from dlm_core import check, records
from dlm_core.arrays import Images, Labels, Precision
from dlm_core.beyond import fisher, preprocessing
from dlm_core.beyond.fisher import Information, Prior
from dlm_core.defenses import Setting
from dlm_core.harness import (
    clues,
    files,
    networks,
    pictures,
    registry,  # noqa: F401, it fills the tables
    written,
)
from dlm_core.harness.tables import counted
from dlm_core.weights import StateDict

SCHEMA = "dlm-bound/1"
PRIORS: tuple[Prior, ...] = ("white", "smooth")
HALF = {torch.float16, torch.bfloat16}
FIXED = {"half a grey level": fisher.HALF_GREY, "0.05": 0.05}


@dataclass(frozen=True)
class Exposure:
    """What an update would tell, in numbers and words.

    Attributes
    ----------
    information
        All of it, as ``information.of_update`` returns it.
    notes
        What was done to the weights' file, a precision that was taken for the client's, who looks
        on, and whether the network draws at random.
    """

    information: Information
    notes: Sequence[str] = ()

    def map(self, prior: Prior = "smooth") -> torch.Tensor:
        """[N, 1, H, W] where the images are exposed, as ``Information.map`` has it.

        Parameters
        ----------
        prior
            "white" or "smooth".
        """
        return self.information.map(prior)

    @property
    def lines(self) -> list[str]:
        """In sentences."""
        found = self.information
        about = "about " * found.estimated
        counts = [f"{about}{found.directions(std):,} to {name}" for name, std in FIXED.items()]
        white, smooth = (found.posterior(name) for name in PRIORS)
        share = ", ".join(f"{name!r} {count:,.0f}" for name, count in _sorted(white))
        return [
            f"of {found.size:,} directions of {counted(len(white.variance), 'image')}, pixels and "
            f"combinations of them, the update fixes {' and '.join(counts)} of the range",
            f"it tells more than a prior of pixels that are independent of "
            f"{about}{found.better_than_prior:,}",
            f"in the mean over the images that a prior draws, no attacker passes {white.psnr:.1f} "
            f"dB where pixels are independent, and {smooth.psnr:.1f} dB where images are as smooth "
            "as natural ones, as far as the update is linear in them; from about 20 dB on a "
            "picture shows what it is of",
            "that is no bound for a single image: one that is smoother than most comes back "
            "better (of 20 natural pictures behind the tutorials' network 17 did, notebook 24), "
            "and so does any to an attacker who knows more of it (faces, documents)",
            f"directions that each layer tells: {share}",
        ]

    @property
    def account(self) -> dict[str, Any]:
        """The same as plain numbers and words."""
        found = self.information
        return {
            "schema": SCHEMA,
            "image_shape": list(found.image_shape),
            "size": found.size,
            "estimated": found.estimated,
            "directions": {name: found.directions(std) for name, std in FIXED.items()},
            "better_than_prior": found.better_than_prior,
            "priors": {name: _of_posterior(found, name) for name in PRIORS},
            "notes": list(self.notes),
        }


def _precision(weights: StateDict) -> torch.dtype:
    floating = [w for w in weights.values() if w.is_floating_point()]
    single = all(torch.equal(w.float().double(), w.double()) for w in floating)
    return torch.float32 if single else torch.float64


def _half_precision(network: nn.Module, weights: StateDict) -> torch.dtype | None:
    """The half precision that all parameters have, whatever buffers have; None for none."""
    kinds = {weights[name].dtype for name, _ in network.named_parameters()}
    return kinds.pop() if len(kinds) == 1 and kinds <= HALF else None


def _seen_by_the_server(defence: Setting | Mapping[str, Any]) -> Setting:
    """The setting; where a mapping names no observer, that of the server."""
    if isinstance(defence, Mapping):
        defence = {"observer": "server", **defence}
    return Setting.of(defence)


def _of_sending(half: torch.dtype | None, setting: Setting | None) -> list[str]:
    """What to say of a precision that nobody told, and of who looks on."""
    said = []
    if half is not None:
        name = str(half).removeprefix("torch.")
        said.append(
            f"the client is taken to send {name}, which the weights given are in; an update sent "
            "in float32 (precision) tells more"
        )
    if setting is not None and setting.observer == "server":
        said.append("the observer is the server, who knows the weights that it sent")
    elif setting is not None and setting.record.acts_on == "snapshot":
        said.append(
            "the observer is on the channel, and sees both snapshots defended; the server, who "
            "knows the weights that it sent, sees as much or more"
        )
    return said


def _of_chance(network: nn.Module, images: torch.Tensor) -> list[str]:
    """What to say of a network that draws at random."""
    if not clues.draws(copy.deepcopy(network), images.to(next(network.parameters()))):
        return []
    return [
        "the network draws at random where it trains (dropout or the like): the numbers are of one "
        "draw, and another one tells more or less"
    ]


def _of_posterior(found: Information, prior: Prior) -> dict[str, Any]:
    posterior = found.posterior(prior)
    each = posterior.variance.flatten(1).mean(1)
    return {
        "bound_psnr": posterior.psnr,
        "bound_psnr_by_image": (-10 * each.log10()).tolist(),
        "layers": {name: count for name, count in _sorted(posterior)},
    }


def _sorted(posterior: fisher.Posterior) -> list[tuple[str, float]]:
    return sorted(posterior.known.items(), key=lambda each: -each[1])


@check.arguments
def bound(
    weights: files.Given,
    images: Images,
    labels: Labels,
    *,
    learning_rate: check.Positive,
    local_steps: check.Count = 1,
    batch_size: check.Count | None = None,
    model: str | nn.Module = "lenet",
    num_classes: Annotated[int, check.Range(2)] | None = None,
    client_optimizer: str = "sgd",
    optimizer_options: Mapping[str, Any] | None = None,
    transmitted: Precision | None = None,
    defence: Setting | Mapping[str, Any] | None = None,
    normalise: preprocessing.Told | None = None,
    out: str | Path = "exposure.png",
) -> Exposure:
    """Print what a client's update would tell of its images, and write the map of it.

    Parameters
    ----------
    weights
        W_t, that the client receives: a file, a state dict, or what else ``files.snapshots`` takes.
    images
        [N, C, H, W] in [0, 1], the client's.
    labels
        [N] class indices.
    learning_rate, local_steps, batch_size, client_optimizer, optimizer_options
        As in ``information.of_update``.
    model
        A network of the owner's in the mode that it trains in, or a name of ``models.build``.
    num_classes
        Of a network by name; None: as in ``weights``.
    transmitted
        As in ``information.of_update``; None for that of ``weights``, where all parameters are
        of one half precision.
    defence
        As in ``information.of_update``, but for the observer of a mapping that names none: it is
        the server, who knows W_t and sees the more. A ``Setting`` keeps its own, by default the
        channel.
    normalise
        What the client makes of pixels in [0, 1] before its network sees them, as
        ``preprocessing.normalised`` takes it; None for nothing.
    out
        Picture to write: white where the pixels are exposed, black where they are not.

    Raises
    ------
    ValueError
        In one sentence, for what does not fit, before the long work.
    """
    pictures.check_out(Path(out))
    check.one_of("client_optimizer", client_optimizer, records.CLIENT_OPTIMIZERS)
    if isinstance(model, str):
        check.one_of("model", model, records.NETWORKS)
    elif num_classes is not None:
        raise ValueError(
            f"num_classes is {num_classes}, and model a network, which has its own; "
            "give num_classes for a network by name"
        )
    setting = None if defence is None else _seen_by_the_server(defence)
    try:
        read = networks.fitted(weights, weights, model, tuple(images.shape[1:]), num_classes)
    except ValueError as why:  # it takes two snapshots for each other
        raise ValueError(re.sub(r"^before\b", "weights", f"{why}")) from None
    # computed in one precision, as clients do; float32 held in float64 has that of float32
    network = read.network.to(_precision(read.before))
    network.load_state_dict(read.before)
    if normalise is not None:
        preprocessing.check_channels(normalise, images.shape[1])
        network = preprocessing.normalised(network, normalise)
    half = None if transmitted is not None else _half_precision(read.network, read.before)
    about = [*read.notes, *_of_sending(half, setting)]
    print(*about, f"products with the Jacobian, {images.numel():,} at most ...", sep="\n")
    information = fisher.of_update(
        network,
        images,
        labels,
        learning_rate=learning_rate,
        local_steps=local_steps,
        batch_size=batch_size,
        client_optimizer=client_optimizer,
        optimizer_options=optimizer_options,
        transmitted=transmitted or half,
        defence=setting,
    )
    chance = _of_chance(network, images)
    found = Exposure(information, [*about, *chance])
    print(*chance, *found.lines, sep="\n")
    for said in pictures.write(found.map(), out):
        print(said)
    print(f"{out} shows where: white is exposed, black is not")
    return found


def write(found: Exposure, path: str | Path) -> None:
    """Write the ``account`` as a file of JSON; OSError where the disk does not take it."""
    written.write_json(found.account, path)
