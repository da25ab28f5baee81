"""For a user who only audits: the wheel has every module and nothing else, and works anywhere."""

import ast
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
PACKAGE = REPOSITORY / "dlm_core"
PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
NAMES = {"PIL": "pillow", "yaml": "pyyaml", "skimage": "scikit-image", "IPython": "ipykernel"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel, built from a copy: no build folder is left in the checkout."""
    out = tmp_path_factory.mktemp("wheel")
    source = out / "source"
    listed = [
        "git",
        "ls-files",
        "-z",
        "--cached",
        "--others",
        "--exclude-standard",
        "--",
        "dlm_core",
    ]
    names = subprocess.check_output(listed, cwd=REPOSITORY, text=True).split("\0")
    for name in (*filter(None, names), "pyproject.toml", "README.md", "LICENSE"):
        if (REPOSITORY / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((REPOSITORY / name).read_bytes())
    build = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation"]
    done = subprocess.run([*build, "-w", out, source], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (path,) = out.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """A folder into which the wheel is unpacked, as pip does, far from the repository."""
    folder = tmp_path_factory.mktemp("site")
    zipfile.ZipFile(wheel).extractall(folder)
    return folder


def python(folder, *arguments):
    """Run the installed copy, with the packages of this environment, in an empty folder."""
    path = f"import sys; sys.path.insert(0, {str(folder)!r}); sys.path.remove({str(REPOSITORY)!r}) "
    path += f"if {str(REPOSITORY)!r} in sys.path else None; "
    work = folder.parent / "work"
    work.mkdir(exist_ok=True)
    run = [sys.executable, "-c", path + arguments[0], *arguments[1:]]
    return subprocess.run(run, cwd=work, capture_output=True, text=True)


def test_the_wheel_has_every_module_and_nothing_else(wheel):
    packed = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    modules = {path.relative_to(REPOSITORY).as_posix() for path in PACKAGE.rglob("*.py")}
    assert packed == modules | {"dlm_core/py.typed"}


def test_it_brings_the_dlm_command(wheel):
    files = zipfile.ZipFile(wheel)
    (points,) = [name for name in files.namelist() if name.endswith("entry_points.txt")]
    assert "dlm = dlm_core.__main__:main" in files.read(points).decode()


def test_every_module_of_it_is_imported_elsewhere(installed):
    walk = (
        "import dlm_core, importlib; assert dlm_core.__file__.startswith(sys.argv[1]); "
        "[getattr(dlm_core, n) for n in dlm_core.MODULES if n != 'bench']"
    )
    done = python(installed, walk, str(installed))
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["figures"], "figures needs a checkout of the repository"),
        (["test"], "test needs a checkout of the repository"),
        (["lab"], "lab needs a checkout of the repository"),
        (["site"], "site needs a checkout of the repository"),
        (["assignment"], "assignment needs a checkout of the repository"),
        (["bench"], "bench needs a checkout of the repository"),
        (["clean"], "clean needs a checkout of the repository"),
        (["env"], "env needs a checkout of the repository"),
        (["attack", "a.pt", "b.pt"], "snapshot 'a.pt' does not exist"),
    ],
)
def test_what_needs_the_checkout_says_so_in_one_sentence(installed, arguments, message):
    call = "from dlm_core.__main__ import main; sys.exit(main(sys.argv[1:]))"
    done = python(installed, call, *arguments)
    refused = 64 if arguments[0] == "attack" else 2
    assert done.returncode == refused and message in done.stderr, done.stderr
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


AUDIT = """
import torch
from dlm_core import audit, federated, models
torch.manual_seed(0)
model = models.build("lenet", (1, 8, 8), 10, seed=0)
image = (torch.rand(1, 1, 8, 8) * 255).round() / 255
seen = federated.train_locally(model, image, torch.tensor([3]), learning_rate=0.05)
torch.save(model.state_dict(), "before.pt")
torch.save(seen.weights_after, "after.pt")
from dlm_core.__main__ import main
assert main(["attack", "before.pt", "after.pt", "--image-shape", "1,8,8"]) == 1
"""


def test_the_audit_works_elsewhere(installed):
    done = python(installed, AUDIT)
    assert done.returncode == 0, done.stderr
    assert "what it shows has leaked" in done.stdout
    assert (installed.parent / "work" / "reconstruction.png").stat().st_size > 0


def imported_packages(path):
    """Packages that a module imports, wherever in it, but for the standard library and ours."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and not node.level:
            names = [node.module]
        found |= {name.split(".")[0] for name in names}
    return {NAMES.get(name, name) for name in found - sys.stdlib_module_names - {"dlm_core"}}


def declared(requirements):
    return {re.match(r"[A-Za-z0-9_.-]+", each)[0].lower() for each in requirements}


def test_what_is_imported_is_declared():
    core = declared(PROJECT["dependencies"])
    extras = {name: declared(each) for name, each in PROJECT["optional-dependencies"].items()}
    everything = core | extras["notebooks"] | extras["flower"]
    everything |= {"breaching", "omegaconf"}  # the peer has its own
    for path in PACKAGE.rglob("*.py"):
        assert imported_packages(path) <= everything, path


def test_what_an_audit_imports_is_among_the_few_packages_it_needs(installed):
    """While it runs as well; but for what those packages import where they find it."""
    optional = "import torch, torchvision.utils, scipy.stats, safetensors.torch, PIL.Image; "
    listed = "print(*{n.split('.')[0] for n in sys.modules})"
    found = set(python(installed, optional + listed).stdout.split())
    ran = python(installed, AUDIT + listed)
    assert ran.returncode == 0, ran.stderr
    loaded = set(ran.stdout.splitlines()[-1].split()) - found
    extras = declared(PROJECT["optional-dependencies"]["notebooks"])
    packages = {NAMES.get(name, name).replace("_", "-").lower() for name in loaded}
    assert not packages & (extras - declared(PROJECT["dependencies"])), packages & extras


def test_the_pins_of_the_artifact_lie_in_the_ranges():
    from packaging.requirements import Requirement

    lines = (REPOSITORY / "requirements.txt").read_text().splitlines()
    pins = dict(line.lower().split("==") for line in lines if "==" in line)
    extras = PROJECT["optional-dependencies"]
    for text in (*PROJECT["dependencies"], *extras["notebooks"], *extras["site"], *extras["test"]):
        wanted = Requirement(text)
        if wanted.name.lower() in pins:
            assert pins[wanted.name.lower()] in wanted.specifier, text
