"""Networks that draw by chance, such as those with dropout, in attacks that compute with them
outside of a search.
"""

import functools
from collections.abc import Callable
from typing import Any, TypeVar, cast

from dlm_core.threads import own_generator

F = TypeVar("F", bound=Callable[..., Any])


def draws_from_seed(attack: F) -> F:
    """Decorator of an attack ``(seen, *, seed=0, …)``: what the network draws by itself on a CPU
    follows from the seed, and the caller's generator is left as it was.
    """

    @functools.wraps(attack)
    def called(seen: Any, **options: Any) -> Any:
        device = next(seen.model.parameters()).device
        with own_generator(options.get("seed", 0), device):
            return attack(seen, **options)

    return cast(F, called)
