"""What holds the project together: pins, metadata, one direction of imports, notebooks' form."""

import ast
import json
import re
import subprocess
import sys
import tomllib
from collections import defaultdict
from pathlib import Path

import nbformat
import pytest
import yaml

from dlm_core.harness.sources import imported
from dlm_core.project import parameters, reproduce

REPOSITORY = Path(__file__).parents[2]
CORE = REPOSITORY / "dlm_core"
# Each folder may import of those before it, and of itself; __main__ and __init__ stand above.
FOLDERS = ("", "beyond", "harness", "project")
NOTEBOOKS = sorted((REPOSITORY / "notebooks").rglob("*.ipynb"))
NOTEBOOKS = [path for path in NOTEBOOKS if ".ipynb_checkpoints" not in path.parts]
MODULES = [path for path in sorted(CORE.rglob("*.py")) if path.name != "__main__.py"]
MODULES = [path for path in MODULES if path != CORE / "__init__.py"]


def name_of(path):
    """A module's full name; that of a folder for its __init__."""
    return ".".join(path.relative_to(REPOSITORY).with_suffix("").parts).removesuffix(".__init__")


def folder_of(name):
    """The folder of FOLDERS that a module of dlm_core lies in."""
    part = name.split(".")[1]
    return part if part in FOLDERS else ""


def test_versions_agree():
    import dlm_core

    assert (
        tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["version"]
        == dlm_core.__version__
    )
    assert (
        yaml.safe_load((REPOSITORY / "CITATION.cff").read_text())["version"] == dlm_core.__version__
    )
    assert f"## {dlm_core.__version__}" in (REPOSITORY / "CHANGELOG.md").read_text()


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_imports_point_one_way(path):
    allowed = FOLDERS[: FOLDERS.index(folder_of(name_of(path))) + 1]
    for other in imported(ast.parse(path.read_text()), name_of(path)):
        assert other == "dlm_core" or folder_of(other) in allowed, f"it imports {other}"


@pytest.mark.parametrize("path", [p for p in MODULES if p.parent == CORE], ids=name_of)
def test_the_core_never_prints(path):
    for node in ast.walk(ast.parse(path.read_text())):
        assert not (isinstance(node, ast.Call) and getattr(node.func, "id", "") == "print")


def test_no_function_is_long():
    for path in CORE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                first = node.body[1 if ast.get_docstring(node) and len(node.body) > 1 else 0]
                length = node.end_lineno - first.lineno + 1  # without signature and docstring
                assert length <= 50, f"{path.name}: {node.name} has {length} lines"


def test_no_line_is_longer_than_a_hundred_columns():
    for folder in ("dlm_core", "tests", "docs"):
        for path in (REPOSITORY / folder).rglob("*.py"):
            for number, line in enumerate(path.read_text().splitlines(), 1):
                assert len(line) <= 100, f"{path.name}:{number}"


def test_headings_of_docstrings_stand_on_lines_of_their_own():
    for path in CORE.rglob("*.py"):
        for line in path.read_text().splitlines():
            assert not re.search(r"\w -{4,}|-{4,} \w", line), f"{path.name}: {line}"


def test_importing_costs_next_to_nothing():
    script = (
        "import torch, time; began = time.perf_counter(); "
        "import dlm_core; print(time.perf_counter() - began)"
    )
    seconds = float(
        subprocess.check_output([sys.executable, "-c", script], cwd=REPOSITORY, text=True)
    )
    assert seconds < 0.3
    subprocess.run(
        [sys.executable, "-c", "import sys, dlm_core; assert 'torch' not in sys.modules"],
        cwd=REPOSITORY,
        check=True,
    )


def test_lint():
    """Of the code and of the notebooks, each with the settings of its folder."""
    done = subprocess.run(
        [sys.executable, "-m", "ruff", "check", "--output-format", "concise", "."],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:]


def test_the_catalogue_names_the_notebooks_and_their_parameters():
    catalogue = reproduce.catalogue()
    numbered = {path.stem for path in NOTEBOOKS if path.parent.name == "notebooks"}
    assert numbered == set(catalogue)
    for name, entry in catalogue.items():
        cells = nbformat.read(REPOSITORY / "notebooks" / f"{name}.ipynb", as_version=4).cells
        values = parameters.read(parameters.cell_of({"cells": cells})["source"])
        assert entry["set"] in reproduce.SETS and values["profile"] in reproduce.PROFILES
        # Values are written into the cell: what quick does not name would keep another profile's.
        for profile in reproduce.PROFILES:
            assert set(entry[profile]) <= set(entry["quick"]) <= set(values), f"{name}: {profile}"
        committed = {**values, **reproduce.values_of(name, values["profile"])}
        assert committed == values, f"{name}: the cell is not that of the profile it names"


@pytest.fixture(scope="module")
def code():
    """{notebook: its code cells}, of all notebooks."""
    read = {path.stem: nbformat.read(path, as_version=4).cells for path in NOTEBOOKS}
    return {n: [c for c in cells if c.cell_type == "code"] for n, cells in read.items()}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_have_their_form(path):
    cells = nbformat.read(path, as_version=4).cells
    code = [cell for cell in cells if cell.cell_type == "code"]
    assert cells[0].source.startswith("# ") and not cells[0].source.startswith("# # ")
    tagged = [cell for cell in code if parameters.TAG in cell.metadata.get("tags", [])]
    assert len(tagged) <= 1
    assert all(len(c.source.splitlines()) <= 40 for c in code if c not in tagged)
    counts = [cell.execution_count for cell in code]
    assert None not in counts and counts == sorted(counts), "not run top to bottom"
    outputs = [output for cell in code for output in cell.outputs]
    assert not any(o.output_type == "error" or o.get("name") == "stderr" for o in outputs)
    assert any("NBVAL_CHECK_OUTPUT" in cell.source for cell in code)
    assert path.stat().st_size < 1_000_000
    assert not re.search(r"/(?:work|root|home|tmp|Users)/\w", path.read_text())
    images = [output for output in outputs if "image/png" in output.get("data", {})]
    described = [output.metadata.get("image/png", {}).get("alt") for output in images]
    assert all(described), "a figure lacks alt text"


def test_parameters_stand_once_in_a_notebook(code):
    for name, cells in code.items():
        tags = [tag for cell in cells for tag in cell.metadata.get("tags", [])]
        assert "injected-parameters" not in tags, name


def test_code_in_notebooks_is_as_wide_as_the_site_shows(code):
    for name, cells in code.items():
        for line in (line for cell in cells for line in cell.source.splitlines()):
            assert len(line) <= parameters.WIDTH, f"{name}: {line}"


def test_notebooks_use_no_private_name_of_the_package(code):
    for name, cells in code.items():
        for node in ast.walk(ast.parse(joined(cells))):
            private = isinstance(node, ast.Attribute) and re.match(r"_[a-z]", node.attr)
            assert not private, f"{name}: {ast.unparse(node)}"
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("dlm_core"):
                assert not any(alias.name.startswith("_") for alias in node.names), name


def test_a_function_that_several_notebooks_need_is_in_the_harness(code):
    defined = defaultdict(set)
    for name, cells in code.items():
        for node in ast.walk(ast.parse(joined(cells))):
            if isinstance(node, ast.FunctionDef):
                defined[node.name].add(name)
    often = {function: names for function, names in defined.items() if len(names) > 2}
    assert not often, often


def joined(cells):
    """The code of several cells, without IPython's own syntax."""
    lines = "\n".join(cell.source for cell in cells).splitlines()
    return "\n".join(line for line in lines if not re.match(r"\s*[%!]", line))


def test_the_readme_s_table_is_the_figures_claims():
    text = (REPOSITORY / "README.md").read_text()
    table = re.search(r"<!-- results -->\n(.*?)\n<!-- /results -->", text, re.DOTALL)[1]
    assert table == reproduce.results_table(REPOSITORY / "figures")


def test_every_claim_carries_its_evidence():
    claims = json.loads((REPOSITORY / "figures" / "claims.json").read_text())
    for name, entry in claims.items():
        for claim in entry["claims"]:
            assert claim["whose"] in ("released", "abstract", "ours"), name
            assert claim["verdict"] in ("holds", "does not hold", "undecided"), name
            assert claim["statement"] and claim["evidence"], name
            assert claim["criterion"] and len(claim["interval"]) == 2, (name, claim["statement"])
            few = claim["n"] is not None and claim["n"] < 10
            assert not few or claim["verdict"] == "undecided", (name, claim["statement"])


def test_every_figure_is_in_the_manifest_with_its_provenance():
    folder = REPOSITORY / "figures"
    manifest = json.loads((folder / "manifest.json").read_text())
    files = {
        path.name for path in folder.glob("*.*") if path.suffix in (".png", ".pdf", ".csv", ".md")
    } - {"claims.md"}
    records = [*folder.glob("records/*.csv.gz")]
    assert sum(path.stat().st_size for path in records) < 4e6
    files |= {f"records/{path.name}" for path in records}
    assert files == set(manifest)
    for name, entry in manifest.items():
        assert entry["notebook"] in name and entry["profile"] in reproduce.PROFILES
        assert entry["versions"] and entry["seconds"] > 0


def test_links_in_the_readme_lead_somewhere():
    for target in re.findall(r"\]\(([^)#:]+?)\)", (REPOSITORY / "README.md").read_text()):
        assert (REPOSITORY / target).exists(), target
