"""Many starts of one search, as evidence."""

import pytest
import torch

from dlm_core import attacks, metrics
from dlm_core.beyond import starts


def test_starts_that_end_at_the_picture_are_counted(seen, digit):
    ends = starts.survey(seen, starts=4, max_evaluations=100)
    alone = [attacks.dlm_plus(seen, seed=starts.SEED * i, max_evaluations=100) for i in range(4)]
    assert [each.status for each in ends.found] == [each.status for each in alone]
    shown = [metrics.psnr(f.images, digit[0], data_range=1.0) > 25 for f in alone]
    assert ends.share == sum(shown) / 4 > 0.5 and ends.spread < 0.03
    assert ends.best.loss == min(each.loss for each in ends.found)
    assert ends.explaining == 1


def test_starts_that_end_apart_are_clusters_by_loss(seen):
    """After one evaluation each is where it began; "alike" says what counts as one."""
    options = {"starts": 3, "max_evaluations": 1}
    apart = starts.survey(seen, alike=100.0, **options)
    assert sorted(apart.cluster.tolist()) == [0, 1, 2] and apart.share == 1 / 3
    losses = [found.loss for found in apart.clusters]
    assert losses == sorted(losses) and apart.counts == [1, 1, 1]
    assert apart.spread == 0 and apart.explaining == 0
    together = starts.survey(seen, alike=5.0, **options)
    assert together.share == 1 and len(together.clusters) == 1
    mean = torch.stack([found.images for found in together.found]).mean(0)
    away = torch.stack([(found.images - mean).square().mean() for found in together.found])
    assert together.spread == pytest.approx(float(away.mean().sqrt()))


def test_restarts_of_a_start_are_refused(seen):
    with pytest.raises(ValueError, match="restarts is 2; each of the starts is one search"):
        starts.survey(seen, restarts=2)
