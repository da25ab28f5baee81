"""Images to leak: sets bundled with the repository, the full sets where present, and a user's own.

Bundled files are checked against the SHA-256 digests in data/manifest.json, archives of full sets
against their MD5. A set of your own is a function without arguments that returns all its images
[N, C, H, W], in [0, 1] or of 8 bits, and their labels [N]:

    @records.data_set("mine", title="Mine", image_shape=(1, 28, 28), num_classes=10)
    def mine(): ...
"""

import contextlib
import hashlib
import json
import numbers
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextvars import ContextVar
from http.client import HTTPException
from pathlib import Path
from typing import Any, NamedTuple

import torch

from dlm_core import check, records
from dlm_core.arrays import Images, Labels
from dlm_core.records import DATA_SETS, DataSet

BUNDLE = Path(__file__).resolve().parents[1] / "data"  # of a checkout; DLM_BUNDLE names another
NAMES = ("cifar100", "imagenet64", "fashion_mnist", "lfw", "digits")  # of the bundled sets
FULL = {
    # name: archive and its MD5. It unpacks to a folder of the archive's name.
    "cifar100": (
        "https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz",
        "eb9058c3a382ffc7106e4002c42a8d85",
    ),
    "imagenet64": (
        "http://cs231n.stanford.edu/tiny-imagenet-200.zip",
        "90528d7ca1a48142e341f4ef8d21d0de",
    ),
    # without MD5: several files, which torchvision checks
    "fashion_mnist": (
        "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/FashionMNIST",
        None,
    ),
}
Pair = tuple[torch.Tensor, torch.Tensor]  # images and labels
_KEPT: ContextVar[dict[Any, Any] | None] = ContextVar("kept", default=None)


class Dataset(NamedTuple):
    """Some images of a set.

    Attributes
    ----------
    images
        [N, C, H, W] float32 in [0, 1].
    labels
        [N] int64.
    num_classes
        K of the whole set.
    source
        Which set served, in words.
    """

    images: torch.Tensor
    labels: torch.Tensor
    num_classes: int
    source: str


class _Set(NamedTuple):
    """All of a set, its pixels on demand: ``pixels(indices)`` has values from 0 to ``white``."""

    source: str
    labels: Sequence[int]
    num_classes: int
    white: int
    pixels: Callable[[list[int]], torch.Tensor]


@check.arguments
def load(
    name: str,
    n: check.Count | None = None,
    *,
    indices: Any = None,
    source: str = "auto",
    root: str | Path | None = None,
    download: bool = False,
) -> Dataset:
    """Return images of a set: the first ``n``, those at ``indices`` in that order, or all.

    Parameters
    ----------
    name
        "cifar100" (3x32x32, 100 classes), "imagenet64" (3x64x64, 200 classes), "fashion_mnist"
        (1x28x28, 10 classes), "lfw" (1x25x25; label 1 a face, 0 not), "digits" (1x8x8, 10 classes),
        or the key of a set of your own.
    n
        At least 1.
    indices
        A whole number, or several.
    source
        "bundled"; "full" (the training set of the first three); "auto": full where present, else
        bundled. Your own sets take "auto" or "bundled".
    root
        Folder of the full sets; by default the environment variable DLM_DATA, else data/downloads.
    download
        Fetch the full set where it is wanted and absent.

    Raises
    ------
    ValueError
        For arguments out of range, files that fail their digest, and a set of your own that is not
        as its record says.
    FileNotFoundError
        Where the full set is asked for and absent, or where the bundle is.
    ConnectionError
        Where the full set cannot be downloaded.

    Notes
    -----
    Labels of imagenet64 lie in 0 to 199: bundled, ImageNet's class index (which the file names
    keep) // 5; full, the rank of the WordNet id. Tiny ImageNet's images come class by class, in the
    order of their file names.
    """
    served(name, source, root)
    if n is not None and indices is not None:
        raise ValueError(f"n is {n!r} and indices is {indices!r}; give one of them")
    whole = _whole(name, source, root, download)
    chosen = _choose(n, indices, len(whole.labels), whole.source)
    images = whole.pixels(chosen).to(torch.float32) / whole.white
    labels = torch.tensor([whole.labels[i] for i in chosen])
    return Dataset(images, labels, whole.num_classes, whole.source)


def size(name: str, source: str = "auto") -> int:
    """How many images ``load`` serves, none of which is read.

    Parameters
    ----------
    name, source
        Of ``load``.
    """
    served(name, source)
    return len(_whole(name, source, None, False).labels)


@check.arguments
def served(name: str, source: str = "auto", root: str | Path | None = None) -> str:
    """Which of a set's versions ``load`` takes now: "full", or "bundled" for all others.

    Parameters
    ----------
    name, source, root
        Of ``load``.

    Raises
    ------
    ValueError
        For an unknown set or source, and where there is no full set of it.
    """
    check.one_of("name", name, DATA_SETS)
    check.one_of("source", source, ("auto", "bundled", "full"))
    if source == "full" and name not in FULL:
        how = "bundled" if name in NAMES else "registered"
        raise ValueError(
            f"source is 'full', and {name} is {how} whole: it takes 'auto' or 'bundled'"
        )
    if source == "auto" and name in FULL and _is_present(name, _root(root)):
        return "full"
    return "full" if source == "full" else "bundled"


@check.arguments
def digest(name: str, source: str = "bundled") -> str:
    """First 16 hex digits of a SHA-256 that tells one content of the set from another.

    Parameters
    ----------
    name, source
        Of ``load``. It is taken over a bundled set's labels and file digests, the address and MD5
        of a full set, and the labels, shape and pixels that a set of your own returns now.

    Raises
    ------
    ValueError
        As ``load`` does, and for a set of your own that returns others each time.
    """
    full = served(name, source) == "full"
    if name not in NAMES:
        return _own_digest(DATA_SETS[name])
    entry = {} if full else _manifest()[name]
    described = json.dumps([*FULL[name]] if full else [entry["labels"], entry["files"]])
    return hashlib.sha256(described.encode()).hexdigest()[:16]


@contextlib.contextmanager
def read_once(kept: dict[DataSet, Any]) -> Iterator[None]:
    """Within it, each set of your own is read once, and then taken from ``kept``; outside, its
    function is called each time, so that no change of what it reads is missed.
    """
    token = _KEPT.set(kept)
    try:
        yield
    finally:
        _KEPT.reset(token)


@records.data_set(
    "cifar100", title="CIFAR-100", image_shape=(3, 32, 32), num_classes=100, full_set=True
)
def cifar100() -> Pair:
    """20 CIFAR-100 test images."""
    return _all_of("cifar100")


@records.data_set(
    "imagenet64", title="ImageNet 64x64", image_shape=(3, 64, 64), num_classes=200, full_set=True
)
def imagenet64() -> Pair:
    """20 ImageNet images reduced to 64x64, as Tiny ImageNet was made."""
    return _all_of("imagenet64")


@records.data_set(
    "fashion_mnist",
    title="Fashion-MNIST",
    image_shape=(1, 28, 28),
    num_classes=10,
    full_set=True,
)
def fashion_mnist() -> Pair:
    """20 Fashion-MNIST images."""
    return _all_of("fashion_mnist")


@records.data_set("lfw", title="LFW faces", image_shape=(1, 25, 25), num_classes=2)
def lfw() -> Pair:
    """200 grey crops from Labeled Faces in the Wild, 100 of them faces."""
    return _all_of("lfw")


@records.data_set("digits", title="digits", image_shape=(1, 8, 8), num_classes=10)
def digits() -> Pair:
    """1,797 handwritten digits."""
    return _all_of("digits")


@check.arguments
def bundled_file(name: str) -> Path:
    """Path of the file ``name`` of the bundle; ValueError unless its SHA-256 is the manifest's."""
    digests: dict[str, str] = {}
    for entry in _manifest().values():
        digests |= entry["files"]
    if name not in digests:
        raise ValueError(f"name {name!r} is no file of the bundle, which manifest.json lists")
    path = _bundle() / name
    if not path.is_file() or hashlib.sha256(path.read_bytes()).hexdigest() != digests[name]:
        raise ValueError(
            f"bundled file {path} is missing or differs from manifest.json: "
            "restore it with git checkout"
        )
    return path


def _bundle() -> Path:
    """Folder of the bundled data."""
    named = os.environ.get("DLM_BUNDLE")
    folder = Path(named).expanduser() if named else BUNDLE
    if not (folder / "manifest.json").is_file():
        raise FileNotFoundError(
            f"no manifest.json in {folder}: the bundled data lie in the folder data of a clone of "
            "the repository; install from it with pip install -e ., or name that folder in the "
            "environment variable DLM_BUNDLE"
        )
    return folder


def _manifest() -> dict[str, Any]:
    return json.loads((_bundle() / "manifest.json").read_text())


def _whole(name: str, source: str, root: str | Path | None, download: bool) -> _Set:
    """The set that is wanted: a user's own, the full one, or the bundled one."""
    if name not in NAMES:
        return _registered(DATA_SETS[name])
    if source == "bundled" or name not in FULL:
        return _bundled(name)
    if download or served(name, source, root) == "full":
        return _full(name, _root(root), download)
    return _bundled(name)


def _root(named: str | Path | None) -> Path:
    """Folder of the full sets."""
    return Path(named or os.environ.get("DLM_DATA") or _bundle() / "downloads").expanduser()


def _all_of(name: str) -> Pair:
    """All images and labels of a bundled set."""
    images, labels, *_ = load(name, source="bundled")
    return images, labels


def _bundled(name: str) -> _Set:
    entry = _manifest()[name]
    files = list(entry["files"])
    labels = [int(label) for label in entry["labels"].split()]
    _, height, width = entry["image_shape"]

    def pixels(chosen: list[int]) -> torch.Tensor:
        if len(files) > 1:
            return torch.stack([_decode(bundled_file(files[i]), "RGB") for i in chosen])
        sheet = _decode(bundled_file(files[0]), "L")
        tiles = sheet.unfold(1, height, height).unfold(2, width, width)
        return tiles.permute(1, 2, 0, 3, 4).flatten(0, 1)[chosen]  # row by row

    title = f"bundled: {entry['title']}"
    return _Set(title, labels, entry["num_classes"], entry["white"], pixels)


def _registered(record: DataSet) -> _Set:
    """A user's own set."""
    images, labels = _own(record)
    source = f"registered: {record.title}, {len(images)} images"
    return _Set(source, labels.tolist(), record.num_classes, 1, lambda chosen: images[chosen])


def _own(record: DataSet) -> Pair:
    """(images, labels) of a user's own set."""
    kept = _KEPT.get()
    if kept is None:
        return _checked(record)
    if record not in kept:
        kept[record] = _checked(record)
    return kept[record]


def _checked(record: DataSet) -> Pair:
    """(images float32, labels int64) of a user's own set, as its record says they are."""
    what = f"data set {record.key!r}"
    returned = record.function()
    if not isinstance(returned, (tuple, list)) or len(returned) != 2:
        raise ValueError(
            f"{what} returned a {type(returned).__name__}; its function returns (images, labels)"
        )
    images = check.fitting(f"images of {what}", returned[0], Images).detach().cpu()
    labels = check.fitting(f"labels of {what}", returned[1], Labels).cpu()
    shape, count = record.image_shape, record.num_classes
    if images.shape[1:] != shape:
        raise ValueError(
            f"images of {what} has shape {list(images.shape)}; its record says [N, "
            f"{', '.join(map(str, shape))}]"
        )
    if len(labels) != len(images):
        raise ValueError(f"labels of {what} are {len(labels)}; its images are {len(images)}")
    if labels.max() >= count:
        raise ValueError(
            f"labels of {what} run up to {int(labels.max())}; its record says {count} classes, "
            f"0 to {count - 1}"
        )
    return images.to(torch.float32), labels


def _own_digest(record: DataSet) -> str:
    (images, labels), again = _own(record), _checked(record)
    if not all(map(torch.equal, (images, labels), again)):
        raise ValueError(
            f"data set {record.key!r} returns other images or labels each time it is called: "
            "draw them from a seed"
        )
    content = hashlib.sha256(repr((list(images.shape), record.num_classes)).encode())
    for tensor in (images, labels):
        content.update(tensor.contiguous().numpy().tobytes())
    return content.hexdigest()[:16]


def _full(name: str, root: Path, download: bool) -> _Set:
    """The full set under ``root``."""
    from torchvision.datasets import CIFAR100, FashionMNIST, ImageFolder

    folder = _fetch(name, root, download)
    kinds = {"cifar100": CIFAR100, "fashion_mnist": FashionMNIST}
    try:
        whole = kinds[name](root) if name in kinds else ImageFolder(folder / "train")
    except (RuntimeError, FileNotFoundError) as error:
        raise ValueError(
            f"{folder} is damaged ({error}): delete it, or pass source='bundled'"
        ) from error
    count = len(whole.classes)
    if name == "imagenet64":
        title = f"Tiny ImageNet training set, {len(whole)} images of {count} classes"

        def decoded(chosen: list[int]) -> torch.Tensor:
            return torch.stack([_decode(whole.samples[i][0], "RGB") for i in chosen])

        return _Set(f"full: {title}", whole.targets, 200, 255, decoded)
    array, labels = torch.as_tensor(whole.data), torch.as_tensor(whole.targets).tolist()
    array = array.movedim(3, 1) if name == "cifar100" else array[:, None]
    title = f"full: {DATA_SETS[name].title} training set"
    return _Set(title, labels, count, 255, lambda chosen: array[chosen])


def _places(name: str, root: Path) -> tuple[Path, Path]:
    """(folder, archive) of the full set."""
    archive = root / FULL[name][0].rsplit("/", 1)[1]
    return root / archive.name.split(".")[0], archive


def _is_present(name: str, root: Path) -> bool:
    return any(place.exists() for place in _places(name, root))


def _fetch(name: str, root: Path, download: bool) -> Path:
    """Folder of the full set; what has to be fetched or unpacked is moved into place whole."""
    folder, archive = _places(name, root)
    url, md5 = FULL[name]
    if folder.is_dir():
        return folder
    instead = f"or pass source='bundled' for the bundled images of {name}"
    if not archive.exists() and not download:
        raise FileNotFoundError(
            f"no {folder.name} in {root}: pass download=True, put {archive.name} there, {instead}"
        )
    from torchvision.datasets import FashionMNIST, utils

    root.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=root) as aside:
        if not archive.exists():
            archive = Path(aside, archive.name)
            try:
                if md5:
                    utils.download_url(url, aside, md5=md5)
                else:
                    FashionMNIST(aside, download=True)
            except (OSError, RuntimeError, HTTPException) as why:
                raise ConnectionError(
                    f"{url} cannot be downloaded to {root} ({why}): fetch it by hand, {instead}"
                ) from why
        if md5 and not utils.check_integrity(archive, md5):
            raise ValueError(f"{archive} is damaged: its MD5 is not {md5}; delete it, {instead}")
        if md5:
            utils.extract_archive(archive, aside)
        if not folder.is_dir():  # else another process was faster
            os.replace(Path(aside, folder.name), folder)
    return folder


def _choose(n: int | None, indices: Any, count: int, title: str) -> list[int]:
    """The chosen indices."""
    if indices is None:
        if n is None:
            return list(range(count))
        if n > count:
            raise ValueError(f"n is {n}; there are {count} images ({title})")
        return list(range(n))
    chosen = indices.tolist() if hasattr(indices, "tolist") else indices
    chosen = list(chosen) if isinstance(chosen, Iterable) else [chosen]
    wrong = [i for i in chosen if not _is_index(i, count)]
    if wrong or not chosen:
        found = repr(wrong[0]) if wrong else "nothing"
        raise ValueError(
            f"indices holds {found}; it takes whole numbers from 0 to {count - 1} ({title})"
        )
    return chosen


def _is_index(value: Any, count: int) -> bool:
    whole = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    return whole and 0 <= value < count


def _decode(file: str | Path, mode: str) -> torch.Tensor:
    """The image in ``file`` as uint8 [C, H, W]."""
    from PIL import Image

    with Image.open(file) as image:
        values = bytearray(image.convert(mode).tobytes())
        flat = torch.frombuffer(values, dtype=torch.uint8)
        return flat.view(image.height, image.width, -1).movedim(2, 0)
