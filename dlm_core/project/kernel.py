"""The notebooks' kernel is this environment's own Python, whatever kernels the user has."""

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

NAME = "python3"
# A kernel warns of its ports, and logs the interrupt that shuts it down as an error.
QUIET = ["--log-level=CRITICAL"]


@contextlib.contextmanager
def own() -> Iterator[None]:
    """Within it, the kernel called ``python3`` is the Python that runs, here and in all processes
    started from here.

    Notes
    -----
    Jupyter looks into the folders of JUPYTER_PATH first, before those of the user and of the
    environment.
    """
    from ipykernel.kernelspec import write_kernel_spec

    before = os.environ.get("JUPYTER_PATH")
    with tempfile.TemporaryDirectory() as folder:
        write_kernel_spec(Path(folder, "kernels", NAME))
        os.environ["JUPYTER_PATH"] = os.pathsep.join([folder, before] if before else [folder])
        try:
            yield
        finally:
            if before is None:
                del os.environ["JUPYTER_PATH"]
            else:
                os.environ["JUPYTER_PATH"] = before
