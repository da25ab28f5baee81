"""Images to leak: small sets bundled with the repository, and the full sets where they are present.

Bundled files are checked against the SHA-256 digests in data/manifest.json, archives of full sets against their MD5.
"""

import hashlib
import json
import numbers
import os
import tempfile
from collections.abc import Iterable
from http.client import HTTPException
from pathlib import Path
from typing import NamedTuple

import torch

from dlm_core import check

BUNDLE = Path(__file__).resolve().parents[1] / "data"
NAMES = ("cifar100", "imagenet64", "fashion_mnist", "lfw", "digits")
FULL = {  # name: archive and its MD5; it unpacks to a folder of the archive's name. Without MD5: files that torchvision checks
    "cifar100": ("https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz", "eb9058c3a382ffc7106e4002c42a8d85"),
    "imagenet64": ("http://cs231n.stanford.edu/tiny-imagenet-200.zip", "90528d7ca1a48142e341f4ef8d21d0de"),
    "fashion_mnist": ("http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/FashionMNIST", None),
}


class Dataset(NamedTuple):
    """images [N, C, H, W] float32 in [0, 1], labels [N] int64, the number of classes, and which source served."""

    images: torch.Tensor
    labels: torch.Tensor
    num_classes: int
    source: str


def load(name, n=None, *, indices=None, source="auto", root=None, download=False):
    """Return a Dataset: the first ``n`` images, those at ``indices`` (one or several) in that order, or all.

    name      "cifar100" (3x32x32, 100 classes), "imagenet64" (3x64x64, 200 classes), "fashion_mnist" (1x28x28, 10 classes),
              "lfw" (1x25x25; label 1 a face, 0 not) or "digits" (1x8x8, 10 classes).
    source    "bundled"; "full" (the training set of the first three); "auto": full where present, else bundled.
    root      folder of the full sets; by default the environment variable DLM_DATA, else data/downloads.
    download  fetch the full set where it is wanted and absent.

    Labels of imagenet64 lie in 0 to 199: bundled, ImageNet's class index (which the file names keep) // 5; full, the rank of
    the WordNet id. Tiny ImageNet's images come class by class, in the order of their file names.

    Raises ValueError for arguments out of range or files that fail their digest, FileNotFoundError where the full set is
    asked for and absent, ConnectionError where it cannot be downloaded.
    """
    check.one_of("name", name, NAMES)
    check.one_of("source", source, ("auto", "bundled", "full"))
    if source == "full" and name not in FULL:
        raise ValueError(f"source is 'full', and {name} is bundled whole: it takes 'auto' or 'bundled'")
    if n is not None and indices is not None:
        raise ValueError(f"n is {n!r} and indices is {indices!r}; give one of them")
    root = Path(root or os.environ.get("DLM_DATA") or BUNDLE / "downloads").expanduser()
    wanted = source == "full" or (source == "auto" and name in FULL and (download or _is_present(name, root)))
    title, labels, num_classes, white, pixels = _full(name, root, download) if wanted else _bundled(name)
    chosen = _choose(n, indices, len(labels), title)
    images = pixels(chosen).to(torch.float32) / white
    return Dataset(images, torch.tensor([labels[i] for i in chosen]), num_classes, title)


def digest(name):
    """First 16 hex digits of the SHA-256 over the bundled set's labels and file digests."""
    check.one_of("name", name, NAMES)
    entry = _manifest()[name]
    return hashlib.sha256(json.dumps([entry["labels"], entry["files"]]).encode()).hexdigest()[:16]


def bundled_file(name):
    """Path of the file ``name`` of the bundle; ValueError unless its SHA-256 is the manifest's."""
    expected = {file: sha for entry in _manifest().values() for file, sha in entry["files"].items()}[name]
    path = BUNDLE / name
    if not path.is_file() or hashlib.sha256(path.read_bytes()).hexdigest() != expected:
        raise ValueError(f"bundled file {path} is missing or differs from manifest.json: restore it with git checkout")
    return path


def _manifest():
    if not (BUNDLE / "manifest.json").is_file():
        raise FileNotFoundError(f"no manifest.json in {BUNDLE}: install from a clone, with pip install -e .")
    return json.loads((BUNDLE / "manifest.json").read_text())


def _bundled(name):
    """(title, labels, number of classes, value of white, function from indices to pixels [N, C, H, W])."""
    entry = _manifest()[name]
    files, labels = list(entry["files"]), [int(label) for label in entry["labels"].split()]
    _, height, width = entry["image_shape"]

    def pixels(chosen):
        if len(files) > 1:
            return torch.stack([_decode(bundled_file(files[i]), "RGB") for i in chosen])
        tiles = _decode(bundled_file(files[0]), "L").unfold(1, height, height).unfold(2, width, width)
        return tiles.permute(1, 2, 0, 3, 4).flatten(0, 1)[chosen]  # the sheet's tiles, row by row

    return f"bundled: {entry['title']}", labels, entry["num_classes"], entry["white"], pixels


def _full(name, root, download):
    """The same for the full set under ``root``."""
    from torchvision.datasets import CIFAR100, FashionMNIST, ImageFolder

    folder = _fetch(name, root, download)
    kinds = {"cifar100": CIFAR100, "fashion_mnist": FashionMNIST}
    try:
        whole = kinds[name](root) if name in kinds else ImageFolder(folder / "train")
    except (RuntimeError, FileNotFoundError) as error:
        raise ValueError(f"{folder} is damaged ({error}): delete it, or pass source='bundled'") from error
    if name in kinds:
        array, labels = torch.as_tensor(whole.data), torch.as_tensor(whole.targets).tolist()
        title, array = ("CIFAR-100", array.movedim(3, 1)) if name == "cifar100" else ("Fashion-MNIST", array[:, None])
        return f"full: {title} training set", labels, len(whole.classes), 255, lambda chosen: array[chosen]
    title = f"full: Tiny ImageNet training set, {len(whole)} images of {len(whole.classes)} classes"
    return title, whole.targets, 200, 255, lambda chosen: torch.stack([_decode(whole.samples[i][0], "RGB") for i in chosen])


def _places(name, root):
    """(folder, archive) of the full set."""
    archive = root / FULL[name][0].rsplit("/", 1)[1]
    return root / archive.name.split(".")[0], archive


def _is_present(name, root):
    return any(place.exists() for place in _places(name, root))


def _fetch(name, root, download):
    """Folder of the full set, if need be downloaded and unpacked aside, then moved into place whole."""
    (folder, archive), (url, md5) = _places(name, root), FULL[name]
    if folder.is_dir():
        return folder
    instead = f"or pass source='bundled' for the bundled images of {name}"
    if not archive.exists() and not download:
        raise FileNotFoundError(f"no {folder.name} in {root}: pass download=True, put {archive.name} there, {instead}")
    from torchvision.datasets import FashionMNIST, utils

    root.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=root) as aside:
        if not archive.exists():
            archive = Path(aside, archive.name)
            try:
                utils.download_url(url, aside, md5=md5) if md5 else FashionMNIST(aside, download=True)
            except (OSError, RuntimeError, HTTPException) as why:
                raise ConnectionError(f"{url} cannot be downloaded to {root} ({why}): fetch it by hand, {instead}") from why
        if md5 and not utils.check_integrity(archive, md5):
            raise ValueError(f"{archive} is damaged: its MD5 is not {md5}; delete it, {instead}")
        if md5:
            utils.extract_archive(archive, aside)
        if not folder.is_dir():  # else another process was faster
            os.replace(Path(aside, folder.name), folder)
    return folder


def _choose(n, indices, count, title):
    """The chosen indices as a list of ints."""
    if indices is None:
        check.at_least("n", count if n is None else n, 1)
        if n is not None and n > count:
            raise ValueError(f"n is {n}; there are {count} images ({title})")
        return list(range(count if n is None else n))
    chosen = indices.tolist() if hasattr(indices, "tolist") else indices
    chosen = list(chosen) if isinstance(chosen, Iterable) else [chosen]
    wrong = [i for i in chosen if not isinstance(i, numbers.Integral) or isinstance(i, bool) or not 0 <= i < count]
    if wrong or not chosen:
        found = repr(wrong[0]) if wrong else "nothing"
        raise ValueError(f"indices holds {found}; it takes whole numbers from 0 to {count - 1} ({title})")
    return chosen


def _decode(file, mode):
    """The image in ``file`` as uint8 [C, H, W]."""
    from PIL import Image

    with Image.open(file) as image:
        values = torch.frombuffer(bytearray(image.convert(mode).tobytes()), dtype=torch.uint8)
        return values.view(image.height, image.width, -1).movedim(2, 0)
