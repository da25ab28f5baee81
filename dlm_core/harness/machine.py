"""The machine that computes: what the last bits of a result depend on beside code and versions."""

import os
import platform
import re
from pathlib import Path

import numpy
import torch

CPUINFO = Path("/proc/cpuinfo")


def description() -> dict[str, str | int]:
    """Processor, cores, BLAS and torch's threads, by name."""
    return {
        "processor": processor(),
        "cores": os.cpu_count() or 1,
        "blas": blas(),
        "threads": torch.get_num_threads(),
    }


def processor() -> str:
    """The processor's name; on Linux with family and model, which some clouds' names leave out."""
    try:
        text = CPUINFO.read_text(encoding="utf-8")
    except OSError:
        text = ""
    about = dict(re.findall(r"^(model name|cpu family|model)\s*: (.*)$", text, re.MULTILINE))
    if len(about) < 3:
        return platform.processor() or platform.machine()
    return f"{about['model name']} (family {about['cpu family']}, model {about['model']})"


def blas() -> str:
    """The libraries of linear algebra of torch and NumPy, and the instructions that torch uses."""
    built = torch.__config__.show()
    named = re.search(r"BLAS_INFO=(\w+)", built)
    release = re.search(r"Math Kernel Library Version (\S+?)-", built)
    of_torch = (named[1] if named else "unknown") + (f" {release[1]}" if release else "")
    of_numpy = numpy.show_config(mode="dicts")["Build Dependencies"]["blas"]
    return (
        f"torch {of_torch} with {torch.backends.cpu.get_cpu_capability()}, "
        f"numpy {of_numpy['name']} {of_numpy.get('version', '')}".rstrip()
    )
