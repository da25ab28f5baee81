"""Predictions of a lesson: written down before a result is seen, kept, and held against it."""

from typing import Any

from dlm_core import check
from dlm_core.harness import tables


class Predictions:
    """What a reader expects, by question.

    Examples
    --------
    >>> predicted = Predictions()
    >>> predicted["negative entries, of 10"] = 3
    >>> predicted.compare("negative entries, of 10", 1)
    negative entries, of 10: you predicted 3; it is 1
    """

    def __init__(self) -> None:
        self._made: dict[str, Any] = {}
        self._found: dict[str, Any] = {}

    @check.arguments
    def __setitem__(self, question: str, answer: Any) -> None:
        """Keep an answer; three dots are none. After the result the first one stays."""
        if question not in self._found:
            self._made[question] = answer

    @check.arguments
    def compare(self, question: str, result: Any) -> None:
        """Print the answer beside what came out, and keep both.

        Parameters
        ----------
        question
            As it was asked.
        result
            What was measured.
        """
        self._found[question] = result
        print(f"{question}: you predicted {self._answer(question)}; it is {result}")

    def table(self) -> tables.Frame:
        """All questions with the answer given before, and the result."""
        import pandas

        rows = [(q, self._answer(q), self._result(q)) for q in self._made]
        return pandas.DataFrame(rows, columns=["question", "predicted", "result"])

    def _result(self, question: str) -> Any:
        found = self._found.get(question, "not run")
        return f"{found:g}" if isinstance(found, float) else found  # a table rounds 1e-8 to 0

    def _answer(self, question: str) -> Any:
        answer = self._made.get(question, ...)
        return "nothing" if answer is ... else answer
