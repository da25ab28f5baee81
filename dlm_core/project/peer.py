"""``breaching`` 0.1.2 on our clients, for `make bench`: run by the Python of an environment of its
own, .venv-peer/.

    python -m dlm_core.project.peer ATTACK INDEX

ATTACK is deepleakage or invertinggradients, INDEX a bundled CIFAR-100 image. It is told the
client's true gradient, and Inverting Gradients the label as well. Its optimisation runs as shipped,
but for the number of iterations (ITERATIONS instead of 1,200 and 24,000). Prints {"psnr",
"seconds", "evaluations", "peak"} as JSON.
"""

import contextlib
import json
import math
import os
import subprocess
import sys
import time
import venv
from pathlib import Path

from dlm_core.harness.paths import REPOSITORY

ITERATIONS = {"deepleakage": 500, "invertinggradients": 9500}
# As pinned for ourselves.
SHARED = ("torch==", "torchvision==", "pillow==")


def environment() -> Path:
    """Its Python; the environment is made on first use."""
    folder = REPOSITORY / ".venv-peer"
    python = folder / "bin" / "python"
    if not (folder / "made").exists():
        print(
            "Making breaching's environment in .venv-peer/: several minutes and GB, once.",
            file=sys.stderr,
        )
        venv.create(folder, with_pip=True, clear=True)
        pins = (REPOSITORY / "requirements.txt").read_text(encoding="utf-8").splitlines()
        wanted = ["breaching==0.1.2", *(pin for pin in pins if pin.startswith(SHARED))]
        subprocess.run(
            [python, "-m", "pip", "install", "-q", "--disable-pip-version-check", *wanted],
            check=True,
        )
        (folder / "made").touch()
    return python


def measure(python: Path, attack: str, index: int, threads: int) -> dict[str, float]:
    """One reconstruction in a process of its own.

    Parameters
    ----------
    python
        Of breaching's environment.
    attack
        A key of ITERATIONS.
    index
        Of the bundled CIFAR-100 image.
    threads
        That torch computes on.
    """
    settings = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": str(threads)}
    command = [str(python), "-W", "ignore", "-m", "dlm_core.project.peer", attack, str(index)]
    done = subprocess.run(
        command, cwd=REPOSITORY, env=settings, check=True, capture_output=True, text=True
    )
    return json.loads(done.stdout.splitlines()[-1])


def main(attack: str, index: int) -> None:
    """What this module's command line does."""
    import breaching
    import torch
    from omegaconf import OmegaConf

    from dlm_core import data, federated, models, objectives
    from dlm_core.harness import memory

    truth = data.load("cifar100", indices=[index], source="bundled")
    model = models.build("lenet", seed=index)
    gradients = [
        g.detach() for g in objectives.gradient(model, federated.loss, truth.images, truth.labels)
    ]
    images = {
        "modality": "vision",
        "task": "classification",
        "shape": list(truth.images.shape[1:]),
        "classes": 100,
        "size": 1,
    }
    public = OmegaConf.create({**images, "normalize": True, "mean": [0.0] * 3, "std": [1.0] * 3})
    labels = truth.labels if attack == "invertinggradients" else None
    local = {
        "num_data_points": 1,
        "labels": labels,
        "local_hyperparams": None,
        "num_users": 1,
        "data_key": 0,
    }
    payload = {"parameters": list(model.parameters()), "buffers": [], "metadata": public}
    setup = {"device": torch.device("cpu"), "dtype": torch.float}
    torch.manual_seed(1000 + index)
    with contextlib.redirect_stdout(sys.stderr):
        settings = breaching.get_attack_config(
            attack, overrides=[f"optim.max_iterations={ITERATIONS[attack]}"]
        )
        attacker = breaching.attacks.prepare_attack(
            model, torch.nn.CrossEntropyLoss(), settings, setup
        )
        began = time.perf_counter()
        found, _ = attacker.reconstruct(
            [payload], [{"gradients": gradients, "buffers": None, "metadata": local}], {}
        )
        seconds = time.perf_counter() - began
    error = (found["data"].clamp(0, 1) - truth.images).double().square().mean()
    psnr = -10 * math.log10(float(error) + 1e-300)
    used = {"evaluations": ITERATIONS[attack], "peak": memory.peak()}
    print(json.dumps({"psnr": psnr, "seconds": seconds, **used}))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
