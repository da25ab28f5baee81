"""The digest of a user's code changes with all that it reaches, and with nothing else."""

import importlib
import os
import re
import subprocess
import sys
import types

import pytest

from dlm_core.harness.contents import Unfollowable, contents

# In each case the function is ``mine``; «this|that»: by the change this becomes that.
REACHED = {
    "its own code": "def mine(): return «1|2»",
    "a default": "def mine(a=«1|2»): return a",
    "a default by name": "def mine(*, a=«1|2»): return a",
    "the order of arguments": "def mine(«a, b|b, a»): return a - b",
    "a global": "A = «1|2»\ndef mine(): return A",
    "a global in an inner function": "A = «1|2»\ndef mine(): return lambda: A",
    "a type": "A = «1|1.0»\ndef mine(): return A",
    "a list in a tuple": "A = (0, «[1]|[2]»)\ndef mine(): return A",
    "a set": "A = {'a', '«b|c»'}\ndef mine(): return A",
    "a set in a comparison": "def mine(a): return a in {'a', '«b|c»'}",
    "a dict's number": "A = {'a': «1|2»}\ndef mine(): return A",
    "a dict's function": "A = {'a': lambda: «1|2»}\ndef mine(): return A['a']()",
    "a function": "def other(): return «1|2»\ndef mine(): return other()",
    "a function's global": "A = «1|2»\ndef other(): return A\ndef mine(): return other()",
    "a function's attribute": "def mine(): return mine.a\nmine.a = «1|2»",
    "a closure": "def make(a):\n    def mine(): return a\n    return mine\nmine = make(«1|2»)",
    "what a decorator of an installed package wraps": (
        "import torch\n@torch.no_grad()\ndef mine(): return «1|2»"
    ),
    "a decorator of an installed package": (
        "import torch\n@torch.«no_grad|enable_grad»()\ndef mine(): return 1"
    ),
    "what a decorator of ours wraps": (
        "from dlm_core import check\n@check.arguments\ndef mine(): return «1|2»"
    ),
    "what a cache wraps": "import functools\n@functools.cache\ndef mine(): return «1|2»",
    "a partial": (
        "import functools\ndef other(a): return a\nmine = functools.partial(other, a=«1|2»)"
    ),
    "a bound method": (
        "class A:\n    def __init__(self, a): self.a = a\n    def get(self): return self.a\n"
        "B = A(«1|2»).get\ndef mine(): return B()"
    ),
    "a large array": ("import numpy\nA = numpy.zeros(5000)\nA[2500] = «1|2»\ndef mine(): return A"),
    "an array of one type for another": (
        "import numpy\nA = numpy.zeros(4, '«<f4|<i4»')\ndef mine(): return A"
    ),
    "a tensor": "import torch\nA = torch.zeros(5000)\nA[2500] = «1|2»\ndef mine(): return A",
    "the weights of a network": (
        "import torch\nA = torch.nn.Linear(2, 2)\ntorch.nn.init.constant_(A.bias, 0)\n"
        "torch.nn.init.constant_(A.weight, «1|2»)\ndef mine(): return A"
    ),
    "the mode of a network": (
        "import torch\nA = torch.nn.Dropout()\nA.train(«True|False»)\ndef mine(): return A"
    ),
    "a generator's seed": (
        "import torch\nA = torch.Generator().manual_seed(«1|2»)\ndef mine(): return A.get_state()"
    ),
    "a method": "class A:\n    def get(self): return «1|2»\ndef mine(): return A().get()",
    "a method of Python's": (
        "class A:\n    def __getitem__(self, i): return «1|2»\ndef mine(): return A()[0]"
    ),
    "a property": (
        "class A:\n    @property\n    def get(self): return «1|2»\ndef mine(): return A().get"
    ),
    "a cached property": (
        "import functools\nclass A:\n    @functools.cached_property\n    def get(self):\n"
        "        return «1|2»\ndef mine(): return A().get"
    ),
    "a static method": (
        "class A:\n    @staticmethod\n    def get(): return «1|2»\ndef mine(): return A.get()"
    ),
    "an attribute of a class": "class A:\n    a = «1|2»\ndef mine(): return A.a",
    "a base": "class B:\n    a = «1|2»\nclass A(B): pass\ndef mine(): return A.a",
    "a member of an enumeration": (
        "import enum\nclass A(enum.Enum):\n    B = «1|2»\ndef mine(): return A.B"
    ),
    "a default of a dataclass": (
        "import dataclasses\n@dataclasses.dataclass\nclass A:\n    a: int = «1|2»\n"
        "def mine(): return A()"
    ),
    "a factory of a dataclass": (
        "import dataclasses\n@dataclasses.dataclass\nclass A:\n"
        "    a: int = dataclasses.field(default_factory=lambda: «1|2»)\ndef mine(): return A()"
    ),
    "an object": (
        "class A:\n    def __init__(self, a): self.a = a\nB = A(«1|2»)\ndef mine(): return B"
    ),
    "an object with slots": (
        "class A:\n    __slots__ = ('a',)\n    def __init__(self, a): self.a = a\n"
        "B = A(«1|2»)\ndef mine(): return B"
    ),
    "a class itself": (
        "import torch\nclass mine(torch.nn.Module):\n    def forward(self, x): return «1|2»"
    ),
    "another module's function": "import helper\ndef mine(): return helper.double()",
    "another module's function, taken from it": (
        "from helper import double\ndef mine(): return double()"
    ),
    "another module as a whole": "import helper\ndef mine(): return getattr(helper, 'double')()",
    "another module, imported inside": (
        "def mine():\n    import helper\n    return helper.double()"
    ),
    "another module's function, imported inside": (
        "def mine():\n    from helper import double\n    return double()"
    ),
    "another module's import": "import between\ndef mine(): return between.get()",
    "a module in a folder called lib": "import lib.deep\ndef mine(): return lib.deep.get()",
    "a relative import inside": (
        "__package__ = 'lib'\ndef mine():\n    from . import deep\n    return deep.get()"
    ),
    "a generator of one's own": (
        "import random\nA = random.Random(«1|2»)\ndef mine(): return A.random()"
    ),
    "a constant of another module": "import helper\ndef mine(): return helper.A",
}
HELPER = "A = «1|2»\ndef double(): return 2 * A\ndef unused(): return A"
BETWEEN = "import helper\ndef get(): return helper.double()"
DEEP = "A = «1|2»\ndef get(): return A"


def changed(source, after):
    """``source`` before or after the change."""
    return re.sub("«(.*?)\\|(.*?)»", lambda found: found[1 + after], source, flags=re.DOTALL)


@pytest.fixture
def imports(tmp_path, monkeypatch):
    """Writes the user's modules as they are before or after the change, and returns ``mine``."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    names = ("user", "helper", "between", "lib", "lib.deep")

    def load(source, after=False):
        (tmp_path / "lib").mkdir(exist_ok=True)
        files = {"user": source, "helper": HELPER, "between": BETWEEN}
        for name, text in {**files, "lib/__init__": "", "lib/deep": DEEP}.items():
            (tmp_path / f"{name}.py").write_text(changed(text, after))
        for name in names:
            sys.modules.pop(name, None)
        importlib.invalidate_caches()
        return importlib.import_module("user").mine

    yield load
    for name in names:
        sys.modules.pop(name, None)


def digest(function):
    return contents("attack 'mine'", {"function": function})


@pytest.mark.parametrize("source", REACHED.values(), ids=REACHED)
def test_what_it_reaches_counts(imports, source):
    before = digest(imports(source))
    assert digest(imports(source)) == before, "the same code, the same digest"
    assert digest(imports(source, after=True)) != before


@pytest.mark.parametrize(
    "source",
    [
        "def mine():\n    '«one|two»'\n    return 1",
        "def mine():\n    «|'now a docstring'\n    »return 1",
        "def mine():  # «one|two»\n    return 1",
        "«|\n\n\n»def mine():\n    return 1",
        "def mine():\n    def inner():\n        '«one|two»'\n    return inner",
        "class A:\n    '«one|two»'\n    a = 1\ndef mine():\n    return A.a",
        "def mine(a: «int|float»):\n    return a",
        "A = «1|2»\ndef mine():\n    return 1",
        "import helper\ndef mine():\n    return helper.__name__",
    ],
)
def test_what_it_does_not_reach_does_not_count(imports, source):
    assert digest(imports(source)) == digest(imports(source, after=True))


def test_an_edit_that_is_not_saved_counts(imports):
    mine = imports("import helper\ndef mine(): return helper.double()")
    before = digest(mine)
    sys.modules["helper"].A = 7
    assert digest(mine) != before


def test_cycles_and_depth_are_no_matter(imports):
    source = (
        "def even(n): return n == 0 or odd(n - 1)\ndef odd(n): return n != 0 and even(n - 1)\n"
        "A = []\nA.append(A)\nB = []\nfor _ in range(5000): B = [B]\n"
        "def mine(): return even, A, B, mine"
    )
    assert digest(imports(source)) == digest(imports(source))


UNFOLLOWABLE = {
    "import threading\nA = threading.Lock()\ndef mine(): return A": "function.A, a _thread.lock",
    "A = {'b': (i for i in range(3))}\ndef mine(): return A": "function.A.b, a generator",
    "def mine(): return eval('1')": "it calls eval",
    "import builtins\ndef mine(): return builtins.eval('1')": "it calls",
    "import importlib\ndef mine(): return importlib.import_module('x')": "calls importlib.import",
    "import torch\ndef mine(): return torch.load('x')": "what torch.serialization.load returns",
    "import numpy\ndef mine(): return numpy.load('x')": "what numpy.load returns",
    "def mine(): return open('x').read()": "what open returns",
    "import os\ndef mine(): return os.environ['x']": "what os.environ returns",
    "import random\ndef mine(): return random.random()": "draw from one of your own",
    "import random\ndef mine(): return random.uniform(0, 1)": "draw from one of your own",
    "import numpy\ndef mine(): return numpy.random.rand()": "draw from one of your own",
    "from dlm_core.weights import load_weights as w\ndef mine(): return w('x')": "load_weights",
}


@pytest.mark.parametrize("source, said", UNFOLLOWABLE.items())
def test_what_cannot_be_followed_is_said_in_one_sentence(imports, source, said):
    with pytest.raises(Unfollowable, match=f"^attack 'mine' reaches .*{said}") as caught:
        digest(imports(source))
    assert "\n" not in str(caught.value) and "store=None" in str(caught.value)


def test_a_module_that_is_in_no_table_is_followed():
    module = types.ModuleType("nowhere")
    exec("A = 1\ndef mine(): return A", vars(module))
    before = digest(module.mine)
    module.A = 2
    assert digest(module.mine) != before


SETS = """
from dlm_core.harness.contents import contents
A = {"a", "b", "c", ("d", 1)}
class B:
    held = frozenset("efgh")
def mine(x):
    import json
    return x in {"i", "j", "k"} and A and B() and json
print(contents("attack 'mine'", mine))
"""


def test_a_digest_is_the_same_in_every_process():
    found = set()
    for seed in ("1", "2"):
        run = [sys.executable, "-c", SETS]
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        done = subprocess.run(run, env=environment, capture_output=True, text=True, check=True)
        found.add(done.stdout)
    assert len(found) == 1
