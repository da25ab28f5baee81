"""What holds the project together: pins, metadata, the size of the core, the form of the notebooks."""

import ast
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import nbformat
import pytest
import yaml

from dlm_core.project import reproduce

REPOSITORY = Path(__file__).parents[2]
CORE = REPOSITORY / "dlm_core"
SCIENCE = ("check", "data", "models", "federated", "coordinates", "labels", "objectives", "optimizers", "search", "clients",
           "unrolled", "attacks", "defenses", "metrics")  # fmt: skip
NOTEBOOKS = sorted((REPOSITORY / "notebooks").rglob("*.ipynb"))
NOTEBOOKS = [path for path in NOTEBOOKS if ".ipynb_checkpoints" not in path.parts]


def pins(path):
    lines = (line.strip() for line in (REPOSITORY / path).read_text().splitlines())
    return dict(line.split("==") for line in lines if line and not line.startswith("#"))


def test_the_two_lists_of_pins_agree():
    conda = yaml.safe_load((REPOSITORY / "environment.yml").read_text())["dependencies"]
    (pip,) = [entry["pip"] for entry in conda if isinstance(entry, dict)]
    assert dict(line.split("==") for line in pip if "==" in line) == pins("requirements.txt")
    constraints = {re.sub(r"[-_.]+", "-", name).lower(): version for name, version in pins("constraints.txt").items()}
    for name, version in pins("requirements.txt").items():
        assert constraints[re.sub(r"[-_.]+", "-", name).lower()] == version
    python = [entry for entry in conda if isinstance(entry, str) and entry.startswith("python=")]
    required = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["requires-python"]
    assert python == [f"python={required.removeprefix('>=')}"]


def test_versions_agree():
    import dlm_core

    assert tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["version"] == dlm_core.__version__
    assert yaml.safe_load((REPOSITORY / "CITATION.cff").read_text())["version"] == dlm_core.__version__
    assert f"## {dlm_core.__version__}" in (REPOSITORY / "CHANGELOG.md").read_text()


def code_lines(path):
    """Lines that hold code: neither blank, nor comment, nor docstring."""
    tree = ast.parse(path.read_text())
    documented = set()
    for node in ast.walk(tree):
        if (
            isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef))
            and ast.get_docstring(node, clean=False) is not None
        ):
            documented |= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    lines = enumerate(path.read_text().splitlines(), 1)
    return sum(
        bool(line.strip()) and not line.strip().startswith("#") and number not in documented for number, line in lines
    )


def test_the_science_stays_thin_and_points_one_way():
    assert sum(code_lines(CORE / f"{name}.py") for name in SCIENCE) <= 1000
    for name in SCIENCE:
        tree = ast.parse((CORE / f"{name}.py").read_text())
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "dlm_core":
                imported = [node.module.split(".")[1]] if "." in node.module else [alias.name for alias in node.names]
                assert set(imported) <= {*SCIENCE, "recursion", "exact"}, f"{name} imports {imported} of the artifact"
            assert not (isinstance(node, ast.Call) and getattr(node.func, "id", "") == "print"), f"{name} prints"


def test_no_function_is_long():
    for path in CORE.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                documented = (
                    node.body[0].end_lineno - node.lineno if ast.get_docstring(node) else 0
                )  # signature and docstring
                assert node.end_lineno - node.lineno - documented <= 50, f"{path.name}: {node.name}"


def test_importing_costs_next_to_nothing():
    script = "import torch, time; began = time.perf_counter(); import dlm_core; print(time.perf_counter() - began)"
    seconds = float(subprocess.check_output([sys.executable, "-c", script], cwd=REPOSITORY, text=True))
    assert seconds < 0.3
    subprocess.run(
        [sys.executable, "-c", "import sys, dlm_core; assert 'torch' not in sys.modules"], cwd=REPOSITORY, check=True
    )


def test_lint():
    subprocess.run([sys.executable, "-m", "ruff", "check", "."], cwd=REPOSITORY, check=True)


def test_the_catalogue_names_the_notebooks_and_their_parameters():
    assert {path.stem for path in NOTEBOOKS if path.parent.name == "notebooks"} == set(reproduce.catalogue())
    for name, entry in reproduce.catalogue().items():
        cells = nbformat.read(REPOSITORY / "notebooks" / f"{name}.ipynb", as_version=4).cells
        (cell,) = [cell for cell in cells if "parameters" in cell.metadata.get("tags", [])]
        defaults = {node.targets[0].id: ast.literal_eval(node.value) for node in ast.parse(cell.source).body}
        assert defaults["profile"] == "quick" and entry["set"] in reproduce.SETS
        for profile in reproduce.PROFILES:
            assert set(entry[profile]) <= set(defaults), f"{name}: {profile}"
        assert {**defaults, **entry["quick"]} == defaults, f"{name}: the defaults are not those of quick"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_have_their_form(path):
    cells = nbformat.read(path, as_version=4).cells
    code = [cell for cell in cells if cell.cell_type == "code"]
    assert cells[0].source.startswith("# ") and not cells[0].source.startswith("# # ")
    assert all(len(cell.source.splitlines()) <= 25 for cell in code)
    counts = [cell.execution_count for cell in code]
    assert None not in counts and counts == sorted(counts), "committed without having been run top to bottom"
    outputs = [output for cell in code for output in cell.outputs]
    assert not any(output.output_type == "error" or output.get("name") == "stderr" for output in outputs)
    assert any("NBVAL_CHECK_OUTPUT" in cell.source for cell in code)
    assert path.stat().st_size < 1_000_000
    assert not re.search(r"/(?:work|root|home|tmp|Users)/\w", path.read_text())
    images = [o for cell in code for o in cell.outputs if "image/png" in o.get("data", {})]
    assert all(output.metadata.get("image/png", {}).get("alt") for output in images), "a figure lacks alt text"


def test_the_readme_s_table_is_the_figures_claims():
    text = (REPOSITORY / "README.md").read_text()
    table = re.search(r"<!-- results -->\n(.*?)\n<!-- /results -->", text, re.DOTALL)[1]
    assert table == reproduce.results_table(REPOSITORY / "figures")


def test_every_figure_is_in_the_manifest_with_its_provenance():
    folder = REPOSITORY / "figures"
    manifest = json.loads((folder / "manifest.json").read_text())
    files = {path.name for path in folder.glob("*.*") if path.suffix in (".png", ".pdf", ".csv", ".md")} - {"claims.md"}
    assert files == set(manifest)
    for name, entry in manifest.items():
        assert (
            entry["notebook"] in name
            and entry["profile"] in reproduce.PROFILES
            and entry["versions"]
            and entry["seconds"] > 0
        )


def test_links_in_the_readme_lead_somewhere():
    for target in re.findall(r"\]\(([^)#:]+?)\)", (REPOSITORY / "README.md").read_text()):
        assert (REPOSITORY / target).exists(), target
