"""The attacker's optimizers: each is called with (variables, budget of evaluations) and steps on a closure."""

from collections.abc import Callable, Sequence

import torch

Variables = Sequence[torch.Tensor]


def lbfgs(variables: Variables, max_evaluations: int) -> torch.optim.Optimizer:
    """L-BFGS with strong-Wolfe line search and a history of 100; when to stop is left to the search."""
    limits = {"max_iter": max_evaluations, "max_eval": max_evaluations, "tolerance_grad": 0, "tolerance_change": 0}
    return torch.optim.LBFGS(variables, history_size=100, line_search_fn="strong_wolfe", **limits)


def released_lbfgs(variables: Variables, max_evaluations: int) -> torch.optim.Optimizer:
    """L-BFGS as the released code calls it: steps of length 1, no line search, PyTorch's own tolerances."""
    return torch.optim.LBFGS(variables, lr=1)


def adam(variables: Variables, max_evaluations: int) -> torch.optim.Optimizer:
    """Adam, lr 0.1, as released for the MLP."""
    return torch.optim.Adam(variables, lr=0.1)


class SignedAdam(torch.optim.Adam):
    """The optimizer of Inverting Gradients (Geiping et al. 2020): Adam, lr 0.1, on the sign of the gradient.

    Pixels are clamped to [0, 1] after each step; lr falls tenfold after 3/8, 5/8 and 7/8 of the budget. The first of
    ``variables`` must be the images in pixels.
    """

    def __init__(self, variables: Variables, max_evaluations: int) -> None:
        super().__init__(variables, lr=0.1)
        self.images = variables[0]
        self.drops = {max_evaluations * eighths // 8 for eighths in (3, 5, 7)}
        self.steps = 0

    def step(self, closure: Callable) -> torch.Tensor:  # type: ignore[override]
        value = closure()
        self.steps += 1
        for group in self.param_groups:
            group["lr"] *= 0.1 if self.steps in self.drops else 1.0
            for variable in group["params"]:
                variable.grad.sign_()
        super().step()
        with torch.no_grad():
            self.images.clamp_(0, 1)
        return value
