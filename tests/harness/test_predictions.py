"""A prediction is kept as it was made before its result, and stands beside it."""

from dlm_core.harness.predictions import Predictions


def test_an_answer_is_held_against_the_result_and_stays_as_it_was_made(capsys):
    predicted = Predictions()
    predicted["how many?"] = 3
    predicted.compare("how many?", 1)
    predicted["how many?"] = 1  # too late
    predicted.compare("how many?", 1)
    line = "how many?: you predicted 3; it is 1\n"
    assert capsys.readouterr().out == 2 * line


def test_three_dots_are_no_prediction_and_the_table_has_all_questions(capsys):
    predicted = Predictions()
    predicted["a"], predicted["b"] = ..., (1, 2)
    predicted.compare("a", "yes")
    assert capsys.readouterr().out == "a: you predicted nothing; it is yes\n"
    table = predicted.table()
    assert table.to_numpy().tolist() == [["a", "nothing", "yes"], ["b", (1, 2), "not run"]]


def test_a_small_number_stays_in_the_table():
    predicted = Predictions()
    predicted["rate"] = 1e-6
    predicted.compare("rate", 1e-8)
    assert predicted.table().result.tolist() == ["1e-08"]
