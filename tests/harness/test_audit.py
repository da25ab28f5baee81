"""Does this client leak? What the audit says of clients of several kinds, and what it refuses."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from dlm_core import data, federated, metrics, models, records
from dlm_core.__main__ import main
from dlm_core.harness.audit import audit, tried


@pytest.fixture(scope="module")
def clients_files(tmp_path_factory):
    """Files of a LeNet's weights before, and after a round by clients of several kinds."""
    folder = tmp_path_factory.mktemp("snapshots")
    images, labels, *_ = data.load("digits", n=2)
    model = models.build("lenet", (1, 8, 8), 10, seed=0)
    torch.save(model.state_dict(), folder / "before.pt")
    kinds = {
        "sgd": {},
        "adam": {"learning_rate": 1e-3, "client_optimizer": "adam"},
        "three": {"local_steps": 3},
        "two": {},
    }
    for name, how in kinds.items():
        n = 2 if name == "two" else 1
        seen = federated.train_locally(
            model, images[:n], labels[:n], **{"learning_rate": 0.05, **how}
        )
        torch.save(seen.weights_after, folder / f"{name}.pt")
    return folder


@pytest.fixture
def ask(clients_files, tmp_path, capsys):
    """The attack command on two of these files; returns what it prints."""

    def attack(after, *options, before="before"):
        files = [str(clients_files / f"{name}.pt") for name in (before, after)]
        where = ["--image-shape", "1,8,8", "--out", str(tmp_path / "found.png")]
        where += ["--minutes", "60"]  # of a busy machine
        assert main(["attack", *files, *where, *options]) in (1, 2, 3)  # a verdict
        return capsys.readouterr().out

    return attack


def test_one_attack_by_name_and_the_hint_where_it_fails(ask):
    exactly = ask("sgd", "--attack", "exact")
    assert "learning rate 0.05" in exactly and "    determined: one SGD step" in exactly
    assert "it explains the update: what it shows has leaked" in ask("sgd", "--attack", "dlm_plus")
    failed = ask("adam", "--attack", "dlm_plus")
    assert (
        "explains little" in failed
        and "a proof that none leaks" in failed
        and "--attack interval_dlm" in failed
    )


@pytest.mark.parametrize(
    "after, options, looks, tried, shown",
    [
        (
            "three",
            [],
            "sgd or its kin: several steps",
            ["division", "exact", "weighted", "dlm_plus", "unrolled_dlm"],
            "unrolled_dlm",
        ),
        ("two", ["--images", "2"], "several images", ["exact_batch", "dlm_plus"], "dlm_plus"),
    ],
)
def test_attacks_are_tried_until_one_explains_the_update(ask, after, options, looks, tried, shown):
    said = ask(after, *options)
    assert looks in said and f"shows what {shown} found\nit explains the update" in said
    assert [line.split(" (")[0] for line in said.splitlines() if line.endswith(") ...")] == tried
    assert ("does not apply: layer '0' is a Conv2d" in said) == ("exact_batch" in tried)


def test_adam_s_step_is_recognised_and_met_with_its_own_attack(tmp_path, capsys):
    """One image and two of a class are found as well, in the latter case their mean: the update
    does not tell which, so that no image is called leaked."""
    images, labels, *_ = data.load("fashion_mnist", source="bundled")
    model = models.build("lenet", (1, 28, 28), 10, seed=0)
    for chosen, error in ([0], 20), ([6, 10], 15):
        seen = federated.train_locally(
            model, images[chosen], labels[chosen], learning_rate=1e-3, client_optimizer="adam"
        )
        out = tmp_path / "found.png"
        asked = {"image_shape": (1, 28, 28), "attack": "interval_dlm", "out": out}
        found = audit(model.state_dict(), seen.weights_after, **asked)
        looks = "looks like one step of adam on one image, or on several of one class"
        assert looks in capsys.readouterr().out
        assert found.verdict == "partly" and "signs" in found.beliefs["interval_dlm"].doubt
        mean = images[chosen].mean(0, keepdim=True)
        assert metrics.psnr(found["interval_dlm"].images, mean, data_range=1.0) > error


def test_where_no_attack_applies_it_is_said(capsys, tmp_path):
    images, *_ = data.load("digits", n=2)
    layers = nn.Conv2d(1, 4, 3), nn.Sigmoid(), nn.Flatten(), nn.Linear(144, 1)
    model = nn.Sequential(*layers)  # of one output, which searches by softmax do not suit
    before = {name: w.clone() for name, w in model.state_dict().items()}
    run = torch.optim.SGD(model.parameters(), lr=0.05)
    nn.functional.binary_cross_entropy_with_logits(model(images), torch.ones(2, 1)).backward()
    run.step()
    sent = before, model.state_dict()
    about = {"model": model, "image_shape": (1, 8, 8), "num_images": 2}
    assert audit(*sent, **about, out=tmp_path / "found.png") == {}
    said = capsys.readouterr().out
    tried = [line for line in said.splitlines() if line.endswith(") ...")]
    assert said.count("does not apply: ") == len(tried) >= 1
    assert "no attack came to a result, which is no proof" in said


def test_images_that_explain_the_update_but_differ_from_start_to_start_are_no_leak(
    clients_files, tmp_path, capsys, monkeypatch
):
    attack = records.ATTACKS["dlm_plus"]

    def fits_anything(seen, *, num_images=1, seed=0, **options):
        images = torch.rand(1, 1, 8, 8, generator=torch.Generator().manual_seed(seed))
        found = attack(seen, max_evaluations=1)
        return replace(found, images=images, evidence=replace(found.evidence, loss=1e-9))

    files = [clients_files / "before.pt", clients_files / "sgd.pt"]
    about = {"image_shape": (1, 8, 8), "attack": "dlm_plus", "out": tmp_path / "found.png"}
    for name, leaks in (("dlm_plus", True), ("fits anything", False)):
        if not leaks:
            monkeypatch.setitem(
                records.ATTACKS, "dlm_plus", replace(attack, function=fits_anything)
            )
        audit(*files, **about)
        said = capsys.readouterr().out
        assert ("what it shows has leaked" in said) == leaks, name
        assert f"ends at {'the same' if leaks else 'another'} picture" in said


def test_weights_that_are_no_state_dict_are_refused(tmp_path):
    nested = {"epoch": 3, "model": {"w": torch.zeros(1)}}
    with pytest.raises(ValueError, match="before is a dict of 'epoch', 'model', no state dict"):
        audit(nested, nested, out=tmp_path / "found.png")
    with pytest.raises(ValueError, match="before is 'a.pt'; it takes a state dict .*load_weights"):
        federated.observe(models.build("lenet"), "a.pt", "b.pt", (3, 32, 32))


def test_files_that_have_changed_places_are_noticed(ask):
    question = "have the two files changed places?"
    swapped = ask("before", "--attack", "dlm_plus", before="sgd")
    assert question in swapped and "look as if they had changed places" in swapped
    assert "what follows is wrong then" in swapped
    assert question not in ask("sgd", "--attack", "dlm_plus")


def test_an_audit_of_a_network_of_one_s_own(tmp_path, capsys):
    class Own(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.hidden, self.head = torch.nn.Linear(64, 32), torch.nn.Linear(32, 10)

        def forward(self, x):
            return self.head(self.hidden(x.flatten(1)).sigmoid())

    torch.manual_seed(0)
    images, labels, *_ = data.load("digits", n=1)
    seen = federated.train_locally(model := Own(), images, labels, learning_rate=0.1)
    files = {"before": seen.model.state_dict(), "after": seen.weights_after}
    results = audit(**files, model=model, image_shape=(1, 8, 8), out=tmp_path / "found.png")
    assert list(results) == ["division"] and results.verdict == "leaked"
    assert "the input of layer 'hidden' (the image, 64 numbers)" in capsys.readouterr().out
    assert metrics.psnr(results["division"].images, images, data_range=1.0) > 90
    files_out = tmp_path / "found.png"
    searched = audit(**files, model=model, image_shape=(1, 8, 8), attack="dlm_plus", out=files_out)
    assert metrics.psnr(searched["dlm_plus"].images, images, data_range=1.0) > 30


@pytest.mark.parametrize(
    "options, message",
    [
        (["--image-shape", "1x8x8"], "--image-shape is '1x8x8'; it takes C,H,W"),
        (["--out", "nowhere/found.png"], "out is 'nowhere/found.png'; its folder does not exist"),
        (["--images", "0"], "num_images is 0"),
        (
            ["--client", "adan"],
            "client 'adan' is unknown: choose from sgd, adam, adamw, rmsprop; did you mean adam",
        ),
    ],
)
def test_attack_refuses_before_it_works(capsys, options, message):
    assert main(["attack", "before.pt", "after.pt", *options]) == 64
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "options, message",
    [
        (["--images", "1.5"], "--num-images/--images is '1.5'; it takes a whole number"),
        (["--minutes", "few"], "--minutes is 'few'; it takes a number"),
    ],
)
def test_what_is_no_number_is_named_with_what_is_allowed(capsys, options, message):
    with pytest.raises(SystemExit) as ended:
        main(["attack", "before.pt", "after.pt", *options])
    assert ended.value.code == 64 and message in capsys.readouterr().err


@pytest.mark.parametrize(
    "dtype, held", [(torch.float16, torch.float16), (torch.bfloat16, torch.float32)]
)
def test_attack_sees_that_weights_are_of_half_precision(tmp_path, capsys, dtype, held):
    images, labels, *_ = data.load("digits", n=1)
    model = models.build("lenet", (1, 8, 8), 10, seed=0)
    after = federated.train_locally(
        model, images, labels, learning_rate=1.0, transmitted=dtype
    ).weights_after
    rounded = {name: tensor.to(dtype).to(held) for name, tensor in model.state_dict().items()}
    torch.save(rounded, tmp_path / "before.pt")
    torch.save({name: tensor.to(held) for name, tensor in after.items()}, tmp_path / "after.pt")
    where = ["--image-shape", "1,8,8", "--out", str(tmp_path / "found.png"), "--attack", "exact"]
    files = [str(tmp_path / f"{name}.pt") for name in ("before", "after")]
    assert main(["attack", *files, *where]) in (1, 2)  # rounded so, several images may look alike
    said = capsys.readouterr().out
    assert f"rounded to {dtype}" in said and "not to be trusted" not in said


def test_a_user_s_attack_joins_those_that_are_tried(clients_files, tmp_path, capsys, own_attack):
    grey = records.ATTACKS["grey"].function
    own_attack(lambda seen, *, num_images=1, seed=0: grey(seen, num_images=num_images))
    assert list(tried())[:2] == ["division", "mine"]
    files = [clients_files / "before.pt", clients_files / "sgd.pt"]
    audit(*files, image_shape=(1, 8, 8), attack="mine", out=tmp_path / "found.png")
    assert "mine (any client) ..." in capsys.readouterr().out


def test_the_update_is_computed_once(clients_files, tmp_path, monkeypatch):
    from dlm_core.observation import Observation

    compute, count = Observation.delta.func, []
    monkeypatch.setattr(Observation.delta, "func", lambda seen: count.append(1) or compute(seen))
    files = [clients_files / "before.pt", clients_files / "sgd.pt"]
    audit(*files, image_shape=(1, 8, 8), out=tmp_path / "found.png")
    assert len(count) == 1


@pytest.fixture
def own_attack():
    """Registers an attack of one's own that is tried first, and forgets it."""
    before = dict(records.ATTACKS)

    def register(function, **about):
        records.attack("mine", title="Mine", client="any client", audited=0, **about)(function)

    yield register
    records.ATTACKS.clear()
    records.ATTACKS.update(before)


def test_a_search_of_one_start_has_no_second_that_agrees_with_it(
    clients_files, tmp_path, capsys, own_attack
):
    grey, searched = records.ATTACKS["grey"], records.ATTACKS["dlm_plus"]

    def mine(seen, *, num_images=1):
        evidence = replace(searched(seen, max_evaluations=1).evidence, loss=1e-9)
        return replace(grey(seen), evidence=evidence)

    own_attack(mine, seeded=False)
    files = [clients_files / "before.pt", clients_files / "sgd.pt"]
    audit(*files, image_shape=(1, 8, 8), attack="mine", out=tmp_path / "found.png")
    said = capsys.readouterr().out
    assert "it shows has leaked" not in said and "inf dB" not in said and "ends at" not in said
    assert "no search from another start speaks for its picture" in said


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("derivative not implemented\nand more"),
        KeyError("w"),
        MemoryError(),
        ZeroDivisionError("division by zero"),
        AssertionError(),
    ],
    ids=lambda error: type(error).__name__,
)
def test_an_error_of_a_user_s_code_ends_in_one_line_and_not_the_audit(
    clients_files, tmp_path, capsys, own_attack, error
):
    def mine(seen, *, num_images=1, seed=0):
        raise error

    own_attack(mine)
    files = [clients_files / "before.pt", clients_files / "sgd.pt"]
    where = {"image_shape": (1, 8, 8), "out": tmp_path / "found.png"}
    assert "exact" in audit(*files, **where)
    lines = capsys.readouterr().out.splitlines()
    why = lines[lines.index("mine (any client) ...") + 1]
    assert why.startswith(f"    does not apply: {type(error).__name__}") and "more" not in why
    with pytest.raises(ValueError, match=f"attack mine does not apply: {type(error).__name__}"):
        audit(*files, attack="mine", **where)


def test_a_network_that_cannot_be_differentiated_is_said_to_be_one(tmp_path, capsys):
    class Breaks(torch.nn.Module):
        def forward(self, x):
            if torch.is_grad_enabled():
                raise RuntimeError("the network is not made to be differentiated")
            return x.flatten(1)

    torch.manual_seed(0)
    network = torch.nn.Sequential(Breaks(), torch.nn.Linear(64, 10))
    before = network.state_dict()
    after = {name: w + 0.01 * torch.randn(w.shape) for name, w in before.items()}
    results = audit(before, after, model=network, image_shape=(1, 8, 8), out=tmp_path / "found.png")
    said = capsys.readouterr().out
    assert results == {} and "no attack came to a result, which is no proof" in said
    assert said.count("does not apply: ") >= 2


def test_the_classes_of_a_network_by_name_are_its_head_s_wherever_that_is_registered(
    tmp_path, monkeypatch
):
    class HeadFirst(torch.nn.Module):
        def __init__(self, image_shape, num_classes):
            super().__init__()
            self.head = torch.nn.Linear(32, num_classes)
            self.hidden = torch.nn.Linear(64, 32)

        def forward(self, x):
            return self.head(self.hidden(x.flatten(1)).sigmoid())

    record = records.Network(key="head_first", function=HeadFirst, title="Head first")
    monkeypatch.setitem(records.NETWORKS, "head_first", record)
    images, labels, *_ = data.load("digits", n=1)
    model = models.build("head_first", (1, 8, 8), 10)
    seen = federated.train_locally(model, images, labels, learning_rate=0.1)
    files = {"before": model.state_dict(), "after": seen.weights_after, "attack": "dlm_plus"}
    results = audit(**files, model="head_first", image_shape=(1, 8, 8), out=tmp_path / "found.png")
    assert metrics.psnr(results["dlm_plus"].images, images, data_range=1.0) > 30


@pytest.mark.parametrize("out", ["found.xyz", "found", "", ".", "nowhere/found.png", "found.pdfs"])
def test_where_no_picture_can_be_written_is_said_before_any_attack(
    clients_files, tmp_path, capsys, monkeypatch, out
):
    monkeypatch.chdir(tmp_path)
    files = [str(clients_files / f"{name}.pt") for name in ("before", "sgd")]
    assert main(["attack", *files, "--image-shape", "1,8,8", "--out", out]) == 64
    said = capsys.readouterr()
    assert said.err.startswith(f"error: out is {str(Path(out))!r}") and said.err.count("\n") == 1
    assert said.out == "" and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("suffix", [".png", ".PNG", ".jpg", ".bmp", ".pdf"])
def test_the_picture_s_suffix_is_its_format(clients_files, tmp_path, suffix, own_attack):
    grey = records.ATTACKS["grey"].function
    own_attack(lambda seen, *, num_images=1: grey(seen), seeded=False)
    files = [clients_files / "before.pt", clients_files / "sgd.pt"]
    out = tmp_path / f"found{suffix}"
    audit(*files, image_shape=(1, 8, 8), attack="mine", out=out)
    assert out.stat().st_size > 0


def test_images_of_other_than_one_or_three_channels_are_shown_channel_by_channel(tmp_path):
    model = models.build("mlp", (2, 4, 4), 3, seed=0)
    image = torch.rand(1, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    seen = federated.train_locally(model, image, torch.tensor([1]), learning_rate=0.1)
    about = {"model": "mlp", "image_shape": (2, 4, 4), "out": tmp_path / "found.png"}
    audit(model.state_dict(), seen.weights_after, **about)
    assert (tmp_path / "found.png").stat().st_size > 0


@pytest.mark.parametrize(
    "change, message",
    [
        ({"image_shape": (3, 10**6, 10**6)}, "image_shape is .*takes up to 67,108,864 pixels"),
        ({"image_shape": (1, 8, 10**30)}, "image_shape is .*takes up to"),
        (
            {"image_shape": (1, 4000, 4000)},
            "before.* has shape .*image_shape is \\(1, 4000, 4000\\)",
        ),
        ({"num_images": 10**9}, "num_images 1000000000; an audit takes up to"),
        ({"num_classes": 10**30}, "num_classes is 1000000000000000000000000000000; it takes"),
        ({"num_classes": 10**7}, "has shape .*num_classes 10000000"),
        (
            {"attack": "exact", "client": "adam"},
            "client is 'adam'; it is simulated by unrolled_dlm",
        ),
        ({"client": ""}, "client '' is unknown"),
        ({"model": "lenett"}, "model 'lenett' is unknown"),
    ],
)
def test_numbers_beyond_all_measure_are_refused_before_anything_is_made(
    clients_files, tmp_path, change, message
):
    about = {"image_shape": (1, 8, 8), "out": tmp_path / "found.png", **change}
    with pytest.raises(ValueError, match=message):
        audit(clients_files / "before.pt", clients_files / "sgd.pt", **about)


def test_classes_that_one_s_own_network_has_not_are_refused(tmp_path, clients_files):
    model = models.build("lenet", (1, 8, 8), 10)
    about = {"image_shape": (1, 8, 8), "out": tmp_path / "found.png", "num_classes": 7}
    with pytest.raises(ValueError, match="num_classes is 7; the network has 10 outputs"):
        audit(clients_files / "before.pt", clients_files / "sgd.pt", model=model, **about)


def test_shapes_are_compared_before_anything_of_a_snapshot_s_size_is_made(tmp_path):
    state = models.build("lenet", (1, 8, 8), 10).state_dict()
    vast = {**state, "0.weight": torch.zeros(1).expand(10**6, 10**6)}  # 2 TB in half precision
    about = {"image_shape": (1, 8, 8), "out": tmp_path / "found.png"}
    for model in ("lenet", models.build("lenet", (1, 8, 8), 10)):
        for before, after in ((vast, state), (state, vast)):
            with pytest.raises(ValueError, match="0.weight.* has shape .1000000, 1000000."):
                audit(before, after, model=model, **about)
