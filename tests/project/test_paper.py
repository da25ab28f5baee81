"""docs/paper.md: its tables are those that the committed figures give."""

import io
import re
import subprocess
import tarfile

import pytest

from dlm_core.project import paper

FIGURES = paper.REPOSITORY / "figures"


@pytest.fixture(scope="module")
def committed(tmp_path_factory):
    """The committed tables: `make figures` puts those of a smaller profile in their place. Where
    nothing is committed, those that are there.
    """
    asked = ["git", "archive", "HEAD", "figures/*.csv"]
    found = subprocess.run(asked, cwd=paper.REPOSITORY, capture_output=True)
    if found.returncode:
        return FIGURES
    folder = tmp_path_factory.mktemp("committed")
    with tarfile.open(fileobj=io.BytesIO(found.stdout)) as tables:
        tables.extractall(folder, filter="data")
    return folder / "figures"


def test_the_page_has_what_the_committed_tables_say():
    text = paper.PAGE.read_text("utf-8")
    filled = dict(re.findall(r"<!-- (\w+) -->\n\n(.*?)\n\n<!-- /\1 -->", text, re.DOTALL))
    assert filled == {name: paper.table(FIGURES, name) for name in paper.EXPERIMENTS}


def test_filling_replaces_what_stands_between_the_markers(tmp_path):
    page = tmp_path / "paper.md"
    page.write_text("before\n<!-- dlm -->\n<!-- /dlm -->\n<!-- batch -->\nold\n<!-- /batch -->\n")
    paper.fill(FIGURES, page)
    tables = [paper.table(FIGURES, name) for name in ("dlm", "batch")]
    start, end = "before\n<!-- dlm -->\n\n", "\n\n<!-- /dlm -->\n<!-- batch -->\n\n"
    assert page.read_text("utf-8") == start + end.join(tables) + "\n\n<!-- /batch -->\n"


@pytest.mark.parametrize("experiment", paper.EXPERIMENTS)
def test_a_number_is_missing_only_where_nothing_was_run(experiment, committed):
    cells = paper.table(committed, experiment).count("| – ")
    lines = paper.EXPERIMENTS[experiment]
    assert cells == sum(each is None for line in lines for each in line[1:])


def test_another_number_in_a_table_is_another_number_on_the_page(tmp_path, committed):
    name = "06_batches.csv"
    text = (committed / name).read_text("utf-8")
    was = paper.table(committed, "batch")
    row = next(line for line in text.splitlines() if line.startswith("LeNet,as released,2"))
    values = row.split(",")
    values[4] = "0.5"
    (tmp_path / name).write_text(text.replace(row, ",".join(values)), "utf-8")
    now = paper.table(tmp_path, "batch")
    assert now != was and "| 50 % [24, 76], n = 10;" in now


def test_a_result_that_is_not_there_is_a_dash_and_an_ambiguous_one_an_error(tmp_path):
    assert "%" not in paper.table(tmp_path, "batch")
    name = "06_batches.csv"
    text = (FIGURES / name).read_text("utf-8")
    (tmp_path / name).write_text(text + text.split("\n", 1)[1], "utf-8")
    with pytest.raises(LookupError, match="2 rows have .*'LeNet'"):
        paper.table(tmp_path, "batch")
