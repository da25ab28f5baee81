import json
import math
import tomllib
from dataclasses import replace

import pytest

from dlm_core.harness import evidence, options, report, sweeps
from dlm_core.harness.paths import REPOSITORY
from dlm_core.harness.trials import Trial
from dlm_core.records import Options

TRAINING = options.federation("digits", num_rounds=4)
STRENGTHS = {
    "scales": [1e-3],
    "percents": [50, 90],
    "multipliers": [0.3],
    "dp_sgd": [3.0],
    "kept_out": [99],
    "bits": [8],
}
MENU = options.menu(TRAINING, **STRENGTHS)


def one(family):
    return next(option for option in MENU if option.family == family)


def test_menu_has_each_strength_once_and_central_privacy_beside_the_local():
    strengths = [option.strength for option in MENU]
    assert strengths == [1e-3, 50, 90, 0.3, 0.3 * math.sqrt(5), 3.0, 99, 8]
    assert len(set(MENU)) == len(MENU)


def test_only_mechanisms_whose_noise_bounds_an_influence_have_an_epsilon():
    bounded = {option.family for option in MENU if option.epsilon < math.inf}
    assert bounded == {"clipping and noise, local", "clipping and noise, central", "DP-SGD"}
    local, central = one("clipping and noise, local"), one("clipping and noise, central")
    assert central.epsilon < local.epsilon


def test_central_privacy_trains_as_the_local_one_and_shows_clipped_updates():
    local, central = one("clipping and noise, local"), one("clipping and noise, central")
    assert central.trainings(3) == local.trainings(3)
    assert "noise_multiplier" not in central.shown.options


def test_the_channel_sees_both_snapshots_defended_but_w_t_where_the_update_is():
    assert one("released noise").shown_to("channel").observer == "channel"
    assert one("released noise").shown_to("server").observer == "server"
    assert one("top-k update").shown_to("channel") == one("top-k update").shown_to("server")
    assert options.undefended(TRAINING).shown_to("channel") is None


def test_trainings_differ_in_their_seed_alone():
    trainings = one("DP-SGD").trainings(2)
    assert [each.seed for each in trainings] == [0, 1]
    assert trainings[0].client.private and trainings[0].client.batch_size is None


def test_strongest_attack_is_that_of_the_highest_median_and_no_picture_is_a_failure(monkeypatch):
    victim = options.Victim(trial=Trial(dataset="digits", **options.MLP), number=2)
    attacks = victim.attacks(None)
    found = {"dlm_plus": 30.0, "exact": 50.0}

    def sweep(plan):
        whole = {"psnr": 50.0}
        return [{"psnr": found[t.attack]} if t.index == 0 else whole for t in plan[:-1]] + [{}]

    monkeypatch.setattr(sweeps, "sweep", sweep)
    plan = [trial for several in attacks.values() for trial in several]
    psnr = options.psnrs([*plan, *plan])
    assert psnr[plan[-1]] == -math.inf
    leak = options.strongest(attacks, psnr)
    assert (leak.attack, leak.psnr, leak.psnr_unaware) == ("dlm_plus", 40.0, 40.0)
    assert leak.psnr_max == 50.0


def test_highest_is_of_each_client_by_whichever_attack_sees_it_best():
    victim = options.Victim(trial=Trial(dataset="digits", num_images=2, **options.MLP), number=3)
    attacks = {name: victim.trials(name) for name in ("dlm_plus", "exact_batch")}
    found = {"dlm_plus": [30.0, 5.0, -math.inf], "exact_batch": [10.0, 80.0, -math.inf]}
    psnr = {t: found[name][t.index] for name, several in attacks.items() for t in several}
    table = options.highest(attacks, psnr)
    assert table.psnr.tolist() == [30.0, 80.0, -math.inf]
    share = evidence.share(table, "both")
    assert (share.value, share.n, share.units) == (pytest.approx(2 / 3), 3, "batches, 3 networks")
    with pytest.raises(ValueError, match="shorter"):
        options.highest({**attacks, "exact_batch": attacks["exact_batch"][:2]}, psnr)


def local_victim(**how):
    base = Trial(dataset="digits", client={"learning_rate": 1.0, **how}, **options.MLP)
    return options.Victim(trial=base, number=4)


def test_a_defended_digit_meets_a_learned_prior_and_no_other_image_does():
    defence = one("clipping and noise, local").shown
    victim = local_victim(local_steps=3)
    told = {"learning_rate": 1.0, "local_steps": 3}
    assert ("learned_prior", Options(told)) in victim.attacks(defence)
    assert not [name for name, _ in victim.attacks(None) if name == "learned_prior"]
    batch = replace(victim, trial=replace(victim.trial, num_images=2))
    assert ("learned_prior", Options({**told, "labels": "given"})) in batch.attacks(defence)
    colour = replace(victim, trial=Trial(dataset="cifar100"))
    assert not [name for name, _ in colour.attacks(defence) if name == "learned_prior"]


def test_all_rounds_are_of_the_priced_training_and_of_the_same_clients():
    option, victim = one("DP-SGD"), local_victim(local_steps=3)
    attacks = options.over_rounds(option, victim, networks=2, every=3)
    assert [name for name, _ in attacks] == [
        "all rounds, learned_prior",
        "all rounds, aware_exact",
    ]
    joint, averaging = attacks.values()
    assert [each.every for each in joint + averaging] == [3] * 4 + [1] * 4
    assert [each.averaged for each in joint + averaging] == [False] * 4 + [True] * 4
    for several in (joint, averaging):
        assert [each.index for each in several] == [0, 1, 2, 3]
        assert {each.training for each in several} == set(option.trainings(2))
        assert {each.local_steps for each in several} == {3}
    # a quotient is of one image
    batch = replace(victim, trial=replace(victim.trial, num_images=2))
    assert [name for name, _ in options.over_rounds(option, batch)] == ["all rounds, learned_prior"]
    with pytest.raises(ValueError, match="option has no defence"):
        options.over_rounds(options.undefended(TRAINING), victim)


def test_the_price_in_colour_takes_the_full_set_and_runs():
    record = options.in_colour(1, dataset="digits").run()
    assert 0 <= record["accuracy"] <= 1
    assert options.in_colour(1, dataset="digits").model == "lenet"


def test_victims_share_network_and_data_and_have_images_of_their_own():
    base = Trial(dataset="digits", num_images=4, **options.MLP)
    trials = options.Victim(trial=base, number=2).trials("grey")
    assert [(t.index, t.seed, t.num_images) for t in trials] == [(0, 0, 4), (1, 1, 4)]
    assert replace(trials[1], index=0, seed=0) == trials[0]


def test_price_is_in_points_of_accuracy_of_the_same_seeds():
    mean, low, high = options.price([0.9, 0.8], [0.8, 0.7])
    assert mean == pytest.approx(10) and low == pytest.approx(10) and high == pytest.approx(10)


@pytest.mark.parametrize("profile", ["defaults", "quick", "paper"])
def test_the_two_notebooks_that_share_the_trainings_ask_for_the_same(profile):
    names = ("18_privacy_and_utility", "20_choosing_a_defence")
    folder = REPOSITORY / "notebooks"
    values = [report.parameters(folder / f"{name}.ipynb") for name in names]
    if profile != "defaults":
        catalogue = tomllib.loads((folder / "profiles.toml").read_text(encoding="utf-8"))
        values = [{**v, **catalogue[name][profile]} for v, name in zip(values, names)]
    shared = {"dataset", "seeds", "rounds", "images", *STRENGTHS}
    first, second = ({name: each[name] for name in shared} for each in values)
    assert json.dumps(first, sort_keys=True) == json.dumps(second, sort_keys=True)
