"""The command line. This file parses; dlm_core/project/commands.py acts."""

from __future__ import annotations

import argparse
import logging
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from dlm_core.harness.paths import in_checkout
from dlm_core.project import commands, environment

# Of `attack`, whose verdicts are 0 to 3: a wrong command line or file, and an error of our own.
REFUSED, FAILED = 64, 70


def main(arguments: Sequence[str] | None = None) -> int:
    """Do what the command line says; return the exit status. What is wrong with it is one sentence
    on standard error.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    wrong = REFUSED if [*arguments[:1]] == ["attack"] else 2
    if sys.version_info < (3, 11):
        return _refuse(f"{environment.refused()}", wrong)
    options = _parser(wrong).parse_args(arguments)
    act = options.__dict__.pop("act")
    try:
        return act(**vars(options)) or 0
    except ModuleNotFoundError as error:
        return _refuse(_missing(error.name or "a package"), wrong)
    except ValueError as error:
        return _refuse(str(error), wrong)
    except OSError as error:
        return _refuse(_said(error), wrong)
    except KeyboardInterrupt:
        # It would print what the notebook's interrupted kernel was at.
        logging.getLogger("asyncio").disabled = True
        kept = "; finished trials are kept, the same command goes on from here"
        said = kept if act in (commands.figures, commands.verify, commands.test) else ""
        print(f"\ninterrupted{said}", file=sys.stderr)
        return 130
    except Exception:
        if act is not commands.attack:
            raise
        traceback.print_exc()  # Python's own status for it is that of a verdict
        return FAILED


def _refuse(sentence: str, status: int) -> int:
    print(f"error: {' '.join(sentence.splitlines())}", file=sys.stderr)
    return status


def _said(error: OSError) -> str:
    """What went wrong on the disk or the network, as a sentence: "No space left on device"."""
    if error.strerror is None:  # one of our own
        return str(error)
    return f"{error.strerror}" + (f": {error.filename}" if error.filename else "")


def _missing(package: str) -> str:
    """What to do about a package that is not there, in a checkout and in an installed copy."""
    if in_checkout():
        return (
            f"{package} is not installed for this Python; `make env` makes .venv/ once, "
            "then use its Python: source .venv/bin/activate"
        )
    return (
        f"{package} is not installed for this Python; "
        "pip install '.[notebooks]' in a clone of the repository brings it"
    )


TAKES = {"int": "a whole number", "float": "a number"}


class _Parser(argparse.ArgumentParser):
    """One that says what is wrong in one line; the usage is in the help.

    Attributes
    ----------
    wrong
        Exit status of a wrong command line.
    """

    def __init__(self, *, wrong: int, **settings: Any) -> None:
        super().__init__(allow_abbrev=False, **settings)
        self.wrong = wrong

    def error(self, message: str) -> NoReturn:
        """End with the exit status ``wrong``."""
        for kind, takes in TAKES.items():
            message = re.sub(
                rf"argument (\S+): invalid {kind} value: (.+)",
                rf"\1 is \2; it takes {takes}",
                message,
            )
        self.exit(self.wrong, f"error: {' '.join(message.split())}; see {self.prog} --help\n")


def _parser(wrong: int) -> argparse.ArgumentParser:
    called = Path(sys.argv[0]).name
    program = "python -m dlm_core" if called == "__main__.py" else called
    about = "What the repository can do, and attacks on two snapshots of your own."
    parser = _Parser(prog=program, description=about, wrong=wrong)
    choices = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(
        name: str, act: Callable[..., int | None], text: str, **settings: Any
    ) -> argparse.ArgumentParser:
        sub = choices.add_parser(name, help=text, description=text, wrong=wrong, **settings)
        sub.set_defaults(act=act)
        return sub

    command("env", commands.env, "make or update the environment in .venv/ and print its Python")
    _notebook_commands(command)
    _teaching_commands(command)
    _measuring_commands(command)
    return parser


def _notebook_commands(command: Callable[..., argparse.ArgumentParser]) -> None:
    figures = command(
        "figures", commands.figures, "run the notebooks: every figure and table, into figures/"
    )
    _which_notebooks(figures)
    figures.add_argument(
        "--parameter",
        action="append",
        default=[],
        dest="parameters",
        metavar="'NAME=VALUE …'",
        help="instead of the profile's, of the same type; several with spaces between them",
    )
    figures.add_argument("--out", help="folder for figures and tables (default: figures/)")
    figures.add_argument(
        "--scheduler", help="tcp:// address of a Dask scheduler to run the trials on"
    )
    figures.add_argument(
        "--in-place",
        action="store_true",
        help="also replace the notebooks by their executed versions",
    )
    verify = command(
        "verify",
        commands.verify,
        "run notebooks once more, without stored trials, and compare every number and verdict",
    )
    _which_notebooks(verify)
    verify.add_argument(
        "--against",
        help="folder of figures to compare with (default: figures/ for paper; for the others, "
        "what the first verification found)",
    )
    verify.add_argument("--out", help="folder of the run (default: build/verify/PROFILE/now)")
    verify.add_argument(
        "--no-run",
        action="store_false",
        dest="run",
        help="compare what lies in --out already",
    )
    test = command(
        "test",
        commands.test,
        "run pytest, every notebook under the smoke profile, nbval on them, lessons and how-tos",
    )
    test.add_argument(
        "pytest", nargs="*", help="arguments for pytest alone (then no notebooks run)"
    )
    lab = command("lab", commands.lab, "start JupyterLab in the project's environment")
    lab.add_argument("jupyter", nargs="*", help="arguments for JupyterLab, after --")


def _which_notebooks(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--profile", default="quick", help="smoke (CI), quick (default) or paper")
    parser.add_argument("--only", help="one notebook, by name or number; several with commas")
    parser.add_argument(
        "--set",
        default="paper",
        dest="chosen_set",
        help="paper (00 to 11 and 21, default), beyond, or all",
    )
    parser.add_argument("--jobs", type=int, help="worker processes (default: one per core)")
    parser.add_argument(
        "--device",
        help="cuda or cpu: searches run there, many at once (default: one by one on the CPU, the "
        "same to the bit)",
    )


def _teaching_commands(command: Callable[..., argparse.ArgumentParser]) -> None:
    site = command(
        "site",
        commands.site,
        "build the site of notebooks, figures, claims, course and reference; needs no network",
    )
    site.add_argument("--out", help="folder for the site (default build/site)")
    assignment = command(
        "assignment",
        commands.assignment,
        "write the lessons: the students' versions, without solutions, and an nbgrader course",
    )
    assignment.add_argument("--out", help="folder for them (default build/assignment)")
    command(
        "assignment-check",
        commands.assignment_check,
        "prove that the lessons' tests pass on the solutions and fail without them",
    )
    animation = command(
        "animation",
        commands.animation,
        "attack four clients and write how their pictures emerge, as the site shows it (a GIF)",
    )
    animation.add_argument("--out", help="folder for it (default docs/_static)")
    refresh = command(
        "lessons",
        commands.refresh_lessons,
        "run the lessons and how-tos and replace them by their executed versions",
    )
    refresh.add_argument("--only", help="a part of the names of those to run")


def _measuring_commands(command: Callable[..., argparse.ArgumentParser]) -> None:
    bench = command(
        "bench",
        commands.bench,
        "measure speed and memory of the attacks, ours beside the released settings",
    )
    bench.add_argument(
        "--num-images",
        "--images",
        type=int,
        default=20,
        help="bundled CIFAR-100 images to attack (default 20; 0: the threads alone)",
    )
    bench.add_argument(
        "--peer-images",
        type=int,
        default=3,
        help="of them for breaching's attacks (default 3; 0: without it)",
    )
    bench.add_argument(
        "--device",
        help="cuda or cpu: instead, many searches as one batch there against one after the other",
    )
    flower = command(
        "flower",
        commands.flower,
        "run a federation of Flower in processes of its own, and audit what its server kept",
    )
    flower.add_argument("--profile", default="quick", help="smoke (one round) or quick (default)")
    clean = command(
        "clean",
        commands.clean,
        "remove what make made: build/, the store of trials, caches; not the figures",
    )
    clean.add_argument(
        "--all", action="store_true", dest="environment_too", help="the environments too"
    )
    _attack_command(command)
    _bound_command(command)


def _attack_command(command: Callable[..., argparse.ArgumentParser]) -> None:
    attack = command(
        "attack",
        commands.attack,
        "does this client leak? reconstruct images from two snapshots, safetensors or torch files",
        epilog="Exit status: 0 nothing was sent (both files have the same weights and statistics); "
        "1 an image leaked; 2 something else did, or may have; 3 no leak was shown, which does not "
        f"mean that the client is safe; {REFUSED} wrong usage or a file that cannot be read; "
        f"{FAILED} an error of this program; 130 interrupted.",
    )
    _snapshots(attack)
    attack.add_argument(
        "--list",
        action="store_true",
        dest="show",
        help="the attacks, networks and clients that can be named, and stop",
    )
    _network_options(attack)
    attack.add_argument(
        "--num-images",
        "--images",
        type=int,
        default=1,
        help="images in the client's step (default 1)",
    )
    attack.add_argument(
        "--attack",
        default="all",
        help="one of them (see --list); all (default): in turn, until one explains the update",
    )
    _client_options(attack)
    attack.add_argument(
        "--minutes",
        type=float,
        help="that the audit may take (default 5 for two files); each search says what it needs",
    )
    attack.add_argument(
        "--device", help="cuda or cpu: attacks compute there (default: where the network lies)"
    )
    _written(attack)


def _bound_command(command: Callable[..., argparse.ArgumentParser]) -> None:
    bound = command(
        "bound",
        commands.bound,
        "how much would my update tell? for a client's owner, from the weights and its own images: "
        "directions fixed, the PSNR that an observer with a given prior can expect in the mean, "
        "and where, before any attack",
    )
    bound.add_argument("weights", help="state dict that the client receives, W_t")
    bound.add_argument(
        "images",
        nargs="+",
        help="the client's: pictures, or .npz, .safetensors or torch files of arrays (nothing in "
        "them is run)",
    )
    bound.add_argument(
        "--labels", help="class indices with commas (default: 'labels' in the images' files)"
    )
    bound.add_argument("--learning-rate", type=float, required=True, help="above 0")
    bound.add_argument("--steps", type=int, default=1, help="local steps (default 1)")
    bound.add_argument("--batch-size", type=int, help="images a step (default: all)")
    _network_options(bound)
    bound.add_argument(
        "--client",
        default="sgd",
        help="optimizer, with its options: sgd (default), sgd:momentum=0.9,weight_decay=1e-4, adam",
    )
    bound.add_argument("--precision", help="of the weights sent: float16, bfloat16 (default: own)")
    bound.add_argument(
        "--defence",
        "--defense",
        help="with its options: clip_and_noise:clip=1,noise_multiplier=0.1 or "
        "noise:scale=0.01 (default: none); before the server's eyes, or with observer=channel "
        "before those of one who sees both snapshots defended",
    )
    _normalise_option(bound)
    bound.add_argument("--out", default="exposure.png", help="map to write (default exposure.png)")
    bound.add_argument("--json", metavar="FILE", help="write the numbers as JSON too")


def _network_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model",
        default="lenet",
        help="network with the weights' names of dlm_core.models (default lenet; attack --list), "
        "or package.module:factory, a network of your own: the module is imported, from the "
        "current folder too, and the factory called, so it runs your code (nothing in a file of "
        "weights is ever run); it may take image_shape and num_classes",
    )
    parser.add_argument("--image-shape", default="3,32,32", help="C,H,W (default 3,32,32)")
    parser.add_argument(
        "--num-classes", type=int, help="outputs of the last layer (default: as in the file)"
    )


def _snapshots(attack: argparse.ArgumentParser) -> None:
    attack.add_argument(
        "before",
        nargs="?",
        help="state dict that the client received, W_t; or, alone, a folder that keeps both of "
        "several clients (docs/flower.md), each of which is audited, the answers beside them",
    )
    attack.add_argument("after", nargs="?", help="state dict that it sent back, W_t+1")


def _written(attack: argparse.ArgumentParser) -> None:
    attack.add_argument("--out", help=f"picture to write (default {commands.PICTURE})")
    attack.add_argument("--json", metavar="FILE", help="write all that is said as JSON too")
    attack.add_argument(
        "--report",
        metavar="FILE.html",
        help="write a page for whoever decides: verdict, pictures, what was tried and what was not",
    )


def _client_options(attack: argparse.ArgumentParser) -> None:
    attack.add_argument(
        "--client",
        help="optimizer that unrolled_dlm simulates (see --list; default: as the update looks)",
    )
    _normalise_option(attack)


def _normalise_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--normalise",
        "--normalize",
        help="what the client makes of pixels in [0, 1]: a name (see --list), MEAN/STD with a "
        "number a channel (0.49,0.48,0.45/0.25,0.24,0.26), or range=LOW,HIGH (default: nothing)",
    )


if __name__ == "__main__":
    sys.exit(main())
