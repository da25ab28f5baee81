"""Two folders of results: what is the same, what is near enough, what differs and by what name."""

import json
import math
import re
import shutil
from pathlib import Path

import pytest

from dlm_core.project import compare as module
from dlm_core.project.compare import TOLERANCES, compare

FIGURES = Path(__file__).parents[2] / "figures"
TABLE = """attack,search,n,success_20,psnr_50,loss,chi2,seconds
dlm_plus,ours,10,0.9,41.7116,1e-09,1.0123,3.1
grey,,10,0,12.612,nan,,0.1
"""
CLAIM = {
    "statement": "It works",
    "whose": "paper",
    "verdict": "holds",
    "criterion": "share of at least 20 %",
    "evidence": "90% of 10 at 20 dB, median 41.7 dB; 9 of 10; loss reached 1.0e-09 in 3 s; "
    "DLM+: 90 % [60, 98]; median 41.5 dB [39.1, 43.0] (n = 10 images)",
    "n": 10,
    "units": "images, 20 networks",
    "interval": [0.6, 0.98],
    "cause": None,
}


@pytest.fixture
def folders(tmp_path):
    """Two folders with the same results of notebook 90."""
    for name in ("reference", "now"):
        write(tmp_path / name)
    return tmp_path / "reference", tmp_path / "now"


def write(folder, table=TABLE, **changed):
    folder.mkdir(exist_ok=True)
    (folder / "90_it.csv").write_text(table)
    entry = {"profile": "quick", "claims": [{**CLAIM, **changed}], "setting": "n = 10 images"}
    (folder / "claims.json").write_text(json.dumps({"90_it": entry}))


def said(folders, identical=False):
    """{where: how many tolerances} of what differs."""
    return {each.where: each.moved for each in compare(*folders, "90_it", identical=identical)}


@pytest.mark.parametrize("identical", [True, False])
def test_equal_folders_do_not_differ(folders, identical):
    assert compare(*folders, "90_it", identical=identical) == []


@pytest.mark.parametrize("path", sorted(FIGURES.glob("*.csv")), ids=lambda path: path.stem)
def test_one_number_altered_is_named(path, tmp_path):
    """In the first row of each of the committed tables."""
    notebook = next(n for n in json.loads((FIGURES / "claims.json").read_text()) if n in path.name)
    for name in ("reference", "now"):
        (tmp_path / name).mkdir()
        shutil.copy(path, tmp_path / name)
    head, first, *rest = path.read_text().splitlines()
    digit = re.search(r"\d(?=,|$)", first)
    altered = str((int(digit[0]) + 1) % 10)
    first = first[: digit.start()] + altered + first[digit.end() :]
    (tmp_path / "now" / path.name).write_text("\n".join([head, first, *rest]) + "\n")
    (found,) = compare(tmp_path / "reference", tmp_path / "now", notebook, identical=True)
    assert found.moved == math.inf and found.where.startswith(f"{path.name}, row 1 (")


def test_file_row_column_and_both_values_are_said(folders):
    write(folders[1], TABLE.replace("41.7116", "43.7116"))
    (found,) = compare(*folders, "90_it")
    assert str(found) == (
        "90_it.csv, row 1 (attack dlm_plus, search ours), psnr_50: "
        "41.7116 in the reference, 43.7116 now (tolerance 1 dB)"
    )


@pytest.mark.parametrize(
    "before, after, within",
    [
        ("41.7116", "42.7116", True),
        ("41.7116", "42.7126", False),
        ("12.612", "9.612", True),  # a search that failed
        ("12.612", "9.611", False),
        ("0.9,", "0.7,", True),  # two trials of ten
        ("0.9,", "0.69,", False),
        ("1e-09", "9.9e-09", True),
        ("1e-09", "1.1e-08", False),
        ("1e-09", "-2e-09", True),
        ("1.0123", "1.0323", True),
        ("1.0123", "1.0343", False),
        ("ours,10,", "ours,11,", False),
        ("41.7116", "inf", False),
        ("41.7116", "nan", False),
        ("41.7116", "", False),
        ("nan,", ",", True),
        ("nan,", "0,", False),
        ("ours", "published", False),
        ("3.1", "3000", True),
    ],
)
def test_each_column_has_its_tolerance(folders, before, after, within):
    write(folders[1], TABLE.replace(before, after, 1))
    assert all(moved <= 1 for moved in said(folders).values()) is within


def test_on_one_machine_there_is_none_but_for_time(folders):
    write(folders[1], TABLE.replace("41.7116", "41.7117"))
    assert list(said(folders, identical=True).values()) == [math.inf]
    write(folders[1], TABLE.replace("3.1", "9.9"), evidence=CLAIM["evidence"].replace("3 s", "4 s"))
    assert said(folders, identical=True) == {}


@pytest.mark.parametrize(
    "changed, within",
    [
        ({"verdict": "does not hold"}, False),
        ({"whose": "ours"}, False),
        ({"statement": "It works well"}, False),
        ({"cause": "bad luck"}, False),
        ({"evidence": CLAIM["evidence"].replace("41.7", "42.6")}, True),
        ({"evidence": CLAIM["evidence"].replace("41.7", "42.8")}, False),
        ({"evidence": CLAIM["evidence"].replace("90%", "70%")}, True),
        ({"evidence": CLAIM["evidence"].replace("90%", "60%")}, False),
        ({"evidence": CLAIM["evidence"].replace("9 of 10", "7 of 10")}, True),
        ({"evidence": CLAIM["evidence"].replace("9 of 10", "6 of 10")}, False),
        ({"evidence": CLAIM["evidence"].replace("9 of 10", "9 of 11")}, False),
        ({"evidence": CLAIM["evidence"].replace("1.0e-09", "4.0e-09")}, True),
        ({"evidence": CLAIM["evidence"].replace("1.0e-09", "4.0e-08")}, False),
        ({"evidence": CLAIM["evidence"].replace("reached", "found")}, False),
        ({"evidence": CLAIM["evidence"].replace("[60, 98]", "[40, 90]")}, True),
        ({"evidence": CLAIM["evidence"].replace("[60, 98]", "[60, 67]")}, False),
        ({"evidence": CLAIM["evidence"].replace("39.1, 43.0", "38.2, 43.9")}, True),
        ({"evidence": CLAIM["evidence"].replace("39.1, 43.0", "39.1, 44.1")}, False),
        ({"evidence": CLAIM["evidence"].replace("n = 10", "n = 11")}, False),
        ({"criterion": "share of at least 21 %"}, False),
        ({"units": "images, 21 networks"}, False),
        ({"n": 11}, False),
        ({"interval": [0.4, 0.9]}, True),
        ({"interval": [0.1, 0.9]}, False),
        ({"interval": ["-inf", 0.98]}, False),
        ({"interval": [0.6, None]}, False),
    ],
)
def test_claims_are_compared_field_by_field(folders, changed, within):
    write(folders[1], **changed)
    found = said(folders)
    assert all(moved <= 1 for moved in found.values()) is within
    assert all(each.startswith("claims.json, row 1 (It works), ") for each in found)


def test_what_is_missing_is_named(folders):
    write(folders[1], TABLE.replace("chi2", "chi3").replace("grey", "gray"))
    assert {"90_it.csv, column chi2", "90_it.csv, column chi3"} < set(said(folders))
    write(folders[1], "".join(TABLE.splitlines(keepends=True)[:2]), kind="new")
    found = said(folders)
    assert {"90_it.csv, number of rows", "90_it.csv, row attack grey"} < set(found)
    assert "claims.json, column kind" in found
    (folders[1] / "90_it.csv").rename(folders[1] / "90_it_more.csv")
    assert {"90_it.csv", "90_it_more.csv"} <= set(said(folders))
    (folders[1] / "claims.json").unlink()
    assert "claims.json" in said(folders)


def test_a_cell_too_many_is_named(folders):
    write(folders[1], TABLE.replace("41.7116", "41,7116"))
    assert "90_it.csv, column cells too many" in said(folders)


def test_a_claim_too_few_is_named(folders):
    entry = {"profile": "quick", "claims": [], "setting": "n = 10 images"}
    (folders[1] / "claims.json").write_text(json.dumps({"90_it": entry}))
    found = set(said(folders))
    assert {"claims.json, number of rows", "claims.json, row It works"} < found


def test_long_texts_are_shown_where_they_part(folders):
    long = "; ".join(f"E = {i}: 40.1 dB" for i in range(50))
    write(folders[0], evidence=f"{long}; 1.0 dB, and more")
    write(folders[1], evidence=f"{long}; 7.0 dB, and more")
    (found,) = compare(*folders, "90_it")
    assert "1.0 dB, and more in the reference" in str(found) and len(str(found)) < 250


def test_every_tolerance_has_a_reason_and_is_of_some_column():
    headers = [path.read_text().split("\n", 1)[0].split(",") for path in FIGURES.glob("*.csv")]
    names = {name for header in headers for name in header}
    for each in TOLERANCES:
        assert each.why and any(re.fullmatch(each.pattern, name) for name in names)
    assert module.DEFAULT.why
