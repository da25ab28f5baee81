"""python -m dlm_core: everything that make does, and attacks on two snapshots of your own."""

import argparse
import ast
import logging
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from dlm_core.harness.paths import REPOSITORY
from dlm_core.project import environment


def main(arguments=None):
    options = _parser().parse_args(arguments)
    try:
        return options.act(options) or 0
    except ModuleNotFoundError as error:
        print(
            f"error: {error.name} is not installed for this Python; `make env` makes .venv/ once, then use its Python: "
            "source .venv/bin/activate",
            file=sys.stderr,
        )
        return 2
    except (ValueError, ConnectionError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        logging.getLogger("asyncio").disabled = True  # it would print what the notebook's interrupted kernel was at
        print("\ninterrupted; finished trials are kept, the same command goes on from here", file=sys.stderr)
        return 130


def _parser():
    parser = argparse.ArgumentParser(prog="python -m dlm_core", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name, act, text):
        sub = commands.add_parser(name, help=text, description=text)
        sub.set_defaults(act=act)
        return sub

    command("env", lambda o: print(environment.ensure()), "make or update the environment in .venv/ and print its Python")
    _notebook_commands(command)
    _teaching_commands(command)
    _measuring_commands(command)
    return parser


def _notebook_commands(command):
    figures = command("figures", _figures, "run the notebooks: every figure and table, into figures/")
    figures.add_argument("--profile", default="quick", help="smoke (CI), quick (default) or paper")
    figures.add_argument("--only", help="one notebook, by name or number; several with commas")
    figures.add_argument("--set", default="paper", dest="chosen_set", help="paper (00 to 11, default), beyond, or all")
    figures.add_argument(
        "--parameter", action="append", default=[], help="NAME=VALUE, instead of the profile's; may be repeated"
    )
    figures.add_argument("--jobs", type=int, help="worker processes (default: one per core)")
    figures.add_argument("--out", help="folder for figures and tables (default: figures/)")
    figures.add_argument("--scheduler", help="tcp:// address of a Dask scheduler to run the trials on")
    figures.add_argument("--in-place", action="store_true", help="also replace the notebooks by their executed versions")

    test = command(
        "test", _test, "run pytest, every notebook under the smoke profile, nbval on them, and on the lessons and how-tos"
    )
    test.add_argument("pytest", nargs="*", help="arguments for pytest alone (then no notebooks run)")
    command("lab", _lab, "start JupyterLab in the project's environment")


def _teaching_commands(command):
    site = command("site", _site, "build the site of notebooks, figures, claims, course and reference; needs no network")
    site.add_argument("--out", default="build/site", help="folder for the site (default build/site)")

    assignment = command("assignment", _assignment_files, "write the students' versions of the lessons, without solutions")
    assignment.add_argument("--out", default="build/assignment", help="folder for them (default build/assignment)")
    command(
        "assignment-check", _assignment_check, "prove that the lessons' tests pass on the solutions and fail without them"
    )
    refresh = command("lessons", _lessons, "run the lessons and how-tos and replace them by their executed versions")
    refresh.add_argument("--only", help="a part of the names of those to run")


def _measuring_commands(command):
    bench = command("bench", _bench, "measure speed and memory of the attacks, ours beside the released settings")
    bench.add_argument("--images", type=int, default=20, help="bundled CIFAR-100 images to attack (default 20)")
    bench.add_argument(
        "--peer-images", type=int, default=3, help="of them for breaching's attacks (default 3; 0: without it)"
    )
    clean = command("clean", _clean, "remove what make made: build/, the store of trials, caches; not the figures")
    clean.add_argument("--all", action="store_true", help="the environment too")

    attack = command(
        "attack",
        _attack,
        "does this client leak? reconstruct images from two snapshots of your own (safetensors or torch files)",
    )
    attack.add_argument("before", help="state dict that the client received, W_t")
    attack.add_argument("after", help="state dict that it sent back, W_t+1")
    attack.add_argument(
        "--model",
        default="lenet",
        help="lenet (default), mlp, resnet18 or resnet18_bn, as dlm_core.models builds them: names of the weights included",
    )
    attack.add_argument("--image-shape", default="3,32,32", help="C,H,W (default 3,32,32)")
    attack.add_argument("--num-classes", type=int, help="outputs of the last layer (default: as in the file)")
    attack.add_argument("--images", type=int, default=1, help="images in the client's step (default 1)")
    attack.add_argument(
        "--attack",
        default="all",
        help="interval_dlm, exact, exact_batch, dlm_plus or unrolled_dlm; all (default): in turn, until one explains the update",
    )
    attack.add_argument(
        "--client", help="that unrolled_dlm simulates: sgd, adam, adamw or rmsprop (default: as the update looks)"
    )
    attack.add_argument("--out", default="reconstruction.png", help="picture to write (default reconstruction.png)")


def _figures(options):
    from dlm_core.project import reproduce

    chosen = {name: getattr(options, name) for name in ("only", "chosen_set", "jobs", "out", "scheduler", "in_place")}
    parameters = dict(_assignment(text) for text in options.parameter)
    return 1 if reproduce.run(options.profile, parameters=parameters, **chosen) else 0


def _assignment(text):
    """("seeds", 100) from "seeds=100"; what is no Python literal is a string."""
    name, equals, value = text.partition("=")
    if not equals:
        raise ValueError(f"--parameter is {text!r}; it takes NAME=VALUE, as seeds=100")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value


def _test(options):
    if options.pytest:
        return _run("-m", "pytest", *options.pytest)
    build = REPOSITORY / "build" / "smoke"
    shutil.rmtree(build, ignore_errors=True)
    os.environ.update(DLM_STORE=str(build / "store"))
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # workers side by side
    parallel = (
        "-m",
        "pytest",
        "-n",
        "logical",
        "--maxprocesses",
        "8",
        "--dist",
        "loadfile",
    )  # one file, or notebook, a worker
    nbval = (*parallel, "--nbval-lax", "-p", "no:cacheprovider")
    steps = [
        (*parallel, "tests"),
        ("-m", "dlm_core", "figures", "--profile", "smoke", "--set", "all", "--out", str(build)),
        (*nbval, str(build / "notebooks")),
        (*nbval, "notebooks/teaching", "notebooks/howto"),
    ]
    os.environ.setdefault("DLM_FIGURES", str(build))
    codes = [_run(*step) for step in steps]
    return max(codes)


def _lab(options):
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # kernels side by side
    return _run("-m", "jupyter", "lab", "notebooks")


def _site(options):
    out = Path(options.out)
    settings = ("-q", "-W", "--keep-going", "-E", "-b", "html", "-c", "docs", "-d", str(out.with_name("doctrees")))
    if not (code := _run("-m", "sphinx", *settings, ".", str(out))):
        print(f"the site is in {out}: open {out / 'index.html'}")
    return code


def _assignment_files(options):
    from dlm_core.project import lessons

    for path in lessons.release(options.out):
        print(path)


def _assignment_check(options):
    from dlm_core.project import lessons

    wrong = lessons.check()
    print("\n".join(wrong) or "every test passes on the solution and fails without it")
    return 1 if wrong else 0


def _lessons(options):
    from dlm_core.project import lessons

    lessons.refresh(options.only)


def _bench(options):
    from dlm_core.project import bench

    bench.run(options.images, options.peer_images)


def _clean(options):
    for name in ("build", ".store", ".pytest_cache", ".ruff_cache", ".hypothesis", *([".venv"] if options.all else [])):
        shutil.rmtree(REPOSITORY / name, ignore_errors=True)
    for cache in REPOSITORY.rglob("__pycache__"):
        shutil.rmtree(cache, ignore_errors=True)


def _attack(options):

    if not re.fullmatch(r"\d+(,\d+)*", options.image_shape):  # how many numbers, and how large, models.build checks
        raise ValueError(f"--image-shape is {options.image_shape!r}; it takes C,H,W such as 3,32,32")
    shape = tuple(int(size) for size in options.image_shape.split(","))
    told = {name: getattr(options, name) for name in ("model", "num_classes", "attack", "client", "out")}
    audit.audit(options.before, options.after, image_shape=shape, num_images=options.images, **told)


def _run(*arguments):
    return subprocess.run([sys.executable, *arguments], cwd=REPOSITORY).returncode


if __name__ == "__main__":
    sys.exit(main())
