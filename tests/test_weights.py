"""Snapshots that are read from files: what would take more memory than the file is refused."""

import zipfile

import pytest
import torch

from dlm_core import models, weights


@pytest.fixture
def state():
    return models.build("lenet", (1, 8, 8), 10).state_dict()


def test_what_torch_save_writes_is_read(state, tmp_path):
    torch.save(state, tmp_path / "a.pt")
    torch.save(state, tmp_path / "b.pt", _use_new_zipfile_serialization=False)
    shared = {**state, "view": state["0.weight"][1:]}
    torch.save(shared, tmp_path / "c.pt")
    for name, expected in (("a", state), ("b", state), ("c", shared)):
        found = weights.load_weights(tmp_path / f"{name}.pt")
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[n], w) for n, w in expected.items())


@pytest.mark.parametrize(
    "given",
    [
        torch.zeros(1).expand(30_000, 30_000),
        torch.zeros(4).as_strided((2, 3), (1, 1)),
        torch.zeros(3, 3).to_sparse(),
        torch.empty(30_000, 30_000, device="meta"),
    ],
    ids=["expanded", "overlapping", "sparse", "meta"],
)
@pytest.mark.filterwarnings("ignore")
def test_a_tensor_of_fewer_numbers_than_it_shows_is_refused(state, tmp_path, given):
    torch.save({**state, "0.weight": given}, tmp_path / "a.pt")
    with pytest.raises(ValueError, match="holds '0.weight' as .* of which it lacks numbers"):
        weights.load_weights(tmp_path / "a.pt")


def test_a_compressed_archive_is_refused_before_it_is_unpacked(state, tmp_path):
    torch.save({**state, "0.weight": torch.zeros(5000, 5000)}, tmp_path / "a.pt")
    with (
        zipfile.ZipFile(tmp_path / "a.pt") as plain,
        zipfile.ZipFile(tmp_path / "b.pt", "w", zipfile.ZIP_DEFLATED) as small,
    ):
        for entry in plain.infolist():
            small.writestr(entry.filename, plain.read(entry))
    assert (tmp_path / "b.pt").stat().st_size < 1_000_000
    with pytest.raises(ValueError, match="is a compressed archive"):
        weights.load_weights(tmp_path / "b.pt")


@pytest.mark.parametrize("name", ["a.pt", "a.safetensors"])
def test_what_is_no_weights_is_refused_in_a_sentence(tmp_path, name):
    for content in (b"", b"no weights", b"PK\x03\x04", bytes(100)):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match="cannot be read as weights"):
            weights.load_weights(tmp_path / name)
    with pytest.raises(ValueError, match="cannot be read as weights"):
        (tmp_path / f"folder_{name}").mkdir()
        weights.load_weights(tmp_path / f"folder_{name}")
