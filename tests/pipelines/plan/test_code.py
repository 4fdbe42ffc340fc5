from __future__ import annotations

import ast
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pipelines.plan.code import PACKAGES, Code
from pipelines.plan.key import differences, flat, key_of
from pipelines.plan.syntax import canonical_dump

ROOT = Path(__file__).resolve().parents[3]

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


def test_a_function_reaches_what_it_names_and_what_that_names_and_nothing_else(tree: Path):
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
def test_comments_docstrings_layout_and_unreached_code_are_not_in_the_key(tree: Path, old: str, new: str):
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
def test_an_edit_of_reached_code_changes_only_its_own_hash(tree: Path, file: str, text: str, old: str, new: str, changed: str):
    before = leaves(tree)
    write(tree, file, text.replace(old, new))
    after = leaves(tree)
    assert [name for name in after if after[name] != before.get(name)] == [changed]


def test_the_module_behind_an_imported_name_is_in_the_hash(tree: Path):
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
def test_a_name_that_cannot_be_resolved_adds_the_whole_module(tree: Path, body: str):
    write(tree, "model", body)
    assert "gpt.parts:never" in leaves(tree)


def test_top_level_statements_of_a_reached_module_are_in_the_key(tree: Path):
    write(tree, "parts", PARTS + "\nif True:\n    deeper = None\n")
    before = leaves(tree)
    assert "gpt.parts:<module>" in before
    write(tree, "parts", PARTS + "\nif False:\n    deeper = None\n")
    assert leaves(tree) != before


def test_a_protocol_class_is_not_in_the_key(tree: Path):
    text = "from typing import Protocol\n\nclass Rank(Protocol):\n    rank: int\n\ndef attention(rank: Rank):\n    return rank.rank\n"
    write(tree, "model", text)
    assert sorted(leaves(tree)) == ["gpt.model:attention"]


KIND = """
from typing import ClassVar
from gpt.settings import Settings
from gpt.parts import Base, Inner, Made, Shape

class C(Base):
    a: int = 1
    inner: Inner = Inner()
    SCALE: ClassVar[int] = 2
    _hidden: int = 3

    def twice(self):
        return self.SCALE * self.a

def attention(config: C):
    return Made(width=config.a), Shape.model_validate({}), config.twice()
"""
SETTINGS = """
from gpt.settings import Settings

class Base(Settings):
    b: int = 1

class Inner(Settings):
    c: int = 1

class Shape(Settings):
    dropout: float = 0.0

class Ground(Settings):
    ground: int = 1

class Made(Ground):
    made: int = 1
"""


@pytest.fixture
def kind(tree: Path) -> Path:
    shutil.copy(ROOT / "gpt" / "settings.py", tree / "gpt" / "settings.py")
    write(tree, "model", KIND)
    write(tree, "parts", SETTINGS)
    return tree


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("a: int = 1", "a: int = 2\n    log_every: int = 10"),
        ("b: int = 1", "b: int = 2"),
        ("c: int = 1", "c: int = 2\n    log_every: int = 10"),
        ("Inner = Inner()", "Inner = Inner(c=3)"),
    ],
    ids=["its own field", "a base class's field", "a field of a field's type", "a default that is built"],
)
def test_fields_of_the_kinds_config_are_in_the_key_by_value_not_as_code(kind: Path, old: str, new: str):
    before = leaves(kind)
    write(kind, "model", KIND.replace(old, new))
    write(kind, "parts", SETTINGS.replace(old, new))
    assert leaves(kind) == before


@pytest.mark.parametrize(
    ("old", "new", "changed"),
    [
        ("self.SCALE * self.a", "self.a", "gpt.model:C"),
        ("ClassVar[int] = 2", "ClassVar[int] = 3", "gpt.model:C"),
        ("_hidden: int = 3", "_hidden: int = 4", "gpt.model:C"),
        ("dropout: float = 0.0", "dropout: float = 0.1", "gpt.parts:Shape"),
        ("made: int = 1", "made: int = 2", "gpt.parts:Made"),
        ("ground: int = 1", "ground: int = 2", "gpt.parts:Ground"),
    ],
)
def test_settings_outside_the_configs_dump_are_in_the_key_as_code(kind: Path, old: str, new: str, changed: str):
    before = leaves(kind)
    write(kind, "model", KIND.replace(old, new))
    write(kind, "parts", SETTINGS.replace(old, new))
    after = leaves(kind)
    assert [name for name in after if after[name] != before.get(name)] == [changed]


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("return Made", "return Base(), Made"),
        ("def twice(self):", "@classmethod\n    def small(cls):\n        return cls()\n\n    def twice(self):"),
    ],
)
def test_settings_that_the_code_builds_itself_are_in_the_key_as_code_even_if_the_config_has_them(kind: Path, old: str, new: str):
    write(kind, "model", KIND.replace(old, new))
    before = leaves(kind)
    write(kind, "parts", SETTINGS.replace("b: int = 1", "b: int = 2"))
    assert leaves(kind)["gpt.parts:Base"] != before["gpt.parts:Base"]


@pytest.mark.parametrize(
    ("file", "old", "new", "changes"),
    [
        ("gpt/settings.py", "class TrainSettings(Settings):\n", "class TrainSettings(Settings):\n    noise: Operational[int] = 1\n", False),
        ("gpt/settings.py", "    preset: str\n", "    preset: str\n    noise: Operational[int] = 1\n", False),
        ("pipelines/stages/pretrain.py", "    pass\n", "    noise: Operational[int] = 1\n", False),
        ("gpt/settings.py", "dropout: Share = 0.0", "dropout: Share = 0.1", True),
        ("gpt/settings.py", '"gpt2-nano": ModelShape(n_layer=2', '"gpt2-nano": ModelShape(n_layer=3', True),
    ],
)
def test_pretrains_key_ignores_operational_settings_and_includes_the_models_shape(
    tmp_path: Path, file: str, old: str, new: str, changes: bool
):
    for package in PACKAGES:
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    entry = [("pipelines.stages.pretrain", "pretrain")]
    before = Code(tmp_path).leaves(entry)
    text = (tmp_path / file).read_text()
    assert old in text
    (tmp_path / file).write_text(text.replace(old, new, 1))
    assert (Code(tmp_path).leaves(entry) != before) == changes


def users(tmp_path: Path, files: dict[str, str]) -> Path:
    """Write files into a user's folder; the name "helpers/text" is helpers/text.py."""
    folder = tmp_path / "mine"
    for name, text in files.items():
        path = folder / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


def test_imports_between_a_users_files_are_followed(tree: Path, tmp_path: Path):
    clean = "import words\nfrom gpt.parts import helper\n\ndef clean(x):\n    return helper(words.SHORT)\n"
    user = users(tmp_path, {"clean": clean, "words": "SHORT = 3\nLONG = 9\n"})
    found = Code(tree, user).leaves([("clean", "clean")])
    assert sorted(found) == ["clean:clean", "gpt.parts:deeper", "gpt.parts:helper", "words:SHORT"]


@pytest.mark.parametrize(
    ("clean", "neighbour", "also"),
    [
        ("try:\n    from words import f\nexcept ImportError:\n    raise\n", "words", ["clean:<module>"]),
        ("try:\n    from fast import f\nexcept ImportError:\n    from words import f\n", "words", ["clean:<module>"]),
        ("from helpers.text import f\n", "helpers/text", []),
        ("import helpers.text\nf = helpers.text.f\n", "helpers/text", ["clean:f"]),
        ("from star import *\n", "words", ["clean:<module>"]),
        ("from star import f\n", "words", []),
        ("from words import f\nf = staticmethod(f)\n", "words", ["clean:f"]),
    ],
    ids=["a try", "its except", "a folder", "a folder by name", "a re-exporting star", "re-exported", "wrapped under its own name"],
)
def test_indirect_imports_of_a_users_file_are_followed(tree: Path, tmp_path: Path, clean: str, neighbour: str, also: list[str]):
    text = f"{clean}\ndef clean(x):\n    return f(x)\n"
    user = users(tmp_path, {"clean": text, "star": "from words import f\n", neighbour: "def f(x):\n    return x\n"})
    module = neighbour.replace("/", ".")
    assert sorted(Code(tree, user).leaves([("clean", "clean")])) == sorted(["clean:clean", f"{module}:f", *also])


def test_the_else_branch_of_type_checking_is_followed_and_its_body_is_not(tree: Path, tmp_path: Path):
    text = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from gpt.parts import never\nelse:\n    LIMIT = 1\n"
    user = users(tmp_path, {"clean": text + "\ndef clean(x):\n    return never, LIMIT\n"})
    assert sorted(Code(tree, user).leaves([("clean", "clean")])) == ["clean:LIMIT", "clean:clean"]


def test_an_entry_that_does_not_exist_is_refused(tree: Path, tmp_path: Path):
    user = users(tmp_path, {"clean.v2": "def clean(x): ...\n", "words": "def clean(x): ...\n", "broken": "def clean(x) ...\n"})
    with pytest.raises(ValueError, match=r"the code of clean\.v2:clean can't be found: .*mine has no module.*can't have a dot before \.py"):
        Code(tree, user).leaves([("clean.v2", "clean")])
    with pytest.raises(ValueError, match=r"the code of words:gone can't be found: .*words\.py defines no 'gone'"):
        Code(tree, user).leaves([("words", "gone")])
    with pytest.raises(ValueError, match=r"broken\.py can't be read as Python: .*line 1"):
        Code(tree, user).leaves([("broken", "clean")])


def test_the_files_of_an_entry_are_all_user_files_that_importing_it_needs(tree: Path, tmp_path: Path):
    files = {
        "clean": "import json\nimport extra\n\ndef clean(x): ...\n\ndef other(x):\n    from late import f\n    return extra.f(x)\n",
        "extra": "try:\n    import package.part\nexcept ImportError:\n    pass\n",
        "folder/inner": "from gpt.parts import helper as f\n",
        "late": "from folder.inner import f\n",
        "package/__init__": "",
        "package/part": "from . import sibling\n",
        "package/sibling": "",
    }
    user = users(tmp_path, files | {"unused": "", "folder/unused": ""})
    found = [path.relative_to(user).as_posix() for path in Code(tree, user).files([("clean", "clean")])]
    assert found == [f"{name}.py" for name in files]


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
    script = "import ast,hashlib,sys;from pipelines.plan.syntax import canonical_dump as d;"
    script += "print(hashlib.sha256(d(ast.parse(sys.stdin.read())).encode()).hexdigest())"
    here = subprocess.run([sys.executable, "-c", script], input=SPECIMEN, capture_output=True, text=True, cwd=ROOT, check=True).stdout
    assert here.strip() == "efd4f98743c9491c361c49e57cd7e3d4c211f6d1aba647b02beec9afb52519cb"
    for minor in (11, 12, 13):
        python = shutil.which(f"python3.{minor}")
        if python and subprocess.run([python, "--version"], capture_output=True).returncode == 0:
            other = subprocess.run([python, "-c", script], input=SPECIMEN, capture_output=True, text=True, cwd=ROOT, check=True).stdout
            assert other == here


def test_a_dump_leaves_out_positions_and_bare_strings():
    assert canonical_dump(ast.parse("'text'\nx = 1")) == "Module(body=[Assign(targets=[Name(id=str:'x')],value=Constant(value=int:1))])"


def test_values_of_different_types_give_different_keys():
    assert len({key_of({"config.a": value}) for value in (1, 1.0, "1", True, None, [1], "true")}) == 7


def test_flat_names_every_leaf():
    assert dict(flat({"a": [1, {"b": None}], "c": {}}, "config")) == {"config.a.0": 1, "config.a.1.b": None, "config.c": {}}


def test_differences_begin_with_what_a_person_changed():
    old = {"config.lr": 1e-3, "input.tokens.0": "a" * 64, "code.gpt.model:GPT": "1", "source.a.txt": "x", "code.gpt.model:gone": "5"}
    new = {"config.lr": 3e-4, "input.tokens.0": "b" * 64, "code.gpt.model:GPT": "2", "source.a.txt": "y", "source.b.txt": "z"}
    assert differences(old, new) == [
        "lr: 0.001 -> 0.0003",
        "source a.txt changed",
        "source b.txt is new",
        f"input tokens: {'a' * 12} -> {'b' * 12}",
        "code of gpt.model:GPT changed",
        "code of gpt.model:gone is gone",
    ]


@pytest.mark.parametrize(
    "body",
    [
        "    if x == 0:\n        return 0\n" + "".join(f"    elif x == {n}:\n        return {n}\n" for n in range(1, 251)),
        "    return x" + ".a()" * 600 + "\n",
        "    return " + " + ".join(["x"] * 600) + "\n",
    ],
    ids=["an elif chain of 250", "600 chained calls", "a sum of 600"],
)
def test_deeply_nested_generated_code_is_hashed(tree: Path, body: str):
    write(tree, "model", f"def attention(x):\n{body}")
    before = leaves(tree)
    write(tree, "model", f"def attention(x):\n    x += 1\n{body}")
    assert leaves(tree) != before


def test_code_too_deep_for_pythons_parser_is_refused(tree: Path):
    write(tree, "model", "def attention(x):\n    return x" + ".a()" * 20_000 + "\n")
    with pytest.raises(ValueError, match=r"model\.py can't be read as Python: "):
        leaves(tree)
