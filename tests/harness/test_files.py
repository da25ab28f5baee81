"""Snapshots as people have them: what is read, what is said of it, and what is refused."""

import copy
import json
import re
import struct
import zipfile
from collections import OrderedDict

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F

from dlm_core import data, federated, files, models
from dlm_core.harness.audit import audit


class Tied(nn.Module):
    """Two layers of one weight."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)
        self.two.weight = self.one.weight


@pytest.fixture
def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Flatten(), nn.Linear(4, 3, bias=False), nn.BatchNorm1d(3), nn.Linear(3, 2)
    )


@pytest.fixture
def state(network):
    return network.state_dict()


def moved(state):
    """What may come back."""
    return {name: w + 1 for name, w in state.items()}


def parameters(state):
    return {n: w for n, w in state.items() if "running" not in n and "num_batches" not in n}


def check(found, expected):
    assert list(found) == list(expected)
    for name, w in expected.items():
        assert torch.equal(found[name], w) and found[name].dtype == w.dtype, name


def both(state, expected, write=lambda each: each):
    """The notes on the two snapshots of a client, which must be read as what was written."""
    before, after, notes = files.snapshots(write(state), write(moved(state)), expected)
    check(before, state)
    check(after, moved(state))
    return notes


def in_torch(content, path):
    torch.save(content, path)


def in_old_torch(content, path):
    torch.save(content, path, _use_new_zipfile_serialization=False)


def in_safetensors(content, path):
    save_file(content, path)


def in_npz(content, path):
    np.savez(path, **{name: w.numpy() for name, w in content.items()})


def in_compressed_npz(content, path):
    np.savez_compressed(path, **{name: w.numpy() for name, w in content.items()})


def in_numbered_npz(content, path):
    np.savez(path, *(w.numpy() for w in content.values()))


def in_shards(content, path):
    path.mkdir()
    place = {name: f"model-{i % 2}.safetensors" for i, name in enumerate(content)}
    for file in set(place.values()):
        save_file({name: w for name, w in content.items() if place[name] == file}, path / file)
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": place}))


def in_a_folder(content, path):
    path.mkdir()
    save_file(content, path / "model.safetensors")


@pytest.mark.parametrize(
    "write, suffix",
    [
        *((in_torch, suffix) for suffix in (".pt", ".pth", ".bin", ".ckpt", "")),
        *((in_old_torch, ".pt"), (in_safetensors, ".safetensors")),
        *((in_npz, ".npz"), (in_compressed_npz, ".npz"), (in_numbered_npz, ".npz")),
        *((in_shards, ""), (in_a_folder, "")),
    ],
)
def test_files_of_every_format_come_back_as_they_were(tmp_path, state, write, suffix):
    paths = [tmp_path / f"{name}{suffix}" for name in ("before", "after")]
    for path, content in zip(paths, (state, moved(state))):
        write(content, path)
    for named in (paths, map(str, paths)):
        before, after, notes = files.snapshots(*named, state)
        check(before, state)
        check(after, moved(state))
        assert bool(notes) == (write is in_numbered_npz)
    if write is in_shards:
        index = [path / "model.safetensors.index.json" for path in paths]
        check(files.snapshots(*index, state)[1], moved(state))


def test_more_than_ten_arrays_are_taken_in_the_order_of_their_numbers(tmp_path):
    network = nn.Sequential(*(nn.Linear(1, 1) for _ in range(8)))
    state = {n: torch.full_like(w, i) for i, (n, w) in enumerate(network.state_dict().items())}
    in_numbered_npz(state, tmp_path / "a.npz")
    check(files.snapshots(tmp_path / "a.npz", state, state)[0], state)


@pytest.mark.parametrize(
    "kinds",
    [
        list,
        tuple,
        lambda each: [w.numpy() for w in each],
        lambda each: [w.numpy()[()] for w in each],
    ],
)
def test_lists_of_arrays_are_in_the_state_dict_s_order(state, kinds):
    notes = both(state, state, lambda each: kinds(each.values()))
    assert notes == ["arrays without names go to '1.weight' and so on, in the state dict's order"]


def test_lists_may_lack_counts_or_all_buffers_or_shared_weights(state):
    uncounted = {name: w for name, w in state.items() if "num_batches" not in name}
    for sent, lacks in ((uncounted, "1 running statistic was"), (parameters(state), "3 running")):
        before, after, notes = files.snapshots(
            list(sent.values()), list(moved(sent).values()), state
        )
        check(before, state)
        check(after, {**state, **moved(sent)})
        assert lacks in notes[1] and len(notes) == 2
    tied = Tied().state_dict()
    sent = [w for name, w in tied.items() if name != "two.weight"]
    check(files.snapshots(sent, sent, tied)[0], tied)


def test_arrays_that_do_not_fit_are_named(state):
    sent = list(state.values())
    lists = ((sent[:4], sent, "before", 4), (sent, [*sent, sent[0]], "after", 9))
    for before, after, which, n in lists:
        sentence = f"{which} is a list of {n} arrays; .*state dict has 8 .7 or 5 where some"
        with pytest.raises(files.Unfit, match=sentence):
            files.snapshots(before, after, state)
    with pytest.raises(files.Unfit, match=r"after\['1.weight'\] has shape \[2, 3\]; .* \[3, 4\]"):
        files.snapshots(sent, [sent[6], *sent[1:6], sent[0], sent[7]], state)


@given(
    st.lists(st.sampled_from(["module", "_orig_mod", "_module", "model", "net", "0"]), max_size=3),
    st.lists(st.sampled_from(["module", "_orig_mod", "_module", "model"]), max_size=2),
    st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_prefixes_are_dropped_and_said(given, own, whole):
    plain = models.build("mlp", (1, 2, 2), 3, hidden=2).state_dict()
    prefix, before_own = ("".join(f"{part}." for part in parts) for parts in (given, own))
    expected = {before_own + name: w for name, w in plain.items()}
    sent = {prefix + name: w for name, w in plain.items()}
    before, after, notes = files.snapshots(sent, expected, expected)
    check(before, expected)
    check(after, expected)
    assert bool(notes) == (prefix != before_own)
    assert all(note.startswith("before: ") and "prefix" in note for note in notes)


def test_the_two_snapshots_may_have_prefixes_of_their_own(state):
    sent = [{prefix + name: w for name, w in state.items()} for prefix in ("module.", "model.")]
    assert files.snapshots(*sent, state)[2] == [
        "before: the prefix 'module.' was dropped from 8 names",
        "after: the prefix 'model.' was dropped from 8 names",
    ]
    assert files.snapshots(sent[0], sent[0], state)[2] == [
        "the prefix 'module.' was dropped from 8 names"
    ]


@pytest.mark.parametrize(
    "nest, place",
    [
        (
            lambda w: {"epoch": 3, "state_dict": w, "optimizer": {"lr": 0.1, "state": {}}},
            "state_dict",
        ),
        (lambda w: {"model": {"weights": w}, "loss": torch.ones(())}, "model/weights"),
        (lambda w: {"a": {"b": {"c": w}}, "optimizer": {"exp_avg": {"x": torch.ones(2)}}}, "a/b/c"),
        (lambda w: {"net": {f"module.{n}": each for n, each in w.items()}, "lr": 0.1}, "net"),
        (lambda w: {"parameters": list(w.values()), "num_examples": 5}, "parameters"),
        (lambda w: {"state_dict": OrderedDict(w), "ema": {"decay": torch.ones(1)}}, "state_dict"),
        (lambda w: {"best": w, "last": w}, "best"),  # one and the same
    ],
)
def test_the_state_dict_of_a_checkpoint_is_found_and_named(tmp_path, state, nest, place):
    def write(content):
        path = tmp_path / f"{len(list(tmp_path.iterdir()))}.pt"
        torch.save(nest(content), path)
        return path

    assert both(state, state, write)[0] == f"the entry {place!r} was taken"
    assert both(state, state, nest)[0] == f"the entry {place!r} was taken"


def test_checkpoints_of_several_or_no_fitting_entries_are_refused(tmp_path, state):
    several = {"model": state, "ema": moved(state), "epoch": 3}
    with pytest.raises(ValueError, match="before has .* in several entries, 'model', 'ema'; give"):
        files.snapshots(several, state, state)
    # By its shapes one of them alone is the network's.
    several["ema"] = {name: torch.ones(7) for name in state}
    assert files.snapshots(several, state, state)[2] == ["before: the entry 'model' was taken"]
    torch.save({"model": {"w": torch.ones(1)}, "epoch": 3}, tmp_path / "other.pt")
    sentence = (
        "snapshot .*other.pt' is a dict of 'model', 'epoch', no state dict of the network; "
        "of its entry 'model': after does not fit the model: it lacks '1.weight'"
    )
    with pytest.raises(files.Unfit, match=sentence):
        files.snapshots(state, tmp_path / "other.pt", state)
    deep = {"a": {"b": {"c": {"d": state}}}}
    deep["self"] = deep
    with pytest.raises(ValueError, match="before is a dict of 'a', 'self', no state dict of tens"):
        files.snapshots(deep, state, state)


def test_tied_weights_may_be_sent_once(tmp_path):
    network = Tied()
    for expected in (network.state_dict(), network.state_dict(keep_vars=True)):
        state = {name: w.detach() for name, w in expected.items()}
        for sent, absent in (("one.weight", "two.weight"), ("two.weight", "one.weight")):
            once = {name: w.clone() for name, w in state.items() if name != absent}
            save_file(once, tmp_path / "a.safetensors")
            before, after, notes = files.snapshots(tmp_path / "a.safetensors", state, expected)
            check(before, state)
            assert notes == [f"before: {absent!r} not sent; {sent!r} is the same tensor"]
        with pytest.raises(files.Unfit, match="lacks 'one.weight', 'two.weight'"):
            files.snapshots({"one.bias": torch.ones(4), "two.bias": torch.ones(4)}, state, expected)
        two = {**state, "two.weight": torch.ones(4, 4)}
        with pytest.raises(ValueError, match="before has different numbers in 'two.weight' and"):
            files.snapshots(two, state, expected)
    with torch.device("meta"):
        expected = Tied().state_dict(keep_vars=True)
    once = {name: w for name, w in state.items() if name != "two.weight"}
    check(files.snapshots(once, once, expected)[0], state)


def test_buffers_that_were_not_sent_are_the_network_s(network, state):
    network[2].running_mean += 5
    sent = parameters(state)
    before, after, notes = files.snapshots(sent, moved(sent), state)
    check(before, state)
    check(after, {**state, **moved(sent)})
    assert notes == [
        "3 running statistics were not sent ('2.running_mean', '2.running_var' and 1 more); "
        "those that the network had before stand in"
    ]
    assert before["2.running_mean"] is not network[2].running_mean
    # What W_t had itself comes first.
    own = {**state, "2.running_mean": torch.full((3,), 7.0)}
    check(files.snapshots(own, sent, state)[1], own)
    with pytest.raises(files.Unfit, match="after does not fit the model: it lacks '3.bias'"):
        files.snapshots(state, {n: w for n, w in sent.items() if n != "3.bias"}, state)
    with pytest.raises(files.Unfit, match="after does not fit the model: it has 'more'"):
        files.snapshots(state, {**state, "more": torch.ones(1)}, state)


def test_buffers_of_a_network_on_the_meta_device_are_a_new_batch_norm_s():
    network = nn.BatchNorm1d(3)
    with torch.device("meta"):
        expected = nn.BatchNorm1d(3).state_dict()
    sent = parameters(network.state_dict())
    check(files.snapshots(sent, sent, expected)[0], network.state_dict())


def test_buffers_of_one_s_own_are_known_where_parameters_are_marked():
    network = nn.Linear(2, 2)
    network.register_buffer("mask", torch.ones(2, dtype=torch.bool))
    sent = {name: w for name, w in network.state_dict().items() if name != "mask"}
    before, _, notes = files.snapshots(sent, sent, network.state_dict(keep_vars=True))
    assert before["mask"].dtype == torch.bool and "1 buffer was not sent ('mask')" in notes[0]
    with pytest.raises(files.Unfit, match="lacks 'mask'"):
        files.snapshots(sent, sent, network.state_dict())


@pytest.mark.parametrize(
    "count, is_number",
    [
        *((torch.tensor(3), True), (torch.tensor([3]), True), (torch.tensor([[3.0]]), True)),
        *((np.int64(3), True), (np.array(3, dtype=">i4"), True), (np.array([3.0]), True)),
        *((torch.tensor([]), False), (torch.zeros(5), False)),
    ],
)
def test_counts_of_batches_may_have_any_shape(state, count, is_number):
    name = "2.num_batches_tracked"
    before, after, notes = files.snapshots({**state, name: count}, state, state)
    assert torch.equal(before[name], torch.tensor(3 if is_number else 0))
    assert bool(notes) == (not is_number)
    plain = {n: w for n, w in state.items() if n != name}
    before, after, notes = files.snapshots({**plain, f"9.{name[2:]}": count}, plain, plain)
    check(before, plain)
    assert notes == ["before: '9.num_batches_tracked' left out, which the network has not"]


@pytest.mark.parametrize("dtype", files.PRECISIONS)
def test_floating_weights_keep_their_precision(tmp_path, state, dtype):
    held = {name: w.to(dtype) if w.is_floating_point() else w for name, w in state.items()}
    in_torch(held, tmp_path / "a.pt")
    in_safetensors(held, tmp_path / "a.safetensors")
    for path in ("a.pt", "a.safetensors"):
        before, _, notes = files.snapshots(tmp_path / path, state, state)
        check(before, held)
        assert notes == []
    mixed = {**state, "3.bias": state["3.bias"].to(dtype)}
    before, _, notes = files.snapshots(mixed, state, state)
    check(before, mixed)
    assert ("mixed precision" in str(notes)) == (dtype != torch.float32)


@pytest.mark.parametrize(
    "weight, why",
    [
        (torch.ones(3, 4, dtype=torch.int8), "torch.int8; a snapshot's weights are floating"),
        (torch.ones(3, 4) > 0, "torch.bool; a snapshot's weights are floating"),
        (torch.ones(3, 4).to(torch.float8_e4m3fn), "float8_e4m3fn; a snapshot's weights are"),
        (torch.ones(3, 4, dtype=torch.complex64), "complex64; a snapshot's weights are floating"),
        (torch.ones(3, 4).to_sparse(), "of which it lacks numbers"),
        (torch.ones(1).expand(3, 4), "of which it lacks numbers"),
        (torch.ones(3, 4, device="meta"), "of which it lacks numbers"),
        (np.ones((3, 4), dtype=np.longdouble), "of which torch has no tensor"),
        (np.full((3, 4), "a"), "of which torch has no tensor"),
        (np.full((3, 4), None), "of which torch has no tensor"),
        (np.broadcast_to(np.float32(1), (10**6, 10**6)), "has shape [1000000, 1000000]"),
        (torch.ones(1).expand(10**6, 10**6), "has shape [1000000, 1000000]"),
    ],
)
@pytest.mark.filterwarnings("ignore:Sparse")
def test_what_is_no_weight_is_refused(state, weight, why):
    with pytest.raises(ValueError, match=re.escape("'1.weight'") + ".*" + re.escape(why)):
        files.snapshots(state, {**state, "1.weight": weight}, state)


def test_arrays_are_taken_whatever_their_layout(state):
    w = state["1.weight"].numpy()
    frozen = w.copy()
    frozen.flags.writeable = False
    for each in (frozen, w.astype(">f4"), np.asfortranarray(w), w[::-1].copy()[::-1]):
        before, after, _ = files.snapshots({**state, "1.weight": each}, state, state)
        check(before, state)
        before["1.weight"] += 1  # of its own
        assert np.array_equal(each, w)


class Evil:
    def __reduce__(self):
        return (exec, ("raise SystemExit('the pickle ran')",))


@pytest.mark.parametrize("suffix", [".pt", ".npz", ".safetensors", ".safetensors.index.json"])
@pytest.mark.parametrize(
    "write",
    [
        lambda path: torch.save({"w": Evil()}, path),
        lambda path: torch.save(nn.Linear(2, 2), path),
        lambda path: torch.save({"w": Evil()}, path, _use_new_zipfile_serialization=False),
        lambda path: np.savez(path.open("wb"), np.array([Evil()], dtype=object)),
        lambda path: np.save(path.open("wb"), np.array([Evil()], dtype=object)),
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(b"no weights"),
        lambda path: path.write_bytes(b"PK\x03\x04"),
        lambda path: path.write_bytes(b"PK\x05\x06" + bytes(18)),
        lambda path: path.write_bytes(bytes(100)),
        lambda path: path.write_bytes(b"[" * 100_000),
        lambda path: path.write_bytes(b"{}"),
        lambda path: path.mkdir(),
        lambda path: None,
    ],
    ids=[
        *("evil", "model", "old evil", "objects", "one array", "empty", "text", "zip", "no entry"),
        *("zeros", "deep", "no index", "folder", "absent"),
    ],
)
@pytest.mark.filterwarnings(
    "ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"
)
def test_what_is_no_file_of_weights_is_never_run_and_refused_in_a_sentence(
    tmp_path, state, write, suffix
):
    write(path := tmp_path / f"a{suffix}")
    with pytest.raises(ValueError) as refused:
        files.snapshots(state, path, state)
    said = str(refused.value)
    assert repr(str(path)) in said or "after does not fit" in said
    assert "\n" not in said and len(said) < 500
    if "absent" in (tmp_path / "a").name or not path.exists():
        assert said.endswith("does not exist")


def test_a_whole_model_is_refused_with_what_to_do(tmp_path, state):
    torch.save(nn.Linear(2, 2), tmp_path / "model.pt")
    sentence = (
        "cannot be read as weights .*torch.save.model.state_dict.., path.* writes it.*"
        "such as a whole model, is never run"
    )
    with pytest.raises(ValueError, match=sentence):
        files.snapshots(tmp_path / "model.pt", state, state)


def test_archives_that_grow_are_refused_before_they_are_unpacked(tmp_path, state, monkeypatch):
    large = {name: np.zeros(10**6) for name in state}
    np.savez_compressed(tmp_path / "large.npz", **large)
    torch.save({**state, "1.weight": torch.zeros(1000, 1000)}, tmp_path / "plain.pt")
    with (
        zipfile.ZipFile(tmp_path / "plain.pt") as plain,
        zipfile.ZipFile(tmp_path / "small.pt", "w", zipfile.ZIP_DEFLATED) as small,
        zipfile.ZipFile(tmp_path / "small.npz", "w", zipfile.ZIP_LZMA) as other,
    ):
        for entry in plain.infolist():
            small.writestr(entry.filename, plain.read(entry))
            other.writestr(entry.filename, plain.read(entry))
    for load in (np, torch):
        monkeypatch.setattr(load, "load", lambda *given, **named: pytest.fail("it was unpacked"))
    for name, why in (
        ("large.npz", "unpacks to 64,00.* bytes, more than 20 times the network's"),
        ("small.npz", "unpacks to"),
        ("small.pt", "is a compressed archive"),
    ):
        with pytest.raises(ValueError, match=why):
            files.snapshots(tmp_path / name, state, state)


def test_an_archive_whose_entries_are_one_another_is_refused(tmp_path, state):
    """Of a zip bomb of overlapping entries each is small, and stored."""
    in_npz({"a": torch.zeros(1000)}, tmp_path / "a.npz")
    content = (tmp_path / "a.npz").read_bytes()
    start, end = content.index(b"PK\x01\x02"), content.index(b"PK\x05\x06")
    directory, tail = content[start:end] * 50, content[end:]
    sizes = struct.pack("<HHI", 50, 50, len(directory))
    (tmp_path / "b.npz").write_bytes(content[:start] + directory + tail[:8] + sizes + tail[16:])
    (tmp_path / "b.pt").write_bytes((tmp_path / "b.npz").read_bytes())
    for name in ("b.npz", "b.pt"):
        with pytest.raises(ValueError, match="unpacks to"):
            files.snapshots(tmp_path / name, state, state)


@pytest.mark.parametrize(
    "index, why",
    [
        ({}, "is no index of shards"),
        ([], "is no index of shards"),
        ({"weight_map": ["a"]}, "is no index of shards"),
        ({"weight_map": {"w": 3}}, "is no index of shards"),
        *(
            ({"weight_map": {"w": name}}, "is no index of shards")
            for name in ("../b.safetensors", "/etc/passwd", "..", "", "below/a.safetensors")
        ),
        ({"weight_map": {"w": "absent.safetensors"}}, "absent.safetensors' does not exist"),
        ({"weight_map": {"v": "a.safetensors"}}, "has 'v' in 'a.safetensors', which lacks it"),
    ],
)
def test_an_index_that_leads_nowhere_is_refused(tmp_path, state, index, why):
    save_file({"w": torch.ones(1)}, tmp_path / "a.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=why):
        files.snapshots(tmp_path, state, state)


@pytest.mark.parametrize(
    "content", [None, 3, "absent", [], [1, 2], {"w": 3}, {0: torch.ones(1)}, {"w": [1.0]}, [[]]]
)
def test_what_holds_no_arrays_is_refused(tmp_path, state, content):
    with pytest.raises(ValueError, match="no state dict of tensors|before is|does not exist"):
        files.snapshots(content, state, state)
    torch.save(content, tmp_path / "a.pt")
    with pytest.raises(ValueError, match="a.pt' is a .*, no state dict of tensors; it takes"):
        files.snapshots(tmp_path / "a.pt", state, state)


def test_the_number_of_classes_may_be_read_off_the_snapshots():
    state = models.build("mlp", (1, 2, 2), 7, hidden=2).state_dict()

    def expected(known):
        classes = known["3.bias"].shape[0] if known else 100
        return models.build("mlp", (1, 2, 2), classes, hidden=2).state_dict()

    sent = {"model": {f"module.{name}": w.numpy() for name, w in state.items()}}
    check(files.snapshots(sent, list(state.values()), expected)[1], state)
    other = models.build("mlp", (1, 2, 2), 9, hidden=2).state_dict()
    with pytest.raises(files.Unfit, match=r"after\['3.weight'\] has shape \[9, 2\]; .*\[7, 2\]"):
        files.snapshots(sent, other, expected)


# --- what the audit says of them


@pytest.fixture(scope="module")
def client():
    """(network, state dict before, after one step of SGD)."""
    images, labels, *_ = data.load("digits", n=1)
    model = models.build("mlp", (1, 8, 8), 10, seed=1, init="default")
    before = {name: w.clone() for name, w in model.state_dict().items()}
    F.cross_entropy(model(images), labels).backward()
    with torch.no_grad():
        for w in model.parameters():
            w -= 0.1 * w.grad
    after = {name: w.clone() for name, w in model.state_dict().items()}
    model.load_state_dict(before)
    return model, before, after


@pytest.mark.parametrize(
    "write, said",
    [
        (
            lambda w, path: {f"module.{name}": each for name, each in w.items()},
            ["the prefix 'module.' was dropped from 4 names"],
        ),
        (
            lambda w, path: (
                in_torch({"epoch": 3, "state_dict": {f"model.{n}": x for n, x in w.items()}}, path)
                or path
            ),
            ["the entry 'state_dict' was taken", "the prefix 'model.' was dropped from 4 names"],
        ),
        (
            lambda w, path: (
                in_numbered_npz(w, path.with_suffix(".npz")) or path.with_suffix(".npz")
            ),
            ["arrays without names go to '1.weight' and so on, in the state dict's order"],
        ),
        (lambda w, path: [each.numpy() for each in w.values()], ["arrays without names go to"]),
        (lambda w, path: {name: each.double() for name, each in w.items()}, []),
    ],
    ids=["prefixed", "checkpoint", "array list in a file", "array list", "double"],
)
@pytest.mark.parametrize("named", [True, False])
def test_an_audit_takes_them_and_says_what_it_did(client, tmp_path, capsys, write, said, named):
    model, *states = client
    model = "mlp" if named else model
    given = [write(each, tmp_path / f"{n}.pt") for n, each in enumerate(states)]
    out = tmp_path / "found.png"
    audit(*given, model=model, image_shape=(1, 8, 8), attack="exact", out=out)
    lines = capsys.readouterr().out.splitlines()
    assert all(line.startswith(start) for line, start in zip(lines, said))
    assert any(line.startswith("the update looks like one step of sgd") for line in lines)
    assert "it explains the update: what it shows has leaked" in lines
    assert lines[-1].startswith("verdict: leaked; ")


def test_an_audit_of_running_statistics_that_were_not_sent(tmp_path, capsys):
    torch.manual_seed(0)
    images, labels, *_ = data.load("digits", n=2)
    model = nn.Sequential(
        nn.Flatten(), nn.Linear(64, 16), nn.BatchNorm1d(16), nn.Sigmoid(), nn.Linear(16, 10)
    )
    before = {name: w.clone() for name, w in model.state_dict().items()}
    F.cross_entropy(model(images), labels).backward()
    after = {name: w.detach() - 0.1 * w.grad for name, w in model.named_parameters()}
    about = {"image_shape": (1, 8, 8), "num_images": 2, "out": tmp_path / "found.png"}
    results = audit(parameters(before), after, model=model, attack="dlm_plus", **about)
    assert "3 running statistics were not sent" in capsys.readouterr().out
    assert list(results) == ["dlm_plus"]


def test_an_audit_computes_in_one_precision(client, tmp_path, capsys):
    model, before, after = client
    about = {"image_shape": (1, 8, 8), "attack": "exact", "out": tmp_path / "found.png"}
    mixed = {**before, "3.bias": before["3.bias"].half()}
    audit(mixed, after, model=model, **about)
    assert "before: the weights are of mixed precision: float16, float32" in capsys.readouterr().out
    half = models.build("mlp", (1, 8, 8), 10).half()
    audit(before, after, model=half, **about)
    assert "has leaked" in capsys.readouterr().out
    assert all(w.dtype == torch.float16 for w in half.parameters())
    images, labels, *_ = data.load("digits", n=1)
    double = copy.deepcopy(model).double()
    seen = federated.train_locally(double, images.double(), labels, learning_rate=0.1)
    audit(double.state_dict(), seen.weights_after, model="mlp", **about)
    assert "has leaked" in capsys.readouterr().out
