"""The course: students' versions hold no solutions, every exercise has a test, and a test that
cannot fail is found.
"""

import re

import nbformat
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
