"""Records: what a function takes is read off its signature, by one rule for all kinds."""

import json
import pickle

import numpy as np
import pytest
import torch

from dlm_core import attacks, check, data, defenses, federated, models, records
from dlm_core.harness.trials import Trial
from dlm_core.harness.utility import Federation
from dlm_core.records import ATTACKS, Options
from dlm_core.results import baseline


@pytest.fixture(scope="module")
def seen():
    images, labels, *_ = data.load("digits", n=1)
    return federated.train_locally(
        models.build("lenet", (1, 8, 8), 10), images, labels, learning_rate=0.05
    )


def brightened(weights, scale, parameters=None, seed=0):
    return {name: w + scale for name, w in weights.items()}


def test_a_defence_s_option_need_not_be_keyword_only(seen):
    found = defenses.defend(seen, brightened, scale=0.1)
    name = seen.parameter_names[0]
    assert torch.equal(found.weights_after[name], seen.weights_after[name] + 0.1)
    with pytest.raises(ValueError, match="'brightened' must be told scale"):
        defenses.defend(seen, brightened)
    with pytest.raises(ValueError, match="option of brightened 'parameters' is unknown"):
        defenses.defend(seen, brightened, scale=0.1, parameters=[])


def test_an_attack_s_demand_need_not_be_keyword_only(seen):
    def mine(seen, k0, *, num_images=1, seed=0):
        return baseline(torch.full((num_images, *seen.image_shape), float(k0)))

    record = records.Attack(key="mine", function=mine, title="Mine")
    assert record.demands == ["k0"] and record.options == ["k0"]
    assert record(seen, num_images=2, k0=1).images.eq(1).all()
    with pytest.raises(ValueError, match="attack 'mine' must be told k0"):
        record(seen)


def test_a_network_s_option_need_not_be_keyword_only():
    def mine(image_shape, num_classes, width):
        return torch.nn.Linear(width, num_classes)

    record = records.Network(key="mine", function=mine, title="Mine")
    assert record.options == record.demands == ["width"]


@pytest.mark.parametrize(
    "key, option",
    [
        ("idlg", {"learning_rate": 0.1, "labels": "optimised"}),
        ("dlg", {"learning_rate": 0.1, "scale": 2.0}),
        ("dlm", {"k0": 10.0, "scale": 2.0}),
        ("dlm_plus", {"distance": None}),
        ("dlm_plus", {"num_image": 3}),
    ],
)
def test_what_an_attack_fills_in_itself_is_no_option_of_it(seen, key, option):
    name = list(option)[-1]
    for call in (ATTACKS[key], ATTACKS[key].function):
        with pytest.raises(ValueError, match=f"option of {key} '{name}' is unknown"):
            call(seen, **option)


def test_former_names_serve_by_key_as_well():
    record = ATTACKS["unrolled_dlm"]
    record.check_options("option", {"steps": 1})
    assert "steps" not in record.options
    aware = ATTACKS["aware_unrolled_dlm"]
    aware.check_told(["defence", "learning_rate", "steps"])
    with pytest.raises(ValueError, match="must be told learning_rate"):
        aware.check_told(["defence", "steps"])


def test_former_names_of_what_options_are_passed_on_to_serve():
    @check.renamed(old="new")
    def inner(*, new=0, other=0):
        return new

    @records.passes_on_to(inner)
    def outer(seen, **options):
        return inner(**options)

    @records.passes_on_to(outer, fixed=["new"])
    def outermost(seen, **options):
        return outer(seen, new=5, **options)

    assert outer(1, old=3) == 3 and outermost(1, other=2) == 5
    for name in ("old", "new", "options"):
        with pytest.raises(ValueError, match=f"option of outermost '{name}' is unknown"):
            outermost(1, **{name: 3})


def test_one_image_says_who_takes_several(seen):
    with pytest.raises(ValueError, match="num_images is 2; exact takes one.*exact_batch"):
        ATTACKS["exact"](seen, num_images=2)


def test_options_are_equal_where_they_are_written_the_same():
    assert Options(a=1) == Options(a=1.0) and hash(Options(a=1)) == hash(Options(a=1.0))
    assert Options(a=True) != Options(a=1)
    assert Options(betas=[0.9, 1]) == Options(betas=(0.9, 1)) == {"betas": [0.9, 1.0]}
    assert Options() == {} and Options(a=1) != 3
    assert Options(a=np.float64(0.5), b=np.int64(2)) == Options(a=0.5, b=2)
    assert json.dumps(records.plain(Options(a=np.int64(2)))) == '{"a": 2}'


def test_options_cannot_be_changed():
    inner, several = {"momentum": 0.9}, [1, 2]
    options = Options(client_options=inner, betas=several)
    before = hash(options)
    inner["momentum"], several[0] = 0.1, 7
    with pytest.raises(TypeError):
        options["client_options"]["momentum"] = 0.1
    assert hash(options) == before == hash(pickle.loads(pickle.dumps(options)))


@pytest.mark.parametrize("given", [3, "ab", [1], {1: 2}])
def test_options_are_named(given):
    with pytest.raises(ValueError, match="options is .*; it takes a mapping of names"):
        Options(given)


@pytest.mark.parametrize("given", [None, 3, "sgd"])
def test_a_part_is_a_value_or_its_fields(given):
    with pytest.raises(ValueError, match="client is .*; it takes a Setting or a dict of name"):
        records.typed("client", defenses.Setting, given)


def test_a_client_optimizer_of_a_user_s_is_registered_like_the_rest():
    try:
        records.client_optimizer("mine", title="Mine")(torch.optim.Adagrad)
        assert "lr_decay" in records.CLIENT_OPTIMIZERS["mine"].options
        assert "lr" not in records.CLIENT_OPTIMIZERS["mine"].options
    finally:
        records.CLIENT_OPTIMIZERS.pop("mine", None)


def test_an_option_is_refused_before_anything_else():
    with pytest.raises(ValueError, match="option of dlm_plus 'restart' is unknown.*restarts"):
        attacks.dlm_plus(None, restart=3)


@pytest.mark.parametrize(
    "kind, about, message",
    [
        (records.attack, {"titel": "Mine"}, "field of Attack 'titel' is unknown.*mean title"),
        (records.attack, {"colour": 99}, r"colour is 99; it takes a whole number in \[0, 9\]"),
        (records.attack, {"audited": 2}, "audited is 2; that is the place of 'exact'"),
        (records.data_set, {"image_shape": 3}, "image_shape is 3; it takes .channels, height"),
        (records.data_set, {"image_shape": (0, 8, 8)}, "image_shape is .0, 8, 8.; it takes"),
        (records.defence, {"acts_on": "snapshots"}, "acts_on is 'snapshots'; it takes 'snapshot'"),
    ],
)
def test_a_wrong_field_of_a_record_is_refused_when_it_is_registered(kind, about, message):
    with pytest.raises(ValueError, match=message):
        kind("mine", **about)(lambda seen, *, num_images=1, seed=0: None)


@pytest.mark.parametrize("kind", [Trial, Federation])
def test_a_defence_s_options_are_plain_data(kind):
    with pytest.raises(ValueError, match="scale is a Tensor"):
        kind(defence={"name": "noise", "scale": torch.ones(2)})
