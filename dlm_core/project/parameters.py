"""A notebook's parameters: the assignments in its cell tagged "parameters", which a run writes its
own values into.
"""

import ast
import re
import subprocess
import sys
from collections.abc import Iterable, Mapping
from typing import Any

from dlm_core import check
from dlm_core.harness.cells import TAG, assignments, cell_of, read

__all__ = ["TAG", "WIDTH", "cell_of", "check_values", "given", "read", "write"]

# Columns of a notebook's code.
WIDTH = 88


def write(source: str, values: Mapping[str, Any]) -> str:
    """A cell's code with ``values`` instead of its own; comments, order and what is equal stay as
    they are.

    Parameters
    ----------
    source
        Of the cell, assignments of literals.
    values
        {name: value}; each name is assigned in it.

    Raises
    ------
    ValueError
        For a name that is not.
    """
    lines = source.encode().split(b"\n")  # ast counts bytes
    present = assignments(source)
    for name in values:
        check.one_of("parameter", name, present)
    for name in sorted(values, key=lambda name: present[name].lineno, reverse=True):
        node = present[name]
        if _same(ast.literal_eval(node), values[name]):
            continue
        assert node.end_lineno is not None
        before = lines[node.lineno - 1][: node.col_offset]
        after = lines[node.end_lineno - 1][node.end_col_offset :]
        lines[node.lineno - 1 : node.end_lineno] = [before + repr(values[name]).encode() + after]
    written = b"\n".join(lines).decode()
    return source if written == source else _formatted(written)


def given(texts: Iterable[str]) -> dict[str, Any]:
    """{"seeds": 100, "images": 50} from ["seeds=100 images=50"]; what is no Python literal is a
    string.

    Parameters
    ----------
    texts
        Each NAME=VALUE, or several with spaces between them.

    Raises
    ------
    ValueError
        For anything else, and for a name that is given twice.
    """
    found: dict[str, Any] = {}
    for text in texts:
        rest = text.strip()
        while rest or not text.strip():
            name, equals, rest = (each.strip() for each in rest.partition("="))
            if not equals or not name.isidentifier() or not rest:
                raise ValueError(
                    f"--parameter is {text!r}; it takes NAME=VALUE, as seeds=100, or several with "
                    "spaces between them"
                )
            if name in found:
                raise ValueError(f"--parameter {name} is given twice; give it once")
            found[name], rest = _first_value(rest)
    return found


def check_values(notebook: str, values: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
    """Raise ValueError for a name that ``notebook`` does not have, or a value of another type than
    its default.

    Parameters
    ----------
    notebook
        Its name, for the message.
    values
        {name: value} to check.
    defaults
        {name: value} of its parameters cell.
    """
    for name, value in values.items():
        check.one_of(
            f"parameter of {notebook}", name, [each for each in defaults if each != "profile"]
        )
        default = defaults[name]
        named = isinstance(default, dict) and all(key.isidentifier() for key in default)
        # Other keys, as "LeNet, tanh" or "20", are labels, and free.
        if named and isinstance(value, dict) and default and set(value) != set(default):
            raise ValueError(
                f"parameter {name} of {notebook} has the keys {', '.join(map(repr, value))}; "
                f"it takes those of {default!r}"
            )
        if not _fits(value, default):
            raise ValueError(
                f"parameter {name} of {notebook} is {check.shown(value)}; "
                f"it takes {_kind(default)}, as {default!r}"
            )


def _first_value(text: str) -> tuple[Any, str]:
    """(the value that a text begins with, what comes after it).

    It ends where another NAME= begins and it is a whole literal: "b=" may also stand within quotes.
    What is none is a string, up to the first NAME=.
    """
    ends = [match.start() for match in re.finditer(r"\s+[A-Za-z_]\w*=", text)] + [len(text)]
    for end in ends:
        try:
            return ast.literal_eval(text[:end].strip()), text[end:].strip()
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            continue
    return text[: ends[0]].strip(), text[ends[0] :].strip()


def _same(one: Any, other: Any) -> bool:
    """Whether two literals are equal and of one type: 1 is neither 1.0 nor True."""
    return repr(one) == repr(other)


def _fits(value: Any, default: Any) -> bool:
    """Whether a value is of the default's type; each part of a list or dict is of the type of one
    of the default's parts.
    """
    if default is None:
        return True
    if isinstance(default, (list, tuple)):
        return isinstance(value, (list, tuple)) and _parts_fit(value, default)
    if isinstance(default, dict):
        return isinstance(value, dict) and _parts_fit(value.values(), default.values())
    if isinstance(default, float):
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    return type(value) is type(default)


def _parts_fit(parts: Iterable[Any], examples: Iterable[Any]) -> bool:
    """The same for the parts; where one example is a whole number, any number will do: [90, 99] and
    [90, 99.9].
    """
    wanted = [float(each) if type(each) is int else each for each in examples]
    return not wanted or all(any(_fits(part, each) for each in wanted) for part in parts)


def _kind(default: Any) -> str:
    kinds = {bool: "True or False", int: "a whole number", float: "a number", str: "a text"}
    kinds |= {list: "a list", tuple: "a list", dict: "a dict"}
    return kinds.get(type(default), "a value")


def _formatted(code: str) -> str:
    """The code as ruff would format it, or as it is where ruff is not installed."""
    formatter = [
        sys.executable,
        "-m",
        "ruff",
        "format",
        "--isolated",
        "--line-length",
        str(WIDTH),
        "-",
    ]
    done = subprocess.run(formatter, input=code, capture_output=True, text=True, encoding="utf-8")
    return code if done.returncode else done.stdout.rstrip("\n")
