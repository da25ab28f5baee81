"""The attacker's optimizers: each takes (variables, max_evaluations) and steps on a closure."""

from collections.abc import Callable, Sequence
from typing import Any

import torch

Variables = Sequence[torch.Tensor]


def lbfgs(variables: Variables, max_evaluations: int) -> torch.optim.Optimizer:
    """L-BFGS with strong-Wolfe line search and a history of 100.

    Parameters
    ----------
    variables
        What is optimised, the images' coordinates first.
    max_evaluations
        Budget of objective and gradient; when to stop is left to the search.
    """
    return torch.optim.LBFGS(
        variables,
        max_iter=max_evaluations,
        max_eval=max_evaluations,
        tolerance_grad=0,
        tolerance_change=0,
        history_size=100,
        line_search_fn="strong_wolfe",
    )


def released_lbfgs(variables: Variables, max_evaluations: int) -> torch.optim.Optimizer:
    """L-BFGS as the released code calls it: steps of length 1, no line search.

    Parameters
    ----------
    variables, max_evaluations
        As in ``lbfgs``. The budget is not used, and the tolerances are PyTorch's own.
    """
    return torch.optim.LBFGS(variables, lr=1)


def adam(variables: Variables, max_evaluations: int) -> torch.optim.Optimizer:
    """Adam, lr 0.1, as released for the MLP (of DLM+ alone: ``slow_adam``).

    Parameters
    ----------
    variables, max_evaluations
        As in ``lbfgs``; the budget is not used.
    """
    return torch.optim.Adam(variables, lr=0.1)


def slow_adam(variables: Variables, max_evaluations: int) -> torch.optim.Optimizer:
    """Adam, lr 0.01, as released for DLM+ on the MLP.

    Parameters
    ----------
    variables, max_evaluations
        As in ``lbfgs``; the budget is not used.
    """
    return torch.optim.Adam(variables, lr=0.01)


class BoxedAdam(torch.optim.Adam):
    """Adam as attacks on pixels publish it: rates fall, and pixels stay in their box.

    Parameters
    ----------
    groups
        Variables, whose lr is 0.1, or groups of them with rates of their own.
    boxed
        Of these variables, clamped to [0, 1] after each step.
    max_evaluations
        Budget; the rates fall tenfold after 3/8, 5/8 and 7/8 of it.
    """

    def __init__(self, groups: Sequence[Any], boxed: Variables, max_evaluations: int) -> None:
        super().__init__(groups, lr=0.1)
        self.boxed = boxed
        self.drops = {max_evaluations * eighths // 8 for eighths in (3, 5, 7)}
        self.steps = 0

    # torch takes a step without a closure as well
    def step(self, closure: Callable[[], Any]) -> Any:  # type: ignore[override]
        """One step; the loss before it."""
        value = closure()
        self.steps += 1
        for group in self.param_groups:
            group["lr"] *= 0.1 if self.steps in self.drops else 1.0
        self.direct()
        super().step()
        self.clamp()
        return value

    def direct(self) -> None:
        """What becomes of the gradients before a step: nothing."""

    def clamp(self) -> None:
        """Put what is boxed back into its box."""
        with torch.no_grad():
            for variable in self.boxed:
                variable.clamp_(0, 1)


class SignedAdam(BoxedAdam):
    """The optimizer of Inverting Gradients (Geiping et al. 2020): Adam on the gradient's sign.

    Parameters
    ----------
    variables
        What is optimised; the first are the images in pixels, clamped to [0, 1] after each step.
    max_evaluations
        Budget; lr, 0.1, falls tenfold after 3/8, 5/8 and 7/8 of it.
    """

    def __init__(self, variables: Variables, max_evaluations: int) -> None:
        super().__init__(variables, variables[:1], max_evaluations)

    def direct(self) -> None:
        """Take of each gradient its sign."""
        for group in self.param_groups:
            for variable in group["params"]:
                variable.grad.sign_()
