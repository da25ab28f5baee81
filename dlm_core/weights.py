"""State dicts: read from files without running anything in them, compared with a network, rounded
to a precision.
"""

import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import torch

from dlm_core import check
from dlm_core.arrays import Precision


class OfTensors:
    """The rule of ``StateDict``."""

    def convert(self, value: Any) -> Any:
        """The state dict, as it is."""
        if _holds_tensors(value):
            return value
        raise check.Wrong(f"{self}; load_weights reads a file of one")

    def __str__(self) -> str:
        return "a state dict of tensors"


StateDict = Annotated[dict[str, torch.Tensor], OfTensors()]


@check.arguments
def load_weights(path: str | Path) -> StateDict:
    """Read a state dict from a safetensors file, or from a torch file without running anything in
    it.

    Parameters
    ----------
    path
        A ``.safetensors`` file, or any other file as ``torch.save`` writes it.

    Returns
    -------
    dict of str to torch.Tensor
        On the CPU.

    Raises
    ------
    ValueError
        Where the file is absent, cannot be read, holds anything but tensors, or would take more
        memory than its own size: a compressed archive, a tensor of fewer numbers than it shows.
    """
    from safetensors.torch import load_file

    snapshot = f"snapshot {str(path)!r}"
    if _is_compressed(path):
        raise ValueError(f"{snapshot} is a compressed archive, which torch.save never writes")
    try:
        if str(path).endswith(".safetensors"):
            weights = load_file(path)
        else:
            weights = torch.load(path, weights_only=True, map_location="cpu")
    except FileNotFoundError:
        raise ValueError(f"{snapshot} does not exist") from None
    except Exception as error:
        raise ValueError(
            f"{snapshot} cannot be read as weights ({type(error).__name__}); "
            "it takes a .safetensors file, or a torch file that holds tensors alone"
        ) from None
    for name, w in check_weights(snapshot, weights).items():
        if not _is_whole(w):
            raise ValueError(
                f"{snapshot} holds {name!r} as {check.shown(w)} of which it lacks numbers; "
                "it takes tensors as a state dict has them, dense and contiguous"
            )
    return weights


def _is_whole(w: torch.Tensor) -> bool:
    """Whether every entry of a tensor is held: it is neither sparse nor expanded from fewer."""
    if w.layout != torch.strided or w.device.type != "cpu":
        return False
    return w.numel() * w.element_size() <= w.untyped_storage().nbytes()


def _is_compressed(path: str | Path) -> bool:
    """Whether a file is an archive of compressed entries: a small one may grow without bound."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist())


def check_weights(argument: str, weights: Any) -> StateDict:
    """Return ``weights``; raise ValueError unless they are a state dict of tensors alone."""
    if _holds_tensors(weights):
        return weights
    kind = type(weights).__name__
    if isinstance(weights, dict):
        kind = f"dict of {_some(list(weights))}"
    raise ValueError(
        f"{argument} is a {kind}, no state dict of tensors; load_weights reads a file of one"
    )


def _holds_tensors(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(w, torch.Tensor) for w in value.values())


def check_fit(
    argument: str, weights: Any, expected: Mapping[str, torch.Tensor], *, dtypes: bool = True
) -> None:
    """Raise ValueError, naming the tensor, unless state dicts have the same names, shapes, dtypes.

    Parameters
    ----------
    argument
        Name of the argument that ``weights`` came as.
    weights
        A state dict, or what was given for one.
    expected
        The model's own.
    dtypes
        Whether these are compared as well.
    """
    check_weights(argument, weights)
    lacks = [name for name in expected if name not in weights]
    has = [name for name in weights if name not in expected]
    if lacks or has:
        parts = [
            f"{verb} {_some(names)}" for verb, names in (("lacks", lacks), ("has", has)) if names
        ]
        cure = "; rename its entries, or give audit or observe the network that they come from"
        told = cure if argument == "before" else ""
        raise ValueError(f"{argument} does not fit the model: it {' and '.join(parts)}{told}")
    properties: tuple[tuple[str, Callable[[torch.Tensor], Any]], ...] = (
        ("shape", lambda tensor: list(tensor.shape)),
        ("dtype", lambda tensor: tensor.dtype),
    )
    for what, of in properties if dtypes else properties[:1]:
        for name, tensor in expected.items():
            if of(weights[name]) != of(tensor):
                raise ValueError(
                    f"{argument}[{name!r}] has {what} {of(weights[name])}; "
                    f"the model's has {of(tensor)}"
                )


def check_finite(argument: str, weights: Mapping[str, torch.Tensor]) -> None:
    """Raise ValueError, naming the tensor, where ``weights`` hold NaN or infinity."""
    for name, tensor in weights.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise ValueError(
                f"{argument} holds NaN or infinity in {name!r}; a snapshot must be finite"
            )


@check.arguments
def rounded(weights: StateDict, dtype: Precision | None) -> StateDict:
    """``weights`` to the precision of ``dtype`` (None: as they are), held in their own dtype."""
    if dtype is None:
        return weights
    return {
        name: w.to(dtype).to(w.dtype) if w.is_floating_point() else w for name, w in weights.items()
    }


def held_as(value: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """``value`` in the dtype of ``like`` and on its device; a count, such as batch norm's of its
    batches, is the nearest whole number, and not the one below.
    """
    return (value if like.is_floating_point() else value.round()).to(like)


def _some(names: list[Any]) -> str:
    return ", ".join(map(repr, names[:2])) + (
        f" and {len(names) - 2} more" if len(names) > 2 else ""
    )
