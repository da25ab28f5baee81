"""What notebooks ask of their tables."""

import pandas

from dlm_core.harness import tables


def test_per_image_gives_each_image_of_a_batch_its_row():
    trials = pandas.DataFrame(
        {"index": [0, 2], "psnr": [15.0, 30.0], "psnrs": [[10.0, 20.0], [30.0]]}
    )
    images = tables.per_image(trials)
    assert images["index"].tolist() == [0, 0, 2]
    assert images.psnr.tolist() == [10.0, 20.0, 30.0] and images.psnr.dtype == float
    assert "psnrs" not in images and "psnrs" in trials
