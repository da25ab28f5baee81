"""Snapshots as people have them: files of several formats, checkpoints, names behind the prefix of
a wrapper, arrays without names; fitted to a network, and what was done to fit them in words.

A file is data: nothing in it is run, and it takes no more memory than its size or its network's
allows.
"""

import itertools
import json
import math
import os
import re
import zipfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import nn

from dlm_core import check
from dlm_core.harness.tables import counted
from dlm_core.weights import StateDict, check_fit, load_weights

Given = str | Path | Mapping[Any, Any] | Sequence[Any]
Network = Mapping[str, torch.Tensor]
T = TypeVar("T")

# Buffers of batch norm, and the one that many federations drop or reshape.
STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
COUNT = STATISTICS[-1]
# What DataParallel, torch.compile, Opacus and Lightning put before every name.
WRAPPERS = {"module", "_orig_mod", "_module", "model"}
PRECISIONS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# Levels of a checkpoint that are searched.
DEPTH = 3
# Times the network's own size up to which a compressed .npz is unpacked.
ROOM = 20
TAKEN = (
    "it takes a torch file of tensors alone, as torch.save(model.state_dict(), path) writes it, "
    "safetensors, in one file or sharded with their index, or an .npz of arrays"
)


class Unfit(ValueError):
    """What was read does not fit the network in its names or shapes."""


@check.arguments
def snapshots(
    before: Given, after: Given, expected: Network | Callable[[Mapping[str, Any]], Network]
) -> tuple[StateDict, StateDict, list[str]]:
    """Two snapshots, whatever they came as, as state dicts that fit a network.

    Parameters
    ----------
    before, after
        W_t and W_{t+1}, each the path of a file, of an index of shards or of their folder; a state
        dict of tensors or arrays, or a checkpoint that has one in it; or the tensors or arrays
        alone, in the state dict's order. Buffers and all but one name of shared weights may be
        absent.
    expected
        The network's own state dict; of ``model.state_dict(keep_vars=True)`` all buffers are
        known, of any other those of batch norm. Or, where it depends on what is read, such as on
        the number of classes, a function of the entries of ``before`` by the network's names, at
        first none, that returns it. It may lie on the meta device.

    Returns
    -------
    tuple
        (before, after, notes): state dicts in the network's order, their floating entries in the
        precision that they came in, and a list of sentences on what was done.

    Raises
    ------
    ValueError
        Where a file cannot be read, or holds no weights, or the network's in several entries, or
        weights that are no floating numbers.
    Unfit
        Where names or shapes are not the network's; the first is named.
    """
    network = expected if callable(expected) else lambda known: expected
    room = ROOM * sum(w.nbytes for w in network({}).values())
    read = [_read(each, room) for each in (before, after)]
    what = [
        _called(each) if isinstance(each, (str, Path)) else argument
        for argument, each in (("before", before), ("after", after))
    ]
    first, notes = _taken("before", what[0], read[0], network, {})
    known = network(first)
    second, more = _taken("after", what[1], read[1], lambda _: known, first)
    both = [note for note in notes if note in more]
    alone = [f"before: {note}" for note in notes if note not in both]
    return first, second, both + alone + [f"after: {note}" for note in more if note not in both]


def beside(before: Given, after: Given, network: Network) -> list[str]:
    """Places of numbers that W_{t+1} came with outside the network's state dict, and W_t did not.

    Parameters
    ----------
    before, after
        As ``snapshots`` has read them.
    network
        The network's state dict, as ``snapshots`` takes it.
    """
    room = ROOM * sum(w.nbytes for w in network.values())
    first, second = (_outside(_read(each, room), network) for each in (before, after))
    return [
        place
        for place, found in second.items()
        if place not in first or not np.array_equal(_plain(found), _plain(first[place]))
    ]


def _outside(read: Any, network: Network) -> dict[str, Any]:
    """{place: tensor or array} of what was read, but for the entry that is the network's."""
    if _holds_arrays(read):
        return {}
    own = [entry for place, entry in _entries(read) if place and _fits(entry, network)]
    found, queue, met = {}, deque([("", read)]), {id(each) for each in own}
    while queue:
        place, each = queue.popleft()
        if _is_array(each):
            found[place] = each
        elif isinstance(each, (Mapping, list, tuple)) and id(each) not in met:
            met.add(id(each))
            named = each.items() if isinstance(each, Mapping) else enumerate(each)
            queue += [(f"{place}/{name}" if place else str(name), inner) for name, inner in named]
    return found


def _fits(entry: Any, network: Network) -> bool:
    try:
        _fitted("after", entry, lambda _: network, {})
    except ValueError:
        return False
    return True


def _plain(array: Any) -> np.ndarray:
    """Of any dtype, whose numbers NumPy compares."""
    if not isinstance(array, torch.Tensor):
        return np.asarray(array)
    dense = array.detach().to_dense() if array.layout != torch.strided else array.detach()
    return (dense.double() if dense.is_floating_point() else dense).numpy()


def parts(given: str | Path) -> list[Path]:
    """The files that a snapshot's path stands for: itself, or an index and its shards."""
    path = _file_in(Path(given)) if os.path.isdir(given) else Path(given)
    if not path.name.endswith(".index.json"):
        return [path]
    place = json.loads(path.read_text())["weight_map"]
    return [path, *(path.with_name(name) for name in sorted(set(place.values())))]


# --- files


def _called(path: str | Path) -> str:
    return f"snapshot {str(path)!r}"


def _read(given: Given, room: int) -> Any:
    """What a file holds, or what was given itself; ``room``: bytes that an .npz may unpack to."""
    if not isinstance(given, (str, Path)):
        return given
    path = _file_in(Path(given)) if os.path.isdir(given) else Path(given)
    if path.name.endswith(".index.json"):
        return _sharded(path)
    if path.suffix == ".safetensors":
        return load_weights(path)
    numpy_s = path.suffix == ".npz"
    _check_archive(path, room if numpy_s else 0)
    return _loaded(path, _arrays if numpy_s else _tensors)


def _loaded(path: Path, reader: Callable[[Path], T]) -> T:
    """``reader(path)``; ValueError, in one sentence, whatever it raises."""
    try:
        return reader(path)
    except FileNotFoundError:
        raise ValueError(f"{_called(path)} does not exist") from None
    except Exception as error:
        raise ValueError(
            f"{_called(path)} cannot be read as weights ({type(error).__name__}); {TAKEN}; "
            "what else a file holds, such as a whole model, is never run"
        ) from None


def _file_in(folder: Path) -> Path:
    """The index of shards in a folder, or its only safetensors file."""
    for pattern in ("*.index.json", "*.safetensors"):
        found = sorted(folder.glob(pattern))
        if len(found) == 1:
            return found[0]
        if found:
            break
    raise ValueError(
        f"{_called(folder)} cannot be read as weights: a folder must have one .safetensors file, "
        "or one .safetensors.index.json beside its shards"
    )


def _sharded(path: Path) -> StateDict:
    """The state dict whose files an index names."""
    index = _loaded(path, lambda p: json.loads(p.read_text()))
    place = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(place, dict) or not all(_is_name(each) for each in place.values()):
        raise ValueError(
            f"{_called(path)} is no index of shards: its 'weight_map' must give each name a file "
            "beside it"
        )
    shards = {name: load_weights(path.with_name(name)) for name in sorted(set(place.values()))}
    for name, file in place.items():
        if name not in shards[file]:
            raise ValueError(f"{_called(path)} has {name!r} in {file!r}, which lacks it")
    return {name: shards[file][name] for name, file in place.items()}


def _is_name(value: Any) -> bool:
    """Whether it is a file's name that leads into no other folder."""
    return isinstance(value, str) and value not in ("", "..") and Path(value).name == value


def _check_archive(path: Path, room: int) -> None:
    """Raise ValueError for an archive that may unpack to more than its size, and than ``room``."""
    if not zipfile.is_zipfile(path):
        return
    entries = _loaded(path, lambda p: zipfile.ZipFile(p).infolist())
    methods = {entry.compress_type for entry in entries} - {zipfile.ZIP_STORED}
    if methods and not room:
        raise ValueError(f"{_called(path)} is a compressed archive, which torch.save never writes")
    size = sum(entry.file_size for entry in entries)
    if methods - {zipfile.ZIP_DEFLATED} or size > max(room, path.stat().st_size):
        raise ValueError(
            f"{_called(path)} unpacks to {size:,} bytes, more than {ROOM} times the network's; "
            "save the network's arrays alone, by numpy.savez"
        )


def _arrays(path: Path) -> dict[str, np.ndarray] | list[np.ndarray]:
    """The arrays of an .npz; as a list where NumPy numbered them."""
    with np.load(path, allow_pickle=False) as archive:
        found = {name: archive[name] for name in archive.files}
    numbered = {name: re.fullmatch(r"arr_(\d+)", name) for name in found}
    if not found or not all(numbered.values()):
        return found
    return [found[name] for name in sorted(found, key=lambda name: int(name[len("arr_") :]))]


def _tensors(path: Path) -> Any:
    return torch.load(path, weights_only=True, map_location="cpu")


# --- what in them is the network's


def _taken(
    argument: str,
    what: str,
    read: Any,
    network: Callable[[Mapping[str, Any]], Network],
    earlier: StateDict,
) -> tuple[StateDict, list[str]]:
    """(state dict, notes) of what was read: of itself, or of the one entry in it that fits.

    Parameters
    ----------
    argument, what
        Its name for errors of fit, and for others.
    read
        Anything.
    network
        The state dict that it must fit, by what is known of it.
    earlier
        What stands in for buffers, before the network's own.
    """
    fits, why = {}, {}
    entries = dict(_entries(read))
    for place, entry in entries.items():
        try:
            fits[place] = _fitted(argument, entry, network, earlier)
        except ValueError as error:
            if not place:
                raise
            why[place] = error
    if len(fits) == 1:
        ((place, (state, notes)),) = fits.items()
        return state, [f"the entry {place!r} was taken", *notes] if place else notes
    if fits:
        raise ValueError(
            f"{what} has the network's weights in several entries, {_some(fits)}; give one alone"
        )
    kind = f"dict of {_some(read)}" if isinstance(read, Mapping) else type(read).__name__
    if not why:
        raise ValueError(f"{what} is a {kind}, no state dict of tensors; {TAKEN}")
    nearest = max(why, key=lambda place: len(entries[place]))
    raise type(why[nearest])(
        f"{what} is a {kind}, no state dict of the network; of its entry {nearest!r}: "
        f"{why[nearest]}"
    )


def _entries(read: Any) -> Iterator[tuple[str, Any]]:
    """(place, collection of arrays) of what was read: at "" if it is one, else of those in it."""
    queue, met = deque([("", read, 0)]), set()
    while queue:
        place, each, level = queue.popleft()
        if id(each) in met or level > DEPTH:  # a file may hold one thing in many places
            continue
        met.add(id(each))
        if _holds_arrays(each) and (each or not place):
            yield place, each
        elif isinstance(each, Mapping):
            queue += [
                (f"{place}/{name}" if place else str(name), inner, level + 1)
                for name, inner in each.items()
            ]


def _holds_arrays(value: Any) -> bool:
    """Whether it is a state dict, or a list, of tensors or arrays alone."""
    if isinstance(value, Mapping):
        return all(isinstance(k, str) for k in value) and all(map(_is_array, value.values()))
    return isinstance(value, (list, tuple)) and bool(value) and all(map(_is_array, value))


def _is_array(value: Any) -> bool:
    if isinstance(value, torch.Tensor):
        return not value.is_nested
    return isinstance(value, (np.ndarray, np.generic))


def _fitted(
    argument: str,
    given: Mapping[str, Any] | Sequence[Any],
    network: Callable[[Mapping[str, Any]], Network],
    earlier: StateDict,
) -> tuple[StateDict, list[str]]:
    """(state dict, notes) of one collection of arrays; the arguments of ``_taken``."""
    if isinstance(given, Mapping):
        entries, notes = _by_name(given, network({}))
    else:
        entries, notes = _by_order(argument, given, network({}))
    expected = network(entries)
    shared = _shared(expected)
    notes += _with_counts(entries, expected)
    notes += _with_shared(entries, shared)
    notes += _with_buffers(entries, expected, earlier)
    # Nothing of a snapshot's size is made before its shapes are the network's.
    shapes = {name: torch.empty(w.shape, device="meta") for name, w in entries.items()}
    try:
        check_fit(argument, shapes, expected, dtypes=False)
    except ValueError as error:
        raise Unfit(str(error)) from None
    state = {name: _tensor(argument, name, entries[name], w) for name, w in expected.items()}
    for name, other in shared.items():
        if not torch.equal(state[name], state[other]):
            raise ValueError(
                f"{argument} has different numbers in {name!r} and {other!r}, "
                "which are one tensor in the network"
            )
    precisions = sorted({str(w.dtype)[6:] for w in state.values() if w.is_floating_point()})
    if len(precisions) > 1:
        notes.append(f"the weights are of mixed precision: {', '.join(precisions)}")
    return state, notes


def _by_name(given: Mapping[str, Any], expected: Network) -> tuple[dict[str, Any], list[str]]:
    """(entries, notes), by the network's names as far as dropping one prefix leads there."""

    def misfit(prefixes: tuple[str, str]) -> int:
        return len({_renamed(name, *prefixes) for name in given} ^ expected.keys())

    own = [each for each in _prefixes(expected) if set(each.split(".")[:-1]) <= WRAPPERS]
    drop, put = min(itertools.product(_prefixes(given), own), key=misfit)  # the first of equals
    entries = {_renamed(name, drop, put): w for name, w in given.items()}
    notes = []
    if drop:
        notes.append(f"the prefix {drop!r} was dropped from {counted(len(given), 'name')}")
    if put:
        notes.append(f"the network's prefix {put!r} was put before {counted(len(given), 'name')}")
    unknown = [name for name in entries if _last(name) == COUNT and name not in expected]
    if unknown:
        notes.append(f"{_some(unknown)} left out, which the network has not")
    return {name: w for name, w in entries.items() if name not in unknown}, notes


def _renamed(name: str, drop: str, put: str) -> str:
    return put + name[len(drop) :]


def _prefixes(names: Iterable[str]) -> list[str]:
    """The dotted prefixes that all names have, from "" on."""
    common = os.path.commonprefix([name.split(".")[:-1] for name in names])  # of lists as well
    return ["".join(f"{part}." for part in common[:n]) for n in range(len(common) + 1)]


def _by_order(
    argument: str, given: Sequence[Any], expected: Network
) -> tuple[dict[str, Any], list[str]]:
    """(entries, notes) of arrays in the state dict's order, of which some kinds may be absent."""
    shared, buffers = _shared(expected), _buffers(expected)
    counts = {name for name in expected if _last(name) == COUNT}
    choices = [
        [name for name in expected if name not in absent]
        for absent in (
            *(set(), counts, buffers),
            *(shared.keys() | absent for absent in (set(), counts, buffers)),
        )
    ]
    names = next((each for each in choices if len(each) == len(given)), None)
    if names is None:
        sizes = sorted({len(each) for each in choices}, reverse=True)
        fewer = (
            f" ({' or '.join(map(str, sizes[1:]))} where some are left out)" if sizes[1:] else ""
        )
        raise Unfit(
            f"{argument} is a list of {counted(len(given), 'array')}; "
            f"the network's state dict has {len(expected)}{fewer}"
        )
    note = f"arrays without names go to {names[0]!r} and so on, in the state dict's order"
    return dict(zip(names, given)), [note]


# --- what may be absent


def _shared(expected: Network) -> dict[str, str]:
    """{name: earlier name of the same tensor} of the network's shared weights."""
    met: dict[Any, str] = {}
    found = {}
    for name, w in expected.items():
        # A state dict has other views of its tensors; on the meta device they have no address.
        same = (w.data_ptr(), w.shape, w.stride()) if w.data_ptr() else id(w)
        if met.setdefault(same, name) != name:
            found[name] = met[same]
    return found


def _buffers(expected: Network) -> set[str]:
    """The names of buffers: of all, where parameters are marked as such."""
    marked = any(isinstance(w, nn.Parameter) for w in expected.values())
    return {
        name
        for name, w in expected.items()
        if _last(name) in STATISTICS or (marked and not isinstance(w, nn.Parameter))
    }


def _with_counts(entries: dict[str, Any], expected: Network) -> list[str]:
    """Give batch norm's counts of batches their shape, and leave out what is no number; notes."""
    notes = []
    for name in [name for name in entries if _last(name) == COUNT and name in expected]:
        if math.prod(entries[name].shape) == 1:
            entries[name] = entries[name].reshape(expected[name].shape)
        else:
            shape = list(entries.pop(name).shape)
            notes.append(f"{name!r} of shape {shape} is no number and was left out")
    return notes


def _with_shared(entries: dict[str, Any], shared: Mapping[str, str]) -> list[str]:
    """Fill in names of shared weights that have another one; return notes."""
    filled = []
    for first in dict.fromkeys(shared.values()):
        names = [first, *(name for name, other in shared.items() if other == first)]
        sent = [name for name in names if name in entries]
        absent = [name for name in names if name not in entries]
        if sent and absent:
            entries.update(dict.fromkeys(absent, entries[sent[0]]))
            filled.append(f"{_some(absent)} not sent; {sent[0]!r} is the same tensor")
    return filled


def _with_buffers(entries: dict[str, Any], expected: Network, earlier: StateDict) -> list[str]:
    """Fill in buffers that were not sent; return notes."""
    own = {
        name: earlier[name] if name in earlier else _initial(name, expected[name])
        for name in expected
        if name in _buffers(expected) - entries.keys()
    }
    own = {name: w for name, w in own.items() if not w.is_meta}
    entries.update(own)
    if not own:
        return []
    what = "running statistic" if all(_last(name) in STATISTICS for name in own) else "buffer"
    many = len(own) > 1
    return [
        f"{counted(len(own), what)} {'were' if many else 'was'} not sent ({_some(own)}); "
        f"{'those that' if many else 'the one that'} the network had before "
        f"{'stand' if many else 'stands'} in"
    ]


def _initial(name: str, w: torch.Tensor) -> torch.Tensor:
    """The network's own buffer; on the meta device a new batch norm's."""
    if not w.is_meta or _last(name) not in STATISTICS:
        return w.detach().clone()
    return torch.full(w.shape, float(_last(name) == "running_var"), dtype=w.dtype)


def _tensor(argument: str, name: str, w: Any, like: torch.Tensor) -> torch.Tensor:
    """A tensor or array as a tensor, floating where the network's is; ValueError elsewhere."""
    wrong = f"{argument} has {name!r} as {check.shown(w)}"
    if not isinstance(w, torch.Tensor):
        w = np.asarray(w)
        try:  # in this machine's order of bytes, and writable
            w = torch.from_numpy(np.array(w, dtype=w.dtype.newbyteorder("="), order="C"))
        except TypeError:
            raise ValueError(f"{wrong}, of which torch has no tensor") from None
    w = w.detach()
    if w.layout != torch.strided or w.is_meta or w.nbytes > w.untyped_storage().nbytes():
        raise ValueError(
            f"{wrong} of which it lacks numbers; it takes tensors as a state dict has them, "
            "dense and contiguous"
        )
    if like.is_floating_point():
        if w.dtype in PRECISIONS:
            return w
        raise ValueError(
            f"{wrong}; a snapshot's weights are floating numbers of 16, 32 or 64 bits: "
            "where it is quantised, give what the client's network computes with"
        )
    if w.is_complex():
        raise ValueError(f"{wrong}; the network's are {like.dtype}")
    return (w.round() if w.is_floating_point() else w).to(like.dtype)


# --- words


def _last(name: str) -> str:
    return name.rpartition(".")[2]


def _some(names: Iterable[Any]) -> str:
    names = list(names)
    rest = f" and {len(names) - 2} more" if len(names) > 2 else ""
    return ", ".join(map(repr, names[:2])) + rest
