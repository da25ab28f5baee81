"""What is said and drawn of many starts."""

import pytest
import torch

from dlm_core.beyond.starts import Ends
from dlm_core.harness import clusters
from dlm_core.results import ClientEstimate, Reconstruction, SearchEvidence, Status


def ended(values, loss, status=Status.CONVERGED):
    """A search that ended at images [B, 1, 4, 4] of one grey each."""
    return Reconstruction(
        images=torch.tensor(values)[:, None, None, None].expand(-1, 1, 4, 4).clone(),
        labels=torch.zeros(len(values), dtype=torch.long),
        status=status,
        vouched=torch.zeros(len(values), dtype=torch.bool),
        evidence=SearchEvidence(losses=[loss], loss=loss),
        client=ClientEstimate(),
        seconds=0.0,
    )


@pytest.fixture
def ends():
    """Of five starts three ended at one pair of images, in either order."""
    found = [
        *(ended([0.5, 0.9], 1e-6), ended([0.1, 0.8], 2e-8), ended([0.8, 0.1], 1e-8)),
        *(ended([0.12, 0.8], 3e-8), ended([0.3, 0.3], 1e-2, Status.STALLED)),
    ]
    return Ends(found=found, cluster=torch.tensor([1, 0, 0, 0, 2]))


def test_the_sentence_counts_starts_and_pictures_that_explain(ends):
    said = clusters.sentence(ends)
    assert said.startswith("3 of 5 starts (23 to 88 %) ended at the picture of lowest loss")
    assert "the others at 2 other pictures" in said
    assert "2 different pictures explain the update" in said and "does not tell which" in said
    alone = Ends(found=ends.found[1:4], cluster=torch.zeros(3, dtype=torch.long))
    assert "One picture explains the update" in clusters.sentence(alone)
    assert "other" not in clusters.sentence(alone).partition(". ")[0].replace("each other", "")
    stalled = Ends(found=ends.found[4:], cluster=torch.zeros(1, dtype=torch.long))
    assert "None converged" in clusters.sentence(stalled)


def test_each_cluster_is_drawn_once_the_best_one_first_and_images_in_its_order(ends):
    figure = clusters.show(ends)
    axes = figure.axes
    assert [axis.get_title() for axis in axes[:3]] == [
        *("3 of 5\nloss 1.0e-08", "1 of 5\nloss 1.0e-06", "1 of 5\nloss 1.0e-02")
    ]
    drawn = [round(float(axis.images[0].get_array()[0, 0, 0]), 2) for axis in axes]
    assert drawn == [0.8, 0.9, 0.3, 0.1, 0.5, 0.3]
    assert len(clusters.show(ends, most=1).axes) == 2
    apart = ends.spread
    assert apart == pytest.approx(
        float(torch.tensor([0.1, 0.1, 0.12]).var(correction=0) / 2) ** 0.5
    )
