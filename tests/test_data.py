"""Bundled and full image sets: what they hold, and what is refused."""

import hashlib
import io
import json
import os
import pickle
import shutil
import subprocess
import sys
import tarfile
import urllib.error
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from dlm_core import data, records

BUNDLED = {  # count, image shape, classes
    "cifar100": (20, (3, 32, 32), 100),
    "imagenet64": (20, (3, 64, 64), 200),
    "fashion_mnist": (20, (1, 28, 28), 10),
    "lfw": (200, (1, 25, 25), 2),
    "digits": (1797, (1, 8, 8), 10),
}


@pytest.fixture(autouse=True)
def no_full_sets(monkeypatch, tmp_path):
    """Whatever the developer has downloaded, the tests see an empty folder; and no network."""

    def refuse(*args, **kwargs):
        raise urllib.error.URLError("no network in tests")

    monkeypatch.setenv("DLM_DATA", str(tmp_path / "downloads"))
    monkeypatch.setattr("urllib.request.urlopen", refuse)


def md5(content):
    return hashlib.md5(content).hexdigest()


def left_in(folder):
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


# --- what the bundle holds


@pytest.mark.parametrize("name", data.NAMES)
def test_bundled_set(name):
    count, shape, classes = BUNDLED[name]
    loaded = data.load(name)
    assert loaded.images.shape == (count, *shape) and loaded.images.dtype == torch.float32
    assert loaded.labels.shape == (count,) and loaded.labels.dtype == torch.int64
    assert loaded.images.min() == 0 and loaded.images.max() == 1
    assert loaded.labels.min() >= 0 and loaded.labels.max() < loaded.num_classes == classes
    assert loaded.source.startswith("bundled: ") and str(count) in loaded.source


def test_unpacks_to_images_and_labels():
    images, labels, *_ = data.load("cifar100", n=20)
    assert images.shape == (20, 3, 32, 32)
    assert labels[:4].tolist() == [49, 33, 72, 51]


@pytest.mark.parametrize("name, divisor", [("cifar100", 1), ("imagenet64", 5)])
def test_images_and_labels_are_those_of_the_files(name, divisor):
    images, labels, *_ = data.load(name)
    files = sorted((data.BUNDLE / name).glob("*.png"))
    assert labels.tolist() == [int(file.stem.split("_")[1]) // divisor for file in files]
    for image, file in zip(images, files, strict=True):
        assert np.array_equal(
            image.permute(1, 2, 0).numpy(), np.asarray(Image.open(file), np.float32) / 255
        )


def test_digits_are_exactly_scikit_learns():
    from sklearn.datasets import load_digits

    images, labels, *_ = data.load("digits")
    assert np.array_equal(16 * images[:, 0].double().numpy(), load_digits().images)
    assert np.array_equal(labels.numpy(), load_digits().target)


def test_faces_are_scikit_images_to_8_bits():
    from skimage.data import lfw_subset

    images, labels, *_ = data.load("lfw")
    assert np.abs(images[:, 0].numpy() - lfw_subset()).max() <= 0.5 / 255 + 1e-6
    assert labels.tolist() == [1] * 100 + [0] * 100


def test_imagenet64_was_reduced_without_aliasing():
    # Contrast of neighbours over that of 2x2 means: 0.87 for area means,
    # 1.20 for the same photographs merely subsampled.
    images = data.load("imagenet64").images
    blurred = torch.nn.functional.avg_pool2d(images, 2)
    assert images.diff(dim=-1).abs().mean() / blurred.diff(dim=-1).abs().mean() < 0.9


def test_manifest_lists_every_bundled_image_and_no_other():
    manifest = json.loads((data.BUNDLE / "manifest.json").read_text())
    listed = {file: sha for entry in manifest.values() for file, sha in entry["files"].items()}
    present = [*data.BUNDLE.glob("*.png"), *data.BUNDLE.glob("*.safetensors")]
    present += [*data.BUNDLE.glob("cifar100/*"), *data.BUNDLE.glob("imagenet64/*")]
    assert {path.relative_to(data.BUNDLE).as_posix() for path in present} == set(listed)
    for file, sha in listed.items():
        assert hashlib.sha256((data.BUNDLE / file).read_bytes()).hexdigest() == sha
        assert data.bundled_file(file) == data.BUNDLE / file


def test_float32_whatever_the_default_dtype():
    torch.set_default_dtype(torch.float64)
    try:
        assert data.load("digits", n=1).images.dtype == torch.float32
    finally:
        torch.set_default_dtype(torch.float32)


def test_importing_the_core_imports_no_image_library():
    libraries = "torchvision", "PIL", "skimage", "lpips"
    imports = "import sys, dlm_core.data, dlm_core.metrics"
    code = f"{imports}; print([m for m in {libraries} if m in sys.modules])"
    root = Path(data.__file__).parents[1]
    shown = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True
    )
    assert shown.stdout.strip() == "[]"


# --- which images


@given(indices=st.lists(st.integers(0, 19), min_size=1, max_size=5))
def test_indices_choose_in_their_order(indices):
    everything = data.load("cifar100", source="bundled")
    chosen = data.load("cifar100", indices=indices, source="bundled")
    assert torch.equal(chosen.images, everything.images[indices])
    assert torch.equal(chosen.labels, everything.labels[indices])


@pytest.mark.parametrize(
    "indices",
    [
        range(3, 6),
        (3, 4, 5),
        np.arange(3, 6),
        torch.arange(3, 6),
        iter([3, 4, 5]),
        list(np.arange(3, 6)),
    ],
)
def test_indices_of_any_kind(indices):
    chosen = data.load("digits", indices=indices)
    assert torch.equal(chosen.images, data.load("digits", n=6).images[3:])
    assert chosen.labels.tolist() == [3, 4, 5]
    assert data.load("digits", indices=7).labels.tolist() == [7]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (
            {"name": "cifar10"},
            r"name 'cifar10' is unknown: choose from .*; did you mean cifar100\?",
        ),
        (
            {"name": "cifar100", "source": "ful"},
            r"source 'ful' is unknown: choose from auto, bundled, full; did you mean full\?",
        ),
        ({"name": "cifar100", "n": 21}, r"n is 21; there are 20 images \(bundled: 20 CIFAR-100"),
        ({"name": "cifar100", "n": 0}, r"n is 0; it takes a whole number of at least 1"),
        ({"name": "cifar100", "n": 2.0}, r"n is 2\.0; it takes a whole number"),
        ({"name": "cifar100", "n": 1, "indices": [0]}, r"n is 1 and indices is \[0\]; give one"),
        (
            {"name": "cifar100", "indices": range(60, 110)},
            r"indices holds 60; it takes whole numbers from 0 to 19 \(bundled",
        ),
        ({"name": "cifar100", "indices": [-1]}, r"indices holds -1; it takes"),
        ({"name": "cifar100", "indices": []}, r"indices holds nothing; it takes"),
        ({"name": "cifar100", "indices": [0.5]}, r"indices holds 0\.5; it takes"),
        (
            {"name": "cifar100", "indices": torch.ones(20, dtype=torch.bool)},
            r"indices holds True; it takes",
        ),
        ({"name": "cifar100", "indices": 20}, r"indices holds 20; it takes"),
        ({"name": "digits", "source": "full"}, r"source is 'full', and digits is bundled whole"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message) as caught:
        data.load(**arguments)
    assert "\n" not in str(caught.value)


# --- a bundle that was tampered with


@pytest.fixture
def copied_bundle(monkeypatch, tmp_path):
    for name in ("cifar100", "imagenet64"):
        shutil.copytree(data.BUNDLE / name, tmp_path / "bundle" / name)
    for name in ("lfw.png", "digits.png", "manifest.json"):
        shutil.copy(data.BUNDLE / name, tmp_path / "bundle" / name)
    monkeypatch.setattr(data, "BUNDLE", tmp_path / "bundle")
    return tmp_path / "bundle"


@pytest.mark.parametrize("name, file", [("cifar100", "cifar100/03_51.png"), ("lfw", "lfw.png")])
@pytest.mark.parametrize("change", ["one bit", "gone"])
def test_changed_file_is_refused_by_name(copied_bundle, name, file, change):
    assert len(data.load(name, n=4).labels) == 4
    path = copied_bundle / file
    content = bytearray(path.read_bytes())
    content[-20] ^= 1
    path.write_bytes(content)
    if change == "gone":
        path.unlink()
    with pytest.raises(ValueError, match=rf"bundled file .*{file} is missing or differs"):
        data.load(name, n=4)
    if name == "cifar100":
        assert len(data.load(name, n=3).labels) == 3, "only the requested files are opened"


def test_missing_bundle_says_how_to_install(monkeypatch, tmp_path):
    monkeypatch.setattr(data, "BUNDLE", tmp_path)
    with pytest.raises(FileNotFoundError, match="pip install -e"):
        data.load("digits")


def test_outside_a_checkout_the_error_says_where_the_data_are(monkeypatch, tmp_path):
    monkeypatch.setattr(data, "BUNDLE", tmp_path / "nowhere")
    monkeypatch.delenv("DLM_DATA")
    for call in (lambda: data.load("cifar100"), lambda: data.digest("lfw")):
        with pytest.raises(FileNotFoundError, match="a clone of the repository.*DLM_BUNDLE"):
            call()


def test_the_bundle_may_lie_elsewhere(monkeypatch, copied_bundle):
    expected = data.load("cifar100", n=2).images
    monkeypatch.setattr(data, "BUNDLE", copied_bundle / "nowhere")
    monkeypatch.setenv("DLM_BUNDLE", str(copied_bundle))
    assert torch.equal(data.load("cifar100", n=2).images, expected)
    assert data.bundled_file("lfw.png") == copied_bundle / "lfw.png"


# --- records, and a set of one's own


@pytest.mark.parametrize("name", data.NAMES)
def test_the_record_of_a_bundled_set_says_what_it_holds(name):
    record = records.DATA_SETS[name]
    count, shape, classes = BUNDLED[name]
    assert (record.image_shape, record.num_classes) == (shape, classes)
    assert record.full_set == (name in data.FULL)
    images, labels = record.function()
    loaded = data.load(name, source="bundled")
    assert torch.equal(images, loaded.images) and torch.equal(labels, loaded.labels)


OWN_IMAGES = torch.rand(6, 1, 5, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
OWN_LABELS = torch.tensor([2, 0, 1, 1, 0, 2], dtype=torch.int32)


@pytest.fixture
def own_set():
    """Registers a function as the set "mine", for this test alone."""

    def register(function, **about):
        described = {"title": "Mine", "image_shape": (1, 5, 4), "num_classes": 3, **about}
        records.DATA_SETS.pop("mine", None)
        return records.data_set("mine", **described)(function)

    yield register
    records.DATA_SETS.pop("mine", None)


def test_a_set_of_one_s_own_is_loaded_as_ours_are(own_set):
    calls = []

    def mine():
        calls.append(1)
        return OWN_IMAGES, OWN_LABELS

    own_set(mine, image_shape=[1, 5, 4])
    loaded = data.load("mine")
    assert loaded.images.dtype == torch.float32 and loaded.labels.dtype == torch.int64
    assert torch.equal(loaded.images, OWN_IMAGES.float()) and loaded.num_classes == 3
    assert loaded.source == "registered: Mine, 6 images"
    chosen = data.load("mine", indices=[4, 1], source="bundled")
    assert torch.equal(chosen.images, loaded.images[[4, 1]]) and chosen.labels.tolist() == [0, 0]
    loaded.images.zero_()
    assert torch.equal(data.load("mine", n=2).images, OWN_IMAGES[:2].float())
    assert len(data.digest("mine")) == 16
    calls.clear()
    with data.read_once({}):
        assert all(len(data.load("mine").images) == 6 for _ in range(3)) and len(calls) == 1
    assert len(data.load("mine").images) == 6 and len(calls) == 2, "elsewhere it may have changed"
    with pytest.raises(ValueError, match="source is 'full', and mine is registered whole"):
        data.load("mine", source="full")
    with pytest.raises(ValueError, match=r"n is 7; there are 6 images \(registered: Mine"):
        data.load("mine", n=7)


def test_a_set_of_one_s_own_may_be_of_arrays_and_bytes(own_set):
    pixels = (255 * OWN_IMAGES).round().to(torch.uint8)
    own_set(lambda: (pixels.numpy(), OWN_LABELS.numpy()))
    loaded = data.load("mine")
    assert torch.equal(loaded.images, pixels / 255) and torch.equal(loaded.labels, OWN_LABELS)


def test_what_a_set_of_one_s_own_reads_may_change(own_set):
    dark = {"by": 1.0}
    own_set(lambda: (OWN_IMAGES * dark["by"], OWN_LABELS))
    before = data.digest("mine"), data.load("mine").images
    dark["by"] = 0.5
    assert data.digest("mine") != before[0]
    assert torch.equal(data.load("mine").images, (OWN_IMAGES * 0.5).float())
    own_set(lambda: (torch.rand(6, 1, 5, 4), OWN_LABELS))
    with pytest.raises(ValueError, match="'mine' returns other images or labels each time"):
        data.digest("mine")


def test_the_digest_of_a_set_of_one_s_own_follows_its_content(own_set):
    other = OWN_IMAGES.clone()
    other[5, 0, 0, 0] += 0.001
    variants = [(OWN_IMAGES, OWN_LABELS), (other, OWN_LABELS), (OWN_IMAGES, OWN_LABELS.roll(1))]
    digests = []
    for returned in variants:
        own_set(lambda returned=returned: returned)
        digests.append(data.digest("mine"))
    own_set(lambda: (OWN_IMAGES.clone(), OWN_LABELS.long()))
    assert len(set(digests)) == 3 and data.digest("mine") == digests[0]


@pytest.mark.parametrize(
    "returned, message",
    [
        (OWN_IMAGES, r"data set 'mine' returned a Tensor; its function returns \(images, labels\)"),
        ((None, OWN_LABELS), "images of data set 'mine' is None; it takes a tensor"),
        ((OWN_IMAGES[:, 0], OWN_LABELS), r"images .* shape \(6, 5, 4\).* \[N, C, H, W\]"),
        ((OWN_IMAGES.mT, OWN_LABELS), r"images .* has shape \[6, 1, 4, 5\].* \[N, 1, 5, 4\]"),
        ((OWN_IMAGES[:0], OWN_LABELS[:0]), "N at least 1"),
        (((255 * OWN_IMAGES).int(), OWN_LABELS), r"images .* torch.int32; .* in \[0, 1\]"),
        (
            (OWN_IMAGES - 1, OWN_LABELS),
            r"images .* pixels in \[0, 1\], and not from -0\.\d+ to ",
        ),
        ((OWN_IMAGES * float("nan"), OWN_LABELS), "images .*, and not NaN"),
        ((OWN_IMAGES, OWN_LABELS[:5]), "labels .* are 5; its images are 6"),
        (
            (OWN_IMAGES, OWN_LABELS.double()),
            "labels .* torch.float64; it takes class indices",
        ),
        (
            (OWN_IMAGES, OWN_LABELS + 1),
            "labels .* run up to 3; its record says 3 classes, 0 to 2",
        ),
    ],
)
def test_a_set_of_one_s_own_that_is_not_as_its_record_says_is_refused(own_set, returned, message):
    own_set(lambda: returned)
    for call in (data.load, data.digest):
        with pytest.raises(ValueError, match=message) as caught:
            call("mine")
        assert "\n" not in str(caught.value)


def test_digest_depends_on_files_and_labels(copied_bundle):
    before = {name: data.digest(name) for name in data.NAMES}
    assert len(set(before.values())) == len(data.NAMES) and all(
        len(value) == 16 for value in before.values()
    )
    manifest = json.loads((copied_bundle / "manifest.json").read_text())
    manifest["cifar100"]["files"]["cifar100/00_49.png"] = "0" * 64
    manifest["lfw"]["labels"] = manifest["lfw"]["labels"][::-1]
    manifest["digits"]["title"] = "other words"
    (copied_bundle / "manifest.json").write_text(json.dumps(manifest))
    changed = [name for name in data.NAMES if data.digest(name) != before[name]]
    assert changed == ["cifar100", "lfw"]
    with pytest.raises(ValueError, match="name 'mnist' is unknown"):
        data.digest("mnist")


# --- full sets: small imitations of them


def write_tiny_imagenet(folder):
    """Three classes of two images each, one of them grey, each of one colour."""
    rng = np.random.default_rng(0)
    for wnid in ("n03", "n01", "n02"):
        images = folder / "tiny-imagenet-200" / "train" / wnid / "images"
        images.mkdir(parents=True)
        (images.parent / f"{wnid}_boxes.txt").write_text("0 0 63 63")
        for i in range(2):
            grey = wnid == "n02" and i == 1
            level = rng.integers(40, 215, 1 if grey else 3).astype(np.uint8)
            pixels = np.full((64, 64), level[0]) if grey else np.broadcast_to(level, (64, 64, 3))
            Image.fromarray(np.ascontiguousarray(pixels)).save(
                images / f"{wnid}_{i}.JPEG", quality=95
            )


def tiny_imagenet_zip(tmp_path, monkeypatch):
    """Content of a zip of the imitation, its MD5 declared the right one."""
    write_tiny_imagenet(tmp_path / "made")
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        for file in sorted((tmp_path / "made").rglob("*")):
            archive.write(file, file.relative_to(tmp_path / "made"))
    url = data.FULL["imagenet64"][0]
    monkeypatch.setitem(data.FULL, "imagenet64", (url, md5(packed.getvalue())))
    return packed.getvalue()


def test_tiny_imagenet_folder(tmp_path):
    assert data.load("imagenet64", n=1).source.startswith("bundled")
    write_tiny_imagenet(tmp_path / "downloads")
    loaded = data.load("imagenet64")
    assert loaded.source == "full: Tiny ImageNet training set, 6 images of 3 classes"
    assert (
        loaded.images.shape == (6, 3, 64, 64)
        and loaded.images.dtype == torch.float32
        and loaded.num_classes == 200
    )
    assert loaded.labels.tolist() == [0, 0, 1, 1, 2, 2], "the rank of the sorted WordNet ids"
    order = [f"n0{c}_{i}" for c in (1, 2, 3) for i in (0, 1)]
    for image, name in zip(loaded.images, order, strict=True):
        [file] = (tmp_path / "downloads").rglob(f"{name}.JPEG")
        expected = np.asarray(Image.open(file).convert("RGB"), np.float32) / 255
        assert np.array_equal(image.permute(1, 2, 0).numpy(), expected)
    grey = loaded.images[3]
    assert torch.equal(grey[0], grey[1]) and torch.equal(grey[0], grey[2])
    assert torch.equal(data.load("imagenet64", indices=[5, 0]).images, loaded.images[[5, 0]])
    assert data.load("imagenet64", source="bundled", n=2).source.startswith("bundled")
    with pytest.raises(ValueError, match=r"n is 7; there are 6 images \(full: Tiny ImageNet"):
        data.load("imagenet64", n=7)


def test_root_argument_comes_before_the_environment(tmp_path):
    write_tiny_imagenet(tmp_path / "elsewhere")
    assert data.load("imagenet64", n=1).source.startswith("bundled")
    assert data.load("imagenet64", n=1, root=tmp_path / "elsewhere").source.startswith("full")
    assert data.load("imagenet64", n=1, root=str(tmp_path / "elsewhere")).source.startswith("full")


def test_tiny_imagenet_folder_without_images_is_refused(tmp_path):
    folder = tmp_path / "downloads" / "tiny-imagenet-200" / "train"
    folder.mkdir(parents=True)
    with pytest.raises(ValueError, match="tiny-imagenet-200 is damaged"):
        data.load("imagenet64")


def test_zip_beside_is_unpacked(tmp_path, monkeypatch):
    content = tiny_imagenet_zip(tmp_path, monkeypatch)
    (tmp_path / "downloads").mkdir()
    (tmp_path / "downloads" / "tiny-imagenet-200.zip").write_bytes(content)
    assert data.load("imagenet64", n=2).source.startswith("full")
    assert left_in(tmp_path / "downloads") == ["tiny-imagenet-200", "tiny-imagenet-200.zip"]


@pytest.mark.parametrize("download", [False, True])
def test_damaged_zip_is_refused(tmp_path, monkeypatch, download):
    content = tiny_imagenet_zip(tmp_path, monkeypatch)
    (tmp_path / "downloads").mkdir()
    (tmp_path / "downloads" / "tiny-imagenet-200.zip").write_bytes(content[:-1])
    with pytest.raises(ValueError, match=r"tiny-imagenet-200\.zip is damaged: its MD5"):
        data.load("imagenet64", n=2, download=download)
    assert left_in(tmp_path / "downloads") == ["tiny-imagenet-200.zip"]


FOLDERS = [
    ("cifar100", "cifar-100-python"),
    ("imagenet64", "tiny-imagenet-200"),
    ("fashion_mnist", "FashionMNIST"),
]


class Response(io.BytesIO):
    """What urlopen returns; ``fails_after`` bytes it breaks off."""

    def __init__(self, url, content, fails_after=None):
        super().__init__(content)
        self.url, self.length, self.fails_after = url, len(content), fails_after

    def read(self, size=-1):
        if self.fails_after is not None:
            if self.tell() >= self.fails_after:
                raise ConnectionResetError("connection reset")
            size = self.fails_after
        return super().read(size)


def serve(monkeypatch, content, fails_after=None):
    opened = []

    def urlopen(request, *args, **kwargs):
        opened.append(request.full_url)
        return Response(request.full_url, content, fails_after)

    monkeypatch.setattr("urllib.request.urlopen", urlopen)
    return opened


def test_download(tmp_path, monkeypatch):
    opened = serve(monkeypatch, tiny_imagenet_zip(tmp_path, monkeypatch))
    assert data.load("imagenet64", n=1).source.startswith("bundled"), "nothing is fetched unasked"
    assert not opened
    loaded = data.load("imagenet64", n=3, download=True)
    assert loaded.source.startswith("full") and set(opened) == {data.FULL["imagenet64"][0]}
    assert left_in(tmp_path / "downloads") == ["tiny-imagenet-200"]
    opened.clear()
    assert (
        torch.equal(data.load("imagenet64", n=3, download=True).images, loaded.images)
        and not opened
    )


@pytest.mark.parametrize("failure", ["broken off", "wrong content"])
def test_failed_download_leaves_nothing_behind(tmp_path, monkeypatch, failure):
    content = tiny_imagenet_zip(tmp_path, monkeypatch)
    if failure == "broken off":
        serve(monkeypatch, content, fails_after=100)
    else:
        serve(monkeypatch, content + b"!")
    with pytest.raises(
        ConnectionError, match=r"tiny-imagenet-200\.zip cannot be downloaded .*source='bundled'"
    ):
        data.load("imagenet64", download=True)
    assert left_in(tmp_path / "downloads") == []
    assert data.load("imagenet64", n=1).source.startswith("bundled")


@pytest.mark.parametrize("name, folder", FOLDERS)
def test_no_network(tmp_path, name, folder):
    with pytest.raises(
        ConnectionError,
        match=rf"(?s){folder}.* cannot be downloaded to .*downloads .*no network.*source='bundled'",
    ):
        data.load(name, source="full", download=True)
    assert left_in(tmp_path / "downloads") == []


@pytest.mark.parametrize("name, folder", FOLDERS)
def test_absent_full_set_names_folder_remedy_and_alternative(tmp_path, name, folder):
    with pytest.raises(
        FileNotFoundError,
        match=rf"no {folder} in .*downloads: pass download=True.*source='bundled'",
    ):
        data.load(name, source="full")
    assert not (tmp_path / "downloads").exists()


@pytest.fixture
def fake_cifar(tmp_path, monkeypatch):
    """A CIFAR-100 of 7 images, as torchvision is made to expect: (folder, pixels, labels)."""
    from torchvision.datasets import CIFAR100

    rng = np.random.default_rng(1)
    pixels, labels = rng.integers(0, 256, (7, 3072), dtype=np.uint8), [5, 99, 0, 3, 42, 17, 8]
    contents = {
        "train": pickle.dumps({"data": pixels, "fine_labels": labels}),
        "test": pickle.dumps({"data": pixels[:1], "fine_labels": labels[:1]}),
        "meta": pickle.dumps({"fine_label_names": [str(i) for i in range(100)]}),
    }
    folder = tmp_path / "made" / "cifar-100-python"
    folder.mkdir(parents=True)
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    monkeypatch.setattr(CIFAR100, "train_list", [["train", md5(contents["train"])]])
    monkeypatch.setattr(CIFAR100, "test_list", [["test", md5(contents["test"])]])
    monkeypatch.setattr(
        CIFAR100,
        "meta",
        {"filename": "meta", "key": "fine_label_names", "md5": md5(contents["meta"])},
    )
    return folder, torch.from_numpy(pixels).view(7, 3, 32, 32).float() / 255, labels


@pytest.fixture
def fake_fashion(tmp_path):
    """A Fashion-MNIST of 5 training images, unpacked; returns its folder, pixels and labels."""
    rng, labels = np.random.default_rng(2), np.array([9, 0, 3, 3, 7], np.uint8)
    pixels = rng.integers(0, 256, (5, 28, 28), dtype=np.uint8)
    raw = tmp_path / "made" / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    for part in ("train", "t10k"):
        for kind, array in (("images-idx3", pixels), ("labels-idx1", labels)):
            header = bytes([0, 0, 8, array.ndim]) + b"".join(
                n.to_bytes(4, "big") for n in array.shape
            )
            (raw / f"{part}-{kind}-ubyte").write_bytes(header + array.tobytes())
    return raw.parent, torch.from_numpy(pixels)[:, None].float() / 255, labels.tolist()


@pytest.mark.parametrize(
    "name, made, title, classes, chosen, classes_chosen",
    [
        ("cifar100", "fake_cifar", "CIFAR-100", 100, [6, 2], [8, 0]),
        ("fashion_mnist", "fake_fashion", "Fashion-MNIST", 10, [4, 1], [7, 0]),
    ],
)
def test_full_set_of_torchvision(
    tmp_path, request, name, made, title, classes, chosen, classes_chosen
):
    folder, images, labels = request.getfixturevalue(made)
    shutil.copytree(folder, tmp_path / "downloads" / folder.name)
    loaded = data.load(name)
    assert loaded.source == f"full: {title} training set" and loaded.num_classes == classes
    assert (
        torch.equal(loaded.images, images)
        and loaded.labels.tolist() == labels
        and loaded.labels.dtype == torch.int64
    )
    some = data.load(name, indices=chosen)
    assert torch.equal(some.images, images[chosen]) and some.labels.tolist() == classes_chosen
    assert data.load(name, source="bundled").source.startswith("bundled")


def test_fashion_mnist_without_one_of_its_files_is_refused(tmp_path, fake_fashion):
    folder, *_ = fake_fashion
    shutil.copytree(folder, tmp_path / "downloads" / folder.name)
    (tmp_path / "downloads" / folder.name / "raw" / "train-images-idx3-ubyte").unlink()
    with pytest.raises(ValueError, match="FashionMNIST is damaged.*delete it"):
        data.load("fashion_mnist")


def test_fashion_mnist_is_downloaded_aside(tmp_path, monkeypatch, fake_fashion):
    from torchvision.datasets import FashionMNIST

    folder, images, _ = fake_fashion
    monkeypatch.setattr(
        FashionMNIST, "download", lambda self: shutil.copytree(folder, f"{self.root}/{folder.name}")
    )
    assert torch.equal(data.load("fashion_mnist", download=True).images, images)
    assert left_in(tmp_path / "downloads") == ["FashionMNIST"]


def test_full_cifar100_from_its_archive(tmp_path, monkeypatch, fake_cifar):
    folder, images, _ = fake_cifar
    (tmp_path / "downloads").mkdir()
    packed = tmp_path / "downloads" / "cifar-100-python.tar.gz"
    with tarfile.open(packed, "w:gz") as archive:
        archive.add(folder, folder.name)
    monkeypatch.setitem(data.FULL, "cifar100", (data.FULL["cifar100"][0], md5(packed.read_bytes())))
    assert torch.equal(data.load("cifar100").images, images)


def test_damaged_full_cifar100_is_refused_not_replaced_by_the_bundle(tmp_path, fake_cifar):
    shutil.copytree(fake_cifar[0], tmp_path / "downloads" / "cifar-100-python")
    with open(tmp_path / "downloads" / "cifar-100-python" / "train", "ab") as file:
        file.write(b"!")
    with pytest.raises(
        ValueError, match=r"cifar-100-python is damaged .*delete it, or pass source='bundled'"
    ):
        data.load("cifar100")


def test_default_folder_is_git_ignored_downloads(monkeypatch):
    monkeypatch.delenv("DLM_DATA")
    if (data.BUNDLE / "downloads" / "tiny-imagenet-200").exists():
        pytest.skip("the full set is installed here")
    with pytest.raises(FileNotFoundError, match=f"data{os.sep}downloads"):
        data.load("imagenet64", source="full")
