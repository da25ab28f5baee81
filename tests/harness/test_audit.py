"""Does this client leak? What the audit says of clients of several kinds, and what it refuses."""

from dataclasses import replace

import pytest
import torch

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
        assert main(["attack", *files, *where, *options]) == 0
        return capsys.readouterr().out

    return attack


def test_one_attack_by_name_and_the_hint_where_it_fails(ask):
    exactly = ask("sgd", "--attack", "exact")
    assert "learning rate 0.05" in exactly and "    determined: one SGD step" in exactly
    assert "it explains the update: what it shows has leaked" in ask("sgd", "--attack", "dlm_plus")
    failed = ask("adam", "--attack", "dlm_plus")
    assert (
        "explains little" in failed
        and "a proof that nothing leaks" in failed
        and "--attack interval_dlm" in failed
    )


@pytest.mark.parametrize(
    "after, options, looks, tried, shown",
    [
        (
            "three",
            [],
            "sgd or its kin: several steps",
            ["exact", "dlm_plus", "unrolled_dlm"],
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
    images, labels, *_ = data.load("fashion_mnist", n=1, source="bundled")
    model = models.build("lenet", (1, 28, 28), 10, seed=0)
    seen = federated.train_locally(
        model, images, labels, learning_rate=1e-3, client_optimizer="adam"
    )
    results = audit(
        model.state_dict(), seen.weights_after, image_shape=(1, 28, 28), out=tmp_path / "found.png"
    )
    assert (
        list(results) == ["interval_dlm"]
        and "looks like one step of adam on one image" in capsys.readouterr().out
    )
    assert metrics.psnr(results["interval_dlm"].images, images, data_range=1.0) > 20


def test_where_no_attack_applies_it_is_said(capsys, tmp_path):
    images, labels, *_ = data.load("digits", n=2)
    seen = federated.train_locally(
        models.build("lenet", (1, 8, 8), 10, seed=0), images, labels, learning_rate=0.05
    )
    still = {"7.bias": seen.model.state_dict()["7.bias"]}  # from which a batch's labels are read
    before, after = seen.model.state_dict(), {**seen.weights_after, **still}
    assert (
        audit(before, after, image_shape=(1, 8, 8), num_images=2, out=tmp_path / "found.png") == {}
    )
    said = capsys.readouterr().out
    assert said.count("does not apply: ") == 3 and "no attack applies, which is no proof" in said


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
        assert ("has leaked" in said) == leaks, name
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
    assert (
        list(results) == ["dlm_plus"]
        and "exact (" in (said := capsys.readouterr().out)
        and "does not apply" in said
    )
    assert metrics.psnr(results["dlm_plus"].images, images, data_range=1.0) > 30


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
    assert main(["attack", "before.pt", "after.pt", *options]) == 2
    assert message in capsys.readouterr().err


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
    assert main(["attack", str(tmp_path / "before.pt"), str(tmp_path / "after.pt"), *where]) == 0
    said = capsys.readouterr().out
    assert f"rounded to {dtype}" in said and "not to be trusted" not in said


def test_a_user_s_attack_joins_those_that_are_tried(clients_files, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(records, "ATTACKS", records.ATTACKS)  # the table itself is put back below
    before = dict(records.ATTACKS)
    try:

        @records.attack("mine", title="Mine", client="any client", audited=0)
        def mine(seen, *, num_images=1, seed=0):
            return before["grey"](seen, num_images=num_images)

        assert list(tried())[0] == "mine"
        files = [clients_files / "before.pt", clients_files / "sgd.pt"]
        audit(*files, image_shape=(1, 8, 8), attack="mine", out=tmp_path / "found.png")
        assert "mine (any client) ..." in capsys.readouterr().out
    finally:
        records.ATTACKS.clear()
        records.ATTACKS.update(before)


def test_the_update_is_computed_once(clients_files, tmp_path, monkeypatch):
    from dlm_core.observation import Observation

    compute, count = Observation.delta.func, []
    monkeypatch.setattr(Observation.delta, "func", lambda seen: count.append(1) or compute(seen))
    files = [clients_files / "before.pt", clients_files / "sgd.pt"]
    audit(*files, image_shape=(1, 8, 8), out=tmp_path / "found.png")
    assert len(count) == 1
