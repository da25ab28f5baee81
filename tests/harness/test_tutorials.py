"""The tutorials' client, changed, as values that a sweep runs."""

import pytest
import torch

from dlm_core.harness.tutorials import Change, Enough, Trained, Watched


def test_a_change_is_made_and_its_result_has_a_name_of_its_own():
    changes = [{}, {"half": True}, {"local_steps": 2}, {"clip": 1.0, "noise": 0.01}]
    found = [Watched(change=each, max_steps=1).run() for each in changes]
    assert len({Watched(change=each).key for each in changes}) == len(changes)
    assert found[0]["features"] < 1e-4 < found[2]["features"] < found[3]["features"]
    assert found[0]["label"] and found[0]["psnr"] > found[0]["grey"]
    assert found[0]["arrays"]["truth"].shape == (1, 3, 32, 32)


def test_a_training_is_its_seed_s_and_feels_its_noise():
    plain, noise = Trained(num_rounds=2), {"clip": 1.0, "noise": 0.05}
    noisy = Trained(num_rounds=2, change=noise)
    found = [each.run()["accuracies"] for each in (plain, plain, noisy)]
    assert found[0] == found[1] != found[2] and len(found[0]) == 2
    assert plain.key != noisy.key


def test_who_is_attacked_is_not_among_the_others():
    images, labels, others = Watched(change={"num_images": 4}, index=98).faces()
    assert labels.tolist() == [8, 9, 0, 1] and len(others) == 96
    assert not any(torch.equal(image, other) for image in images for other in others)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: Change(noise=0.1), "noise is 0.1 of the clip, and clip is None"),
        (lambda: Change(local_steps=0), "local_steps is 0"),
        (lambda: Watched(index=-1), "index is -1"),
        (lambda: Trained(num_rounds=0), "num_rounds is 0"),
        (lambda: Enough(index=-1), "index is -1"),
    ],
)
def test_wrong_values_end_in_one_sentence(make, message):
    with pytest.raises(ValueError, match=message):
        make()
