"""The film on the site's first page, with a still beside it."""

from pathlib import Path

from dlm_core import attacks, data, federated, models
from dlm_core.harness import film
from dlm_core.harness.paths import REPOSITORY

PLACE = REPOSITORY / "docs" / "_static" / "reconstruction.gif"


def write(path: Path = PLACE, dataset: str = "cifar100", num_images: int = 4) -> Path:
    """Attack clients of one image each by DLM+, and write how their pictures emerge.

    Parameters
    ----------
    path
        Of the GIF; its still, the last frame, has the same name and ".png".
    dataset, num_images
        Its first images, bundled; private ones above, the attack's below.
    """
    images, labels, num_classes, _ = data.load(dataset, n=num_images, source="bundled")
    shape = tuple(images.shape[1:])
    model = models.build("lenet", image_shape=shape, num_classes=num_classes, seed=0)
    found = []
    for x, y in zip(images, labels):
        seen = federated.train_locally(model, x[None], y[None], learning_rate=0.01)
        found.append(attacks.dlm_plus(seen, seed=0, keep_every=1))
    frames = film.frames(images, found)
    film.save(frames, path)
    frames[-1].save(path.with_suffix(".png"), optimize=True)
    return path
