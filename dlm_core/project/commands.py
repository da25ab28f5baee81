"""What each command does. Nothing here is imported before it is needed, so that `env` and the help
texts need no package.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from dlm_core.harness.paths import checkout, writable
from dlm_core.project import environment

# That an audit of two files writes by default.
PICTURE = "reconstruction.png"


def env() -> None:
    """Make the environment where it is absent, and print its Python."""
    print(environment.ensure())


def figures(
    profile: str,
    only: str | None,
    chosen_set: str,
    parameters: Sequence[str],
    jobs: int | None,
    out: str | None,
    scheduler: str | None,
    in_place: bool,
    device: str | None,
) -> int:
    """Run notebooks; 1 where one failed."""
    checkout("figures")
    _compute_on(device)
    from dlm_core.project import reproduce
    from dlm_core.project.parameters import given

    failed = reproduce.run(
        profile,
        only=only,
        chosen_set=chosen_set,
        parameters=given(parameters),
        jobs=jobs,
        out=out,
        scheduler=scheduler,
        in_place=in_place,
    )
    return 1 if failed else 0


def _compute_on(device: str | None) -> None:
    """Hand the device to the notebooks through the environment."""
    from dlm_core.harness import devices

    devices.named(device)  # which refuses what is not here
    if device is not None:
        os.environ[devices.VARIABLE] = device


def verify(
    profile: str,
    only: str | None,
    chosen_set: str,
    jobs: int | None,
    against: str | None,
    out: str | None,
    run: bool,
    device: str | None,
) -> int:
    """Run notebooks once more and compare; 1 where a result differs or a notebook failed."""
    checkout("verify")
    _compute_on(device)
    from dlm_core.project import verify

    passed = verify.verify(
        profile,
        only=only,
        chosen_set=chosen_set,
        jobs=jobs,
        against=against,
        out=out,
        run=run,
    )
    return 0 if passed else 1


def test(pytest: Sequence[str]) -> int:
    """Run pytest with these arguments; without any, the whole of what CI runs."""
    repository = checkout("test")
    if pytest:
        return _run("-m", "pytest", *pytest)
    from dlm_core.project import flower_environment, kernel

    build = repository / "build" / "smoke"
    shutil.rmtree(build, ignore_errors=True)
    os.environ.update(DLM_STORE=str(build / "store"), DLM_SMOKE_STORE=str(build / "store"))
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # workers side by side
    os.environ.setdefault("DLM_FIGURES", str(build))
    parallel = ("-m", "pytest", "-n", "logical", "--maxprocesses", "8")
    alone = ("--dist", "loadfile")  # a notebook to a worker
    lax = ("--nbval-lax", "--nbval-kernel-name", kernel.NAME, "-p", "no:cacheprovider")
    nbval = (*parallel, *alone, *lax)
    steps = [
        ("-m", "dlm_core", "figures", "--profile", "smoke", "--set", "all", "--out", str(build)),
        (*parallel, "tests"),  # which goes to which worker: tests/conftest.py
        (*nbval, str(build / "notebooks")),
        (*nbval, "notebooks/teaching", "notebooks/howto"),
    ]
    try:
        flower_environment.environment()
        steps.append(("-m", "dlm_core", "flower", "--profile", "smoke"))
    except ChildProcessError as why:
        print(f"no federation runs: {why}")
    with kernel.own():
        codes = [_run(*step) for step in steps]
    return max(codes)


def lab(jupyter: Sequence[str]) -> int:
    """Start JupyterLab on the notebooks, with these arguments."""
    checkout("lab")
    from dlm_core.project import kernel

    os.environ.setdefault("OMP_NUM_THREADS", "1")  # kernels side by side
    # Without this Jupyter refuses to serve root, the only user of many containers.
    root = ["--allow-root"] if hasattr(os, "geteuid") and os.geteuid() == 0 else []
    with kernel.own():
        return _run("-m", "jupyter", "lab", "notebooks", *root, *jupyter)


def site(out: str | None) -> int:
    """Build the site into the folder ``out``."""
    folder = _folder("site", out)
    settings = ("-q", "-W", "--keep-going", "-E", "-b", "html", "-c", "docs")
    doctrees = folder.with_name("doctrees")
    code = _run("-m", "sphinx", *settings, "-d", str(doctrees), ".", str(folder))
    if not code:
        print(f"the site is in {folder}: open {folder / 'index.html'}")
    return code


def animation(out: str | None) -> None:
    """Write a reconstruction in the making, as the site's first page shows it."""
    repository = checkout("animation")
    from dlm_core.project import animation

    folder = animation.PLACE.parent if out is None else _folder("animation", out)
    path = animation.write(folder / animation.PLACE.name)
    print(path.relative_to(repository) if path.is_relative_to(repository) else path)


def assignment(out: str | None) -> None:
    """Write the lessons, for teachers and for students, into the folder ``out``."""
    folder = _folder("assignment", out)
    from dlm_core.project import lessons

    for path in lessons.release(folder):
        print(path)


def _folder(command: str, out: str | None) -> Path:
    """The folder that ``out`` names, or the command's own in build/."""
    repository = checkout(command)
    if out == "":
        raise ValueError("--out is empty; leave it out for the default")
    return writable((repository / "build" / command if out is None else Path(out)).resolve())


def assignment_check() -> int:
    """Prove that the lessons' tests can pass and fail; 1 where one cannot."""
    checkout("assignment-check")
    from dlm_core.project import lessons

    wrong = lessons.check()
    print("\n".join(wrong) or "every test passes on the solution and fails without it")
    return 1 if wrong else 0


def refresh_lessons(only: str | None) -> None:
    """Run lessons and how-tos and replace them by their executed versions."""
    checkout("lessons")
    from dlm_core.project import lessons

    lessons.refresh(only)


def bench(num_images: int, peer_images: int, device: str | None) -> None:
    """Measure the attacks, on a device where one is named many at once."""
    checkout("bench")
    from dlm_core.project import bench, bench_lanes

    if device is not None:
        bench_lanes.run(device)
    else:
        bench.run(num_images, peer_images)


def flower(profile: str) -> int:
    """Run Flower's strategies behind the wrapper, and a federation with its audit; 1 where one
    fails.
    """
    checkout("flower")
    from dlm_core import check
    from dlm_core.project import flower_environment, flower_run

    check.one_of("PROFILE", profile, ("smoke", "quick"))
    python, smoke = flower_environment.environment(), profile == "smoke"
    code = 0 if smoke else flower_run.strategies(python)  # pytest runs them as well
    return 0 if flower_run.run(python, smoke=smoke) and not code else 1


def clean(environment_too: bool) -> None:
    """Remove what make made."""
    repository = checkout("clean")
    caches = (".pytest_cache", ".ruff_cache", ".mypy_cache", ".hypothesis")
    environments = (".venv", ".venv-flower", ".venv-peer") if environment_too else ()
    for name in ("build", ".store", *caches, *environments):
        shutil.rmtree(repository / name, ignore_errors=True)
    # Not elsewhere: other environments lie in the repository as well.
    for folder in ("dlm_core", "tests", "docs"):
        for cache in (repository / folder).rglob("__pycache__"):
            shutil.rmtree(cache, ignore_errors=True)


def attack(
    before: str | None,
    after: str | None,
    show: bool,
    model: str,
    image_shape: str,
    num_classes: int | None,
    num_images: int,
    attack: str,
    client: str | None,
    normalise: Any,
    out: str | None,
    minutes: float | None,
    device: str | None,
    json: str | None,
    report: str | None,
) -> int:
    """Audit two snapshots, or all that a folder keeps, or list what can be named; the exit status
    says the verdict, or that the audit was interrupted.
    """
    if show:
        print("\n".join(_names()))
        return 0
    whole = before is not None and after is None and Path(before).is_dir()
    if before is None or (after is None and not whole):
        raise ValueError(
            "attack takes two files, the weights before and after a round, "
            "or a folder that keeps them; see --help"
        )
    shape = _shape(image_shape)
    from dlm_core.harness import account, kept, page, written
    from dlm_core.harness.audit import audit
    from dlm_core.project.factories import network

    asked: dict[str, Any] = {
        "image_shape": shape,
        "num_classes": num_classes,
        "num_images": num_images,
        "attack": attack,
        "client": client,
        "normalise": normalise,
        "device": device,
    }
    if whole:
        for said, value in {"--json and --report are": json or report, "--out is": out}.items():
            if value:
                raise ValueError(f"{said} for two files; in a folder all is written beside them")
        pairs = kept.read(before)
        asked["model"] = network(model, shape, num_classes) if ":" in model else model
        return kept.status(kept.audits(pairs, minutes=minutes, asked=asked))
    assert after is not None
    out = PICTURE if out is None else out
    writers = {"json": (json, account.write), "report": (report, page.write)}
    given = {name: path for name, (path, _) in writers.items() if path is not None}
    written.check_apart({"before": before, "after": after, "out": out, **given})
    for name, path in given.items():
        written.check_writable(name, path)
    asked["model"] = network(model, shape, num_classes) if ":" in model else model
    budget: dict[str, Any] = {} if minutes is None else {"minutes": minutes}
    found = audit(before, after, **asked, out=out, **budget)
    for name, path in given.items():
        if written.keep(name, path, partial(writers[name][1], found)):
            print(f"{path} has all of it")
    return found.exit_status


def bound(
    weights: str,
    images: Sequence[str],
    labels: str | None,
    learning_rate: float,
    steps: int,
    batch_size: int | None,
    model: str,
    image_shape: str,
    num_classes: int | None,
    client: str,
    precision: str | None,
    defence: str | None,
    normalise: Any,
    out: str,
    json: str | None,
) -> None:
    """Say how much a client's update would tell of its images."""
    shape = _shape(image_shape)
    if labels is not None and not re.fullmatch(r"\d{1,9}(,\d{1,9})*", labels):
        raise ValueError(f"--labels is {labels!r}; it takes class indices such as 3 or 3,5")
    import torch

    from dlm_core import check
    from dlm_core.harness import exposure, photos, written
    from dlm_core.project.factories import network

    files = {"weights": weights, "out": out, **({} if json is None else {"json": json})}
    written.check_apart({**{f"image {name!r}": name for name in images}, **files})
    if json is not None:
        written.check_writable("json", json)
    if precision is not None:
        check.one_of("--precision", precision, ["float16", "bfloat16", "float32"])
    optimizer, options = _with_options("--client", client)
    told = None if defence is None else _with_options("--defence", defence)
    read, own = photos.read(images, shape)
    given = own if labels is None else torch.tensor([int(each) for each in labels.split(",")])
    if given is None:
        raise ValueError("--labels is not given, and the images' files have none")
    found = exposure.bound(
        weights,
        read,
        given,
        learning_rate=learning_rate,
        local_steps=steps,
        batch_size=batch_size,
        model=network(model, shape, num_classes) if ":" in model else model,
        num_classes=None if ":" in model else num_classes,
        client_optimizer=optimizer,
        optimizer_options=options,
        transmitted=None if precision is None else getattr(torch, precision),
        defence=None if told is None else {"name": told[0], **told[1]},
        normalise=normalise,
        out=out,
    )
    if json is not None and written.keep("json", json, partial(exposure.write, found)):
        print(f"{json} has all of it")


def _shape(image_shape: str) -> tuple[int, ...]:
    """How many numbers, and how large, those who take it check."""
    if not re.fullmatch(r"\d+(,\d+)*", image_shape):
        raise ValueError(f"--image-shape is {image_shape!r}; it takes C,H,W such as 3,32,32")
    return tuple(int(size) for size in image_shape.split(","))


def _with_options(option: str, text: str) -> tuple[str, dict[str, Any]]:
    """("sgd", {"momentum": 0.9}) from "sgd:momentum=0.9"; what is no number is a word."""
    import ast

    name, _, rest = text.partition(":")
    options: dict[str, Any] = {}
    for part in filter(None, rest.split(",")):
        key, equals, value = part.partition("=")
        if not (key.isidentifier() and equals):
            raise ValueError(f"{option} is {text!r}; it takes a name, or NAME:OPTION=VALUE,…")
        try:
            options[key] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            options[key] = value
    return name, options


def _names() -> list[str]:
    """What --attack, --model and --client take, a line each, with what an attack's record says."""
    from dlm_core import records
    from dlm_core.beyond import preprocessing
    from dlm_core.harness import audit

    lines = ["--attack, in the order in which all are tried:"]
    lines += [f"  {key:14} {record.client}" for key, record in audit.tried().items()]
    lines.append(f"--model: {', '.join(records.NETWORKS)}")
    lines.append(f"--client: {', '.join(records.CLIENT_OPTIMIZERS)}")
    lines.append(f"--normalise: {', '.join(preprocessing.KNOWN)}")
    return lines


def _run(*arguments: str) -> int:
    """Run a module with this Python, in the repository."""
    return subprocess.run([sys.executable, *arguments], cwd=checkout(arguments[1])).returncode
