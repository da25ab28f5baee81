"""The course: students' versions hold no solutions, every exercise has a test, and a test that
cannot fail is found.
"""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import psutil
import pytest
from nbformat.v4 import new_code_cell, new_notebook

from dlm_core.project import lessons

COURSE = lessons.paths("teaching")


def cells(path):
    return nbformat.read(path, as_version=4).cells


def kind(cell):
    """ "solution", "test" or None."""
    about = cell.metadata.get("nbgrader", {})
    return "solution" if about.get("solution") else "test" if about.get("grade") else None


@pytest.mark.parametrize("path", COURSE, ids=lambda path: path.stem)
def test_each_exercise_has_a_solution_and_then_a_test_with_a_hidden_part(path):
    kinds = [(kind(cell), cell) for cell in cells(path)]
    marked = [(which, cell) for which, cell in kinds if which]
    assert len(marked) >= 6 and [which for which, _ in marked] == ["solution", "test"] * (
        len(marked) // 2
    )
    for which, cell in marked:
        markers = "SOLUTION" if which == "solution" else "HIDDEN TESTS"
        assert f"### BEGIN {markers}" in cell.source and f"### END {markers}" in cell.source
        assert which == "solution" or cell.metadata.nbgrader.points > 0
    assert (
        sum("**Predict.**" in cell.source or "**Predict**" in cell.source for _, cell in kinds) >= 3
    )
    assert sum("interact(" in cell.source for _, cell in kinds) == 1


def test_students_get_neither_solutions_nor_hidden_tests_nor_outputs(tmp_path):
    written = lessons.release(tmp_path)
    assert [path.name for path in written] == [path.name for path in COURSE] and len(written) == 4
    for path, origin in zip(written, COURSE):
        text = path.read_text()
        assert not any(mark in text for mark in ("SOLUTION", "HIDDEN", "NBVAL"))
        released = cells(path)
        assert len(released) == len(cells(origin))
        for cell in released:
            assert not cell.get("outputs") and cell.get("execution_count") is None
            if kind(cell) == "solution":
                assert "raise NotImplementedError()" in cell.source
            if kind(cell) == "test":
                assert "assert" in cell.source and cell.metadata.editable is False


def test_students_links_lead_somewhere_and_descriptions_tell_no_answers(tmp_path):
    for path in lessons.release(tmp_path / "anywhere"):
        text = "\n".join(cell.source for cell in cells(path))
        links = re.findall(r"\]\(([^)#:]+)\)", text)
        assert links and all((path.parent / link).exists() for link in links)
        described = re.findall(r'figures\.show\(\s*figure,\s*((?:"[^"]*"\s*)+)', text)
        assert described and not any(":" in each for each in described)


def lesson(test):
    """A notebook with one exercise and its test."""
    about = {"schema_version": 3, "task": False}
    solution = new_code_cell(
        "def one():\n    ### BEGIN SOLUTION\n    return 1\n    ### END SOLUTION"
    )
    solution.metadata["nbgrader"] = {
        **about,
        "grade": False,
        "grade_id": "one",
        "locked": False,
        "solution": True,
    }
    graded = new_code_cell(test)
    graded.metadata["nbgrader"] = {
        **about,
        "grade": True,
        "grade_id": "test_one",
        "locked": True,
        "points": 1,
        "solution": False,
    }
    return new_notebook(cells=[solution, graded])


def test_the_check_finds_tests_that_cannot_pass_or_cannot_fail():
    hidden = "{}\n### BEGIN HIDDEN TESTS\n{}\n### END HIDDEN TESTS"
    assert (
        lessons.problems(lesson(hidden.format("assert callable(one)", "assert one() == 1"))) == []
    )
    assert lessons.problems(lesson("assert one() == 2")) == ["test_one fails although solved"]
    assert lessons.problems(lesson("assert callable(one)")) == [
        "test_one passes although nothing was done"
    ]
    assert lessons.problems(new_notebook(cells=[new_code_cell("1")])) == ["it has no test"]


@pytest.mark.parametrize("command", ["lessons", "assignment-check"])
def test_an_interrupt_ends_the_kernel_and_says_so_in_a_line(tmp_path, command):
    begun, path = tmp_path / "begun", tmp_path / "90_waits.ipynb"
    code = f"open({str(begun)!r}, 'w').close(); import time; time.sleep(600)"
    nbformat.write(new_notebook(cells=[new_code_cell(code)]), path)
    script = (
        "import sys; from pathlib import Path; from dlm_core.project import lessons; "
        f"from dlm_core.__main__ import main; lessons.paths = lambda *_: [Path({str(path)!r})]; "
        f"sys.exit(main([{command!r}]))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script],
        cwd=Path(__file__).parents[2],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    deadline = time.time() + 120
    while not begun.exists() and time.time() < deadline:
        time.sleep(0.1)
    kernels = psutil.Process(process.pid).children(recursive=True)
    os.killpg(process.pid, signal.SIGINT)
    said = process.communicate(timeout=60)[0]
    assert process.returncode == 130 and said.strip() == "interrupted"
    assert kernels and not psutil.wait_procs(kernels, timeout=15)[1]


def test_lessons_of_no_such_name_are_refused(capsys):
    from dlm_core.__main__ import main

    for only in ("zzz", ""):
        assert main(["lessons", "--only", only]) == 2
        said = capsys.readouterr()
        assert said.err.startswith(f"error: --only is {only!r}; it takes a part of one of these")
        assert said.out == "" and said.err.count("\n") == 1
