"""The quickstart's documents, from a library small enough to check by hand, and from the one that runs these tests."""

import importlib.util
import sys
import sysconfig
from pathlib import Path
from types import ModuleType

import pytest

from pipelines.artifacts import Documents

from .conftest import FakeStage, rejects


@pytest.fixture(scope="module")
def python_docs() -> ModuleType:
    spec = importlib.util.spec_from_file_location("python_docs", Path(__file__).parents[3] / "configs" / "python_docs.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["python_docs"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def read_docs(python_docs, data, output, monkeypatch):
    def run(files: dict[str, str], held_out_share: float = 0.0001) -> Documents:
        for name, code in files.items():
            (data / name).parent.mkdir(parents=True, exist_ok=True)
            (data / name).write_text(code)
        monkeypatch.setattr(sysconfig, "get_path", lambda name: str(data))
        config = python_docs.DocsConfig(held_out_share=held_out_share)
        return python_docs.documents(config, FakeStage(output, config.sources(data)))

    return run


def test_a_module_is_one_document_of_signatures_and_docstrings(read_docs):
    code = (
        '"""About."""\nclass Cup:\n    if True:\n        def fill(self, ml=250):\n            """Fill it."""\n    def empty(self): pass\n'
    )
    documents = read_docs({"kitchen/cup.py": code})
    (record,) = documents.records("train")
    assert record == {
        "text": "kitchen.cup\n\nAbout.\n\nkitchen.cup.Cup.fill(self, ml=250)\n\nFill it.",
        "source": "kitchen/cup.py",
        "license": "PSF-2.0",
    }


def test_each_docstring_is_included_once(read_docs):
    assert list(read_docs({"a.py": '"""Same."""', "b.py": '"""Same."""', "c.py": '"""Other."""'}).texts("train")) == [
        "a\n\nSame.",
        "c\n\nOther.",
    ]


def test_every_topic_is_a_training_document(read_docs):
    documents = read_docs(
        {"pydoc_data/topics.py": "topics = {'for': 'The for statement', 'if': 'The if statement'}"}, held_out_share=0.9999
    )
    assert list(documents.texts("train")) == ["The for statement", "The if statement"]


def test_a_file_that_cannot_be_parsed_is_listed(read_docs):
    documents = read_docs({"a.py": '"""A."""', "b.py": "def"})
    assert documents.metadata["records"] == {"read": 2, "bad": 1}
    assert rejects(documents.path) == [{"source": "b.py", "reason": "invalid syntax (<unknown>, line 1)"}]


def test_modules_that_distributions_ship_differently_are_left_out(read_docs):
    files = {f"{folder}/a.py": f'"""{folder}."""' for folder in ("test", "tkinter", "site-packages", "config-3.11-linux", "json")}
    assert list(read_docs(files).texts("train")) == ["json.a\n\njson."]


def test_the_library_of_this_python_gives_some_megabytes_and_holds_out_four_percent(python_docs, data, output):
    config = python_docs.DocsConfig()
    documents = python_docs.documents(config, FakeStage(output, config.sources(data)))
    assert documents.metadata["bytes"] > 1_500_000
    assert documents.metadata["held_out"]["bytes"] > 60_000
    assert 0.03 < documents.metadata["held_out"]["bytes"] / documents.metadata["bytes"] < 0.06
    assert documents.metadata["records"]["bad"] == 0
