from __future__ import annotations

import ast
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pipelines.fingerprint import Code, canonical_dump, differences, flat, key_of

ROOT = Path(__file__).resolve().parents[2]

MODEL = """
import math
import torch.nn.functional as F
from gpt.parts import helper
from gpt import settings_like

LIMIT = 3
UNUSED = 4

def attention(x):
    '''Attend.'''
    return helper(x) + LIMIT  # a comment

def unrelated(x):
    return UNUSED
"""
PARTS = """
def helper(x):
    return deeper(x)

def deeper(x):
    return x * 2

def never(x):
    return x
"""


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    (tmp_path / "gpt").mkdir()
    (tmp_path / "gpt" / "__init__.py").touch()
    write(tmp_path, "model", MODEL)
    write(tmp_path, "parts", PARTS)
    return tmp_path


def write(tree: Path, name: str, text: str) -> None:
    (tree / "gpt" / f"{name}.py").write_text(text)


def leaves(tree: Path, name: str = "attention", module: str = "gpt.model") -> dict[str, str]:
    return Code(tree).leaves([(module, name)])


def test_a_function_reaches_what_it_names_and_what_that_names_and_no_more(tree: Path):
    assert sorted(leaves(tree)) == ["gpt.model:LIMIT", "gpt.model:attention", "gpt.parts:deeper", "gpt.parts:helper"]


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("# a comment", "# another comment"),
        ("'''Attend.'''", "'''Attend to everything.'''"),
        ("return helper(x) + LIMIT", "return (\n        helper(x)\n        + LIMIT\n    )"),
        ("UNUSED = 4", "UNUSED = 5"),
        ("def unrelated(x):", "def unrelated(x, y=1):"),
        ("import math\n", "import math\nimport os\n"),
    ],
)
def test_comments_docstrings_layout_and_code_out_of_reach_change_no_key(tree: Path, old: str, new: str):
    before = leaves(tree)
    assert old in MODEL
    write(tree, "model", MODEL.replace(old, new))
    assert leaves(tree) == before


@pytest.mark.parametrize(
    ("file", "text", "old", "new", "changed"),
    [
        ("model", MODEL, "+ LIMIT", "- LIMIT", "gpt.model:attention"),
        ("model", MODEL, "LIMIT = 3", "LIMIT = 3.0", "gpt.model:LIMIT"),
        ("parts", PARTS, "x * 2", "x * 3", "gpt.parts:deeper"),
    ],
)
def test_an_edit_within_reach_changes_the_one_definition_that_it_is_in(tree: Path, file: str, text: str, old: str, new: str, changed: str):
    before = leaves(tree)
    write(tree, file, text.replace(old, new))
    after = leaves(tree)
    assert [name for name in after if after[name] != before.get(name)] == [changed]


def test_what_an_imported_name_is_bound_to_counts(tree: Path):
    write(tree, "model", "import torch.nn.functional as F\n\ndef attention(x):\n    return F.relu(x)\n")
    before = leaves(tree)
    write(tree, "model", "import numpy as F\n\ndef attention(x):\n    return F.relu(x)\n")
    assert leaves(tree) != before


@pytest.mark.parametrize(
    "body",
    [
        "from gpt import parts\n\ndef attention(x):\n    return parts.helper(x)\n",
        "import gpt.parts\n\ndef attention(x):\n    return gpt.parts.helper(x)\n",
        "import gpt.parts as p\n\ndef attention(x):\n    return p.helper(x)\n",
        "from .parts import helper as h\n\ndef attention(x):\n    return h(x)\n",
        "def attention(x):\n    from gpt.parts import helper\n    return helper(x)\n",
    ],
)
def test_every_way_to_import_is_followed(tree: Path, body: str):
    write(tree, "model", body)
    assert sorted(leaves(tree)) == ["gpt.model:attention", "gpt.parts:deeper", "gpt.parts:helper"]


@pytest.mark.parametrize(
    "body",
    [
        "from gpt import parts\n\ndef attention(x):\n    return getattr(parts, x)()\n",
        "from gpt.parts import *\n\ndef attention(x):\n    return helper(x)\n",
        "from gpt import parts\n\ndef attention(x):\n    return parts.made_at_run_time(x)\n",
    ],
)
def test_what_cannot_be_resolved_counts_the_whole_module(tree: Path, body: str):
    write(tree, "model", body)
    assert "gpt.parts:never" in leaves(tree)


def test_loose_statements_of_a_reached_module_count(tree: Path):
    write(tree, "parts", PARTS + "\nif True:\n    deeper = None\n")
    before = leaves(tree)
    assert "gpt.parts:<module>" in before
    write(tree, "parts", PARTS + "\nif False:\n    deeper = None\n")
    assert leaves(tree) != before


def test_a_protocol_is_an_interface_and_counts_for_nothing(tree: Path):
    text = "from typing import Protocol\n\nclass Rank(Protocol):\n    rank: int\n\ndef attention(rank: Rank):\n    return rank.rank\n"
    write(tree, "model", text)
    assert sorted(leaves(tree)) == ["gpt.model:attention"]


def test_fields_of_a_settings_class_count_by_value_and_its_methods_as_code(tree: Path):
    shutil.copy(ROOT / "gpt" / "settings.py", tree / "gpt" / "settings.py")
    text = "from gpt.settings import Settings\n\nclass C(Settings):\n    a: int = 1\n\n    def twice(self):\n        return 2 * self.a\n"
    write(tree, "model", text)
    before = leaves(tree, "C")
    write(tree, "model", text.replace("a: int = 1", "a: int = 2\n    log_every: int = 10"))
    assert leaves(tree, "C") == before
    write(tree, "model", text.replace("2 * self.a", "3 * self.a"))
    assert leaves(tree, "C") != before


def test_a_users_file_and_its_neighbours_are_followed(tree: Path, tmp_path: Path):
    user = tmp_path / "mine"
    user.mkdir()
    (user / "clean.py").write_text("import words\nfrom gpt.parts import helper\n\ndef clean(x):\n    return helper(words.SHORT)\n")
    (user / "words.py").write_text("SHORT = 3\nLONG = 9\n")
    found = Code(tree, user).leaves([("clean", "clean")])
    assert sorted(found) == ["clean:clean", "gpt.parts:deeper", "gpt.parts:helper", "words:SHORT"]


SPECIMEN = '''
"""Docstring."""
import os
def f(a, /, b: int = 1, *args, c=None, **kw) -> dict[str, int]:
    """Docstring."""
    x = [i async for i in a if i] if False else f"{b!r:>{c}} \\N{BULLET} {1:.2f}" "tail"
    match b:
        case {"k": [1, *_]} | None: return {**kw, "ü": b"\\x00", 'n': 1_000.5, "e": ..., "j": 2j}
    try: pass
    except* OSError: raise
    with open(x) as (y, z), os.scandir(): lambda q, *r: (yield q)
class G(metaclass=type): a: int; b = c = 0
'''


def test_the_dump_of_one_source_is_the_same_on_every_python():
    script = "import ast,hashlib,sys;from pipelines.fingerprint import canonical_dump as d;"
    script += "print(hashlib.sha256(d(ast.parse(sys.stdin.read())).encode()).hexdigest())"
    here = subprocess.run([sys.executable, "-c", script], input=SPECIMEN, capture_output=True, text=True, cwd=ROOT, check=True).stdout
    assert here.strip() == "efd4f98743c9491c361c49e57cd7e3d4c211f6d1aba647b02beec9afb52519cb"
    for minor in (11, 12, 13):
        python = shutil.which(f"python3.{minor}")
        if python and subprocess.run([python, "--version"], capture_output=True).returncode == 0:
            other = subprocess.run([python, "-c", script], input=SPECIMEN, capture_output=True, text=True, cwd=ROOT, check=True).stdout
            assert other == here


def test_a_dump_has_no_positions_and_no_bare_strings():
    assert canonical_dump(ast.parse("'text'\nx = 1")) == "Module(body=[Assign(targets=[Name(id=str:'x')],value=Constant(value=int:1))])"


def test_values_of_different_types_give_different_keys():
    assert len({key_of({"config.a": value}) for value in (1, 1.0, "1", True, None, [1], "true")}) == 7


def test_flat_names_every_leaf():
    assert dict(flat({"a": [1, {"b": None}], "c": {}}, "config")) == {"config.a.0": 1, "config.a.1.b": None, "config.c": {}}


def test_differences_are_sentences_with_what_a_person_changed_first():
    old = {"config.lr": 1e-3, "input.tokens.0": "a" * 64, "code.gpt.model:GPT": "1", "source.a.txt": "x", "code.gpt.model:gone": "5"}
    new = {"config.lr": 3e-4, "input.tokens.0": "b" * 64, "code.gpt.model:GPT": "2", "source.a.txt": "y", "source.b.txt": "z"}
    assert differences(old, new) == [
        "lr: 0.001 -> 0.0003",
        "source a.txt changed",
        "source b.txt new",
        f"input tokens: {'a' * 12} -> {'b' * 12}",
        "code of gpt.model:GPT changed",
        "code of gpt.model:gone gone",
    ]
