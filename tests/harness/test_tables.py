import math

import pandas

from dlm_core.harness import tables


def test_trials_are_said_in_words_and_none_as_not_run():
    frame = pandas.DataFrame({"psnr": [10.0, 25.0, math.nan, 30.0]})
    assert tables.said(frame) == "50% of 4 at 20 dB, median 17.5 dB"
    assert tables.said(frame[frame.psnr > 40]) == "not run"
