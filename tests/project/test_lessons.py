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
import torch
from nbformat.v4 import new_code_cell, new_notebook

from dlm_core import data, federated, models, objectives
from dlm_core.project import lessons

COURSE = lessons.paths("teaching")


def cells(path):
    return nbformat.read(path, as_version=4).cells


def kind(cell):
    """ "solution", "test", "answer" (marked by a person) or None."""
    about = cell.metadata.get("nbgrader", {})
    if about.get("solution"):
        return "answer" if about.get("grade") else "solution"
    return "test" if about.get("grade") else None


def part(cell, of):
    """What stands between a cell's ### BEGIN and ### END of SOLUTION or HIDDEN TESTS."""
    return re.search(f"### BEGIN {of}\n(.*?)### END {of}", cell.source, re.DOTALL)[1]


@pytest.mark.parametrize("path", COURSE, ids=lambda path: path.stem)
def test_each_exercise_has_a_solution_and_then_a_test_with_a_hidden_part(path):
    kinds = [(kind(cell), cell) for cell in cells(path)]
    marked = [(which, cell) for which, cell in kinds if which in ("solution", "test")]
    assert len(marked) >= 6 and [which for which, _ in marked] == ["solution", "test"] * (
        len(marked) // 2
    )
    for which, cell in marked:
        markers = "SOLUTION" if which == "solution" else "HIDDEN TESTS"
        assert f"### BEGIN {markers}" in cell.source and f"### END {markers}" in cell.source
        assert which == "solution" or cell.metadata.nbgrader.points > 0
    assert sum("**Predict.**" in cell.source for _, cell in kinds) >= 3
    assert sum("interact(" in cell.source for _, cell in kinds) == 1
    # One exercise is long, one question is marked by a person.
    long = [len(part(c, "SOLUTION").strip().splitlines()) > 3 for w, c in marked if w == "solution"]
    said = "".join(cell.source for _, cell in kinds)
    assert any(long) and said.count("(the long one)") == 1
    [answer] = [cell for which, cell in kinds if which == "answer"]
    assert f"**Question** ({answer.metadata.nbgrader.points} points)" in said
    assert "1 point" in part(answer, "SOLUTION")


@pytest.mark.parametrize("path", COURSE, ids=lambda path: path.stem)
def test_each_prediction_has_its_cell_and_is_compared_afterwards(path):
    found = cells(path)
    asked = [place for place, cell in enumerate(found) if "**Predict.**" in cell.source]
    for place in asked:
        questions = re.findall(r'^predicted\["(.+)"\] = \.\.\.', found[place + 1].source, re.M)
        assert questions, found[place].source
        later = "".join(cell.source for cell in found[place + 2 :])
        assert all(question in later for question in questions)
    assert "predicted.table()" in found[-1].source


@pytest.mark.parametrize("path", COURSE, ids=lambda path: path.stem)
def test_the_minutes_of_the_sections_are_those_of_the_lesson_and_of_the_instructors_table(path):
    said = "\n".join(cell.source for cell in cells(path) if cell.cell_type == "markdown")
    parts = re.findall(r"^## .*\((\d+) minutes\)$", said, re.M)
    (whole,) = re.findall(r"^About (\d+) minutes", said, re.M)
    assert sum(map(int, parts)) == int(whole)
    guide = (lessons.REPOSITORY / "docs" / "instructor.md").read_text()
    (row,) = [line for line in guide.splitlines() if path.name in line and line.startswith("|")]
    assert f"| {' + '.join(parts)} |" in row
    points = sum(cell.metadata.get("nbgrader", {}).get("points", 0) for cell in cells(path))
    assert f"| {points} |" in row


@pytest.mark.parametrize("path", COURSE, ids=lambda path: path.stem)
def test_no_test_of_an_exercise_asks_for_exact_floats(path):
    for cell in cells(path):
        if kind(cell) == "test":
            assert not re.search(r"torch\.equal|[=!]= -?\d+\.\d", cell.source), cell.source


def mean_of_layers(own):
    return lambda layers, *rest: sum(own([layer], *rest) for layer in layers) / len(layers)


def rms(layers):
    entries = torch.cat([layer.flatten().double() for layer in layers])
    return float(entries.square().mean().sqrt())


A_MEAN_OVER_LAYERS = {
    "test_relative_noise": lambda delta, std: std / mean_of_layers(rms)(delta),
    "test_best_k": lambda g, delta: float(
        sum((a * b).sum() / b.square().sum() for a, b in zip(g, delta)) / len(g)
    ),
    "test_cosine": lambda g, delta: float(
        sum((a * b).sum() / a.norm() / b.norm() for a, b in zip(g, delta)) / len(g)
    ),
    "test_relative_rounding": lambda delta, g, rate: float(
        sum((d - rate * each).norm() / d.norm() for d, each in zip(delta, g)) / len(g)
    ),
    "test_dlm_plus_distance": lambda g, delta: sum(
        (a / a.norm() - b / b.norm()).square().sum() for a, b in zip(g, delta)
    ),
    "test_mean_norm": lambda layers: torch.cat([each.flatten() for each in layers]).norm() / 2,
    "test_bound": lambda jacobian, noise, prior=0.25: float(
        -10 * (1 / (jacobian.square().sum(0) / noise**2 + prior**-2)).mean().log10()
    ),
}


def noise_of(draw):
    """A ``noisy`` whose noise of standard deviation 1 is drawn by ``draw(shape, generator)``."""
    return lambda weights, std, generator: {
        name: tensor + std * draw(tensor.shape, generator) for name, tensor in weights.items()
    }


def normal(shape, generator):
    return torch.randn(shape, generator=generator)


def uniform(shape, generator):
    return 12**0.5 * (torch.rand(shape, generator=generator) - 0.5)


def laplace(shape, generator):
    one, two = (-torch.log1p(-torch.rand(shape, generator=generator)) for _ in range(2))
    return (one - two) / 2**0.5


def first_tensor_alone(weights, std, generator):
    return {**weights, "w": weights["w"] + std * normal(weights["w"].shape, generator)}


def bound_by(mean):
    """A ``bound`` that takes ``mean`` of the pixels' variances, which returns dB."""

    def bound(jacobian, noise, prior=0.25):
        known = jacobian.double().T @ jacobian.double() / noise**2
        known += torch.eye(len(known), dtype=torch.float64) / prior**2
        return float(mean(torch.linalg.inv(known).diagonal()))

    return bound


def decibels(variance):
    return -10 * variance.log10()


def without_its_prior(jacobian, noise, prior=0.25):
    return bound_by(lambda variance: decibels(variance.mean()))(jacobian, noise)


def lone_images_by(live, margin):
    """A ``lone_images`` that keeps the rows that ``live(bias)`` names, and takes pictures for equal
    that differ by less than ``margin``.
    """

    def lone_images(weight, bias):
        kept, found = live(bias), []
        pictures = weight[kept] / bias[kept, None]
        for picture in pictures:
            twins = ((pictures - picture).abs().amax(1) < margin).sum()
            known = any((picture - other).abs().max() < margin for other in found)
            if twins > 1 and not known:
                found.append(picture)
        return torch.stack(found).view(-1, 1, 8, 8) if found else torch.zeros(0, 1, 8, 8)

    return lone_images


def relative(bias):
    return bias.abs() > 1e-3 * bias.abs().max()


def subtract_first(seen):
    weights = seen.model.named_parameters()
    return [(p.detach() - seen.weights_after[name]).double() for name, p in weights]


def absolute_directions(before, after, name):
    return int((torch.linalg.svdvals(before[name].double() - after[name].double()) > 1e-4).sum())


WRONG = [
    *A_MEAN_OVER_LAYERS.items(),
    ("test_noisy", noise_of(lambda shape, _: normal(shape, torch.Generator().manual_seed(0)))),
    ("test_noisy", noise_of(lambda shape, own: normal(shape, own.manual_seed(1)))),
    ("test_noisy", noise_of(uniform)),
    ("test_noisy", noise_of(laplace)),
    ("test_noisy", first_tensor_alone),
    ("test_bound", bound_by(lambda variance: decibels(variance).mean())),
    ("test_bound", bound_by(lambda variance: decibels(variance.median()))),
    ("test_bound", without_its_prior),
    ("test_blend", lambda images, d: torch.einsum("n,nchw->chw", d.abs() / d.abs().sum(), images)),
    ("test_lone_images", lone_images_by(lambda bias: bias != 0, 1e-4)),
    ("test_lone_images", lone_images_by(relative, 0.01)),
    ("test_lone_images", lone_images_by(relative, 0.1)),
    ("test_directions", absolute_directions),
]
# What students see lets these pass; the hidden part does not.
HIDDEN_FROM = [
    ("test_update", subtract_first),
    ("test_lone_images", lone_images_by(lambda bias: bias.abs() > 1e-3, 1e-4)),
    ("test_lone_images", lone_images_by(lambda bias: bias.abs() > 1e-5, 1e-4)),
]
# Of these the notebook's own answer is all that their tests need, beside what the lesson gives; the
# distance of DLM+ is written with exercise 1's norm.
BY_ITSELF = dict.fromkeys([test for test, _ in WRONG + HIDDEN_FROM])
BY_ITSELF |= dict.fromkeys(["test_dlm_distance", "test_silencing_label"])
del BY_ITSELF["test_dlm_plus_distance"]


def graded(name):
    """The test cell of this name, and the cell before it that it tests."""
    ((solution, test),) = [
        (found[place - 1], found[place])
        for found in map(cells, COURSE)
        for place in range(len(found))
        if found[place].metadata.get("nbgrader", {}).get("grade_id") == name
    ]
    assert solution.metadata.nbgrader.grade_id == name.removeprefix("test_")
    return solution, test


def given():
    """What the lessons give to the tests: no other exercise's answer."""
    images, labels, num_classes, _ = data.load("digits", n=10)
    model = models.build("lenet", (1, 8, 8), num_classes)
    image, label = images[:1], labels[:1]
    seen = federated.train_locally(model, image, label, learning_rate=0.1)
    layers = objectives.gradient(model, federated.loss, image, label)
    return {
        "torch": torch,
        "objectives": objectives,
        "federated": federated,
        "learning_rate": 0.1,
        "images": images,
        "image": image,
        "label": label,
        "num_classes": num_classes,
        "model": model,
        "seen": seen,
        "true_gradient": [layer.detach().double() for layer in layers],
        "delta": seen.delta,
        "g": [torch.tensor([3.0, 4.0]), torch.tensor([1.0])],
        "batch": 2,
        "private": images[:2],
        "units": (),  # lesson 1 compares with these of its own batch too
        "blends": (),
    }


def seen_of(test):
    return test.source.split("### BEGIN HIDDEN TESTS")[0]


@pytest.mark.parametrize(("test", "wrong"), WRONG)
def test_what_students_see_refuses_an_answer_that_leaves_a_rule_out(test, wrong):
    with pytest.raises(AssertionError):
        exec(seen_of(graded(test)[1]), {**given(), test.removeprefix("test_"): wrong})


@pytest.mark.parametrize(("test", "wrong"), HIDDEN_FROM)
def test_a_hidden_part_refuses_what_students_tests_let_pass(test, wrong):
    cell, names = graded(test)[1], {**given(), test.removeprefix("test_"): wrong}
    exec(seen_of(cell), names)
    with pytest.raises(AssertionError):
        exec(part(cell, "HIDDEN TESTS"), names)


@pytest.mark.parametrize("test", BY_ITSELF)
def test_a_right_answer_passes_where_no_other_exercise_is_answered(test):
    names = given()
    for cell in graded(test):
        exec(cell.source, names)


def test_students_get_neither_solutions_nor_hidden_tests_nor_outputs(tmp_path):
    written = lessons.release(tmp_path)
    assert [path.name for path in written] == [path.name for path in COURSE] and len(written) == 5
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
            if kind(cell) == "answer":
                assert cell.source == "YOUR ANSWER HERE"


def test_the_course_lies_as_nbgrader_looks_for_it_with_solutions_and_hidden_tests(tmp_path):
    lessons.release(tmp_path / "a course")
    for path in COURSE:
        source = tmp_path / "a course" / "source" / path.stem / path.name
        assert "### BEGIN HIDDEN TESTS" in source.read_text()
        assert "SOLUTION" in source.read_text() and (source.parent / "glossary.md").exists()


def test_students_links_lead_somewhere_and_descriptions_tell_no_answers(tmp_path):
    for path in lessons.release(tmp_path / "anywhere"):
        text = "\n".join(cell.source for cell in cells(path))
        links = re.findall(r"\]\(([^)#:]+)\)", text)
        assert links and all((path.parent / link).exists() for link in links)
        assert "](glossary.md)" in text
        described = re.findall(r'figures\.show\(\s*figure,\s*((?:"[^"]*"\s*)+)', text)
        assert described and not any(":" in each for each in described)


def lesson(**tests):
    """A notebook with one exercise and its tests, by name."""
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
    graded = [new_code_cell(test) for test in tests.values()]
    for name, cell in zip(tests, graded):
        cell.metadata["nbgrader"] = {
            **about,
            "grade": True,
            "grade_id": name,
            "locked": True,
            "points": 1,
            "solution": False,
        }
    return new_notebook(cells=[solution, *graded])


def test_the_check_finds_tests_that_cannot_pass_or_cannot_fail():
    hidden = "{}\n### BEGIN HIDDEN TESTS\n{}\n### END HIDDEN TESTS"
    found = lessons.problems(
        lesson(
            good=hidden.format("assert one() > 0", "assert one() == 1"),
            wrong="assert one() == 2",
            idle="assert callable(one)",
            weak=hidden.format("assert one() < 2", "assert one() == 1"),
        )
    )
    assert found == [
        "wrong fails although solved",
        "idle passes although nothing was done",
        "what students see of idle passes although every answer is 0",
        "what students see of weak passes although every answer is 0",
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
