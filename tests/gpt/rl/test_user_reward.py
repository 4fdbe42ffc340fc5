from __future__ import annotations

import importlib.util
import math
import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from gpt.rl import user_reward
from gpt.rl.scoring import Rollout, Scores
from gpt.rl.user_reward import FunctionScorer

CPU = torch.device("cpu")
PROMPT = [{"role": "user", "content": "What is 2 + 2?"}]
FAULTY = """import ctypes, json, os, re, time
class Mute(Exception):
    def __str__(self): raise ValueError
def score(prompt, response, record):
    if response == "x": {body}
    return 7
"""
HOLDS_THE_GIL = "re.match('(a*)*b', 'a' * 40)"
LIMITS: dict[str, Any] = dict(max_failures=100, timeout_s=20.0, memory_gib=1.0)


def rollouts(*texts: str, **fields: Any) -> list[Rollout]:
    record = {"prompt": PROMPT, "reference": "4", "source": "test", **fields}
    return [Rollout(record, [1], [2], text) for text in texts]


@pytest.fixture
def load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., ModuleType]:
    """Load a user's file as a stage does."""

    def module_of(code: str) -> ModuleType:
        file = tmp_path / "reward.py"
        file.write_text(code)
        spec = importlib.util.spec_from_file_location("gptline_user_reward", file)
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, "gptline_user_reward", module)
        spec.loader.exec_module(module)
        return module

    return module_of


@pytest.fixture
def score(load: Callable[..., ModuleType]) -> Callable[..., Scores]:
    """`score(code, texts, timeout_s=0.5)`: the scores of the code's function `score`, from a scorer that was sent to a rank."""

    def scored(code: str, *texts: str, **changes: Any) -> Scores:
        scorer = pickle.loads(pickle.dumps(FunctionScorer.of(load(code).score, **{**LIMITS, **changes})))
        scorer.open(CPU)
        return scorer.scores(rollouts(*texts))

    return scored


def is_alive(pid: int) -> bool:
    """Whether the process runs; False for a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until(true: Callable[[], bool]) -> bool:
    deadline_s = time.monotonic() + 120
    while not true() and time.monotonic() < deadline_s:
        time.sleep(0.01)
    return true()


def test_the_function_gets_prompt_response_and_the_whole_record(load):
    code = "def score(prompt, response, record): return len(prompt[0]['content'] + response) + int(record['reference']) + record['n']"
    scorer = FunctionScorer.of(load(code).score, **LIMITS)
    scorer.open(CPU)
    # "What is 2 + 2?" has 14 characters, the reference is 4, the field n is 100.
    found = scorer.scores(rollouts("", "ab", "\u00e9\ud800\n", n=100))
    assert found.scores.tolist() == [118.0, 120.0, 121.0]
    assert list(found.failures.values()) == []


@pytest.mark.parametrize(
    ("returned", "expected"),
    [
        ("3", 3.0),
        ("True", 1.0),
        ("-0.25", -0.25),
        ("__import__('fractions').Fraction(1, 4)", 0.25),
        ("__import__('numpy').float32(0.5)", 0.5),
    ],
)
def test_any_finite_python_number_is_a_score(score, returned, expected):
    assert score(f"def score(prompt, response, record): return {returned}", "a").scores.tolist() == [expected]


@pytest.mark.parametrize(
    ("returned", "shown"),
    [
        ("float('nan')", "nan"),
        ("float('inf')", "inf"),
        ("None", "None"),
        ("'0.5'", "'0.5'"),
        ("[1.0]", "[1.0]"),
        ("10 ** 400", "10000000000000"),
        ("1j", "1j"),
    ],
)
def test_anything_but_a_finite_number_is_a_failure(score, returned, shown):
    found = score(f"def score(prompt, response, record): return {returned}", "a")
    assert found.scores.tolist() == pytest.approx([math.nan], nan_ok=True)
    [failure] = found.failures.values()
    assert failure.startswith(f"score() of reward.py on 'a': expected a finite number, found {shown}")


def test_a_function_that_raises_on_every_second_response_fails_only_on_those_and_its_line_is_named(score):
    code = "def score(prompt, response, record):\n    n = int(response)\n    return n / (1 - n % 2)\n"
    found = score(code, "0", "1", "2", "3")
    assert found.scores.tolist() == pytest.approx([0.0, math.nan, 2.0, math.nan], nan_ok=True)
    assert list(found.failures.values()) == [
        f"score() of reward.py on '{n}': ZeroDivisionError: division by zero (reward.py, line 3)" for n in (1, 3)
    ]


def test_a_function_with_other_parameters_fails_on_everything(score):
    [failure] = score("def score(response): return 1", "a").failures.values()
    assert failure == "score() of reward.py on 'a': TypeError: score() takes 1 positional argument but 3 were given"


@pytest.mark.parametrize(
    ("body", "failure"),
    [
        ("raise SystemExit(3)", "SystemExit: 3 (reward.py, line 5)"),
        ("raise KeyboardInterrupt", "KeyboardInterrupt:  (reward.py, line 5)"),
        ("raise Mute", "Mute: an exception whose message cannot be read (reward.py, line 5)"),
        ("score(prompt, response, record)", "RecursionError: maximum recursion depth exceeded (reward.py, line 5)"),
        ("json.loads(response)", "JSONDecodeError: Expecting value: line 1 column 1 (char 0) (reward.py, line 5)"),
        ("bytearray(2 << 30)", "MemoryError:  (reward.py, line 5)"),
        ("os._exit(3)", "ended its process with exit status 3"),
        ("os._exit(0)", "ended its process with exit status 0"),
        ("os.kill(os.getpid(), 11)", "ended its process by SIGSEGV"),
        ("ctypes.string_at(0)", "ended its process by SIGSEGV"),
        ("os.closerange(3, 100); time.sleep(60)", "closed the connection to its rank"),
    ],
)
def test_whatever_way_a_call_fails_the_next_one_is_scored(score, body, failure):
    found = score(FAULTY.format(body=body), "x", "ok")
    assert found.scores.tolist() == pytest.approx([math.nan, 7.0], nan_ok=True)
    assert list(found.failures.values()) == [f"score() of reward.py on 'x': {failure}"]


def test_a_process_that_ends_between_two_calls_fails_only_the_next_one(load):
    scorer = FunctionScorer.of(load("import os\ndef score(prompt, response, record): return os.getpid()").score, **LIMITS)
    scorer.open(CPU)
    [pid] = scorer.scores(rollouts("a")).scores.tolist()
    os.kill(int(pid), signal.SIGKILL)
    assert wait_until(lambda: not is_alive(int(pid)))
    found = scorer.scores(rollouts("a", "b"))
    assert list(found.failures.values()) == ["score() of reward.py on 'a': ended its process by SIGKILL"]
    assert found.scores[1].isfinite()
    assert found.scores[1] != pid


@pytest.mark.parametrize("body", ["time.sleep(60)", "[0 for _ in iter(int, 1)]", HOLDS_THE_GIL])
def test_a_call_that_hangs_is_ended_and_the_next_one_is_scored(score, body):
    found = score(FAULTY.format(body=body), "x", "ok", timeout_s=2)
    assert found.scores.tolist() == pytest.approx([math.nan, 7.0], nan_ok=True)
    assert list(found.failures.values()) == ["score() of reward.py on 'x': did not return within reward_timeout_s = 2 s"]


def test_the_memory_limit_covers_the_whole_process(score):
    # Each call keeps 300 MiB. Three fit into 1 GiB, a fourth does not.
    code = "kept = []\ndef score(prompt, response, record):\n    kept.append(bytearray(300 << 20))\n    return len(kept)"
    found = score(code, *"abcd")
    assert found.scores.tolist() == pytest.approx([1.0, 2.0, 3.0, math.nan], nan_ok=True)
    assert list(found.failures.values()) == ["score() of reward.py on 'd': MemoryError:  (reward.py, line 3)"]


def test_after_one_failure_too_many_the_rest_is_not_tried(score, tmp_path):
    # With 1 allowed, the second failure is one too many: of the 5 responses the last 2 are never tried.
    code = f"def score(prompt, response, record):\n    open({str(tmp_path / 'calls')!r}, 'a').write(response)\n    return int(response)"
    found = score(code, "1", "x", "y", "2", "3", max_failures=1)
    assert (tmp_path / "calls").read_text() == "1xy"
    assert found.scores.tolist() == pytest.approx([1.0, math.nan, math.nan, math.nan, math.nan], nan_ok=True)
    assert list(found.failures.values())[2:] == ["not tried after 2 failures", "not tried after 3 failures"]


def test_the_functions_input_and_output_do_not_interfere_with_its_replies(score, capfd):
    code = (
        "import os, subprocess, sys\n"
        "print('{\"score\": 9}')\n"
        "def score(prompt, response, record):\n"
        "    print('{\"score\": 9}', flush=True)\n"
        "    os.write(1, b'by hand')\n"
        "    subprocess.run(['echo', 'from below'])\n"
        "    return len(sys.stdin.read())\n"
    )
    reading, writing = os.pipe()
    os.write(writing, b"typed")
    os.close(writing)
    stdin = os.dup(0)
    os.dup2(reading, 0)
    try:
        assert score(code, "a", "b").scores.tolist() == [0.0, 0.0]
    finally:
        os.dup2(stdin, 0)
        os.close(stdin)
        os.close(reading)
    out, err = capfd.readouterr()
    assert out == '{"score": 9}\n'  # of the import in this very process
    assert "by hand" in err
    assert "from below" in err


def test_hashes_are_the_same_in_every_process(score):
    code = "import os\ndef score(prompt, response, record):\n    if response == 'end': os._exit(1)\n    return hash('a') % 1000"
    first, _, again = score(code, "a", "end", "a").scores.tolist()
    assert first == again == score(code, "a").scores.tolist()[0]


def test_the_process_loads_no_torch_and_can_import_our_packages_and_the_files_neighbours(load, tmp_path, monkeypatch):
    (tmp_path / "neighbour_of_reward.py").write_text("BONUS = 5")
    (tmp_path / "calendar.py").write_text("TUESDAY = 1000")
    path = sys.path.copy()
    monkeypatch.setattr(sys, "path", [*path, str(tmp_path)])
    module = load(
        "import calendar, sys\nfrom gpt.settings import PRESETS\nfrom neighbour_of_reward import BONUS\n"
        "def score(prompt, response, record):\n"
        "    return BONUS + 10 * PRESETS['gpt2-nano'].n_layer + 100 * calendar.TUESDAY + 1000 * ('torch' in sys.modules)"
    )
    for rank_path in (path, [str(tmp_path), *path]):
        monkeypatch.setattr(sys, "path", rank_path)
        scorer = FunctionScorer.of(module.score, **LIMITS)
        scorer.open(CPU)
        assert scorer.scores(rollouts("a")).scores.tolist() == [125.0]


def test_a_decorated_function_is_called_with_its_decorator(score):
    code = (
        "import functools\n"
        "def doubled(function):\n"
        "    @functools.wraps(function)\n"
        "    def twice(*arguments): return 2 * function(*arguments)\n"
        "    return twice\n"
        "@doubled\n"
        "def score(prompt, response, record): return 3\n"
    )
    assert score(code, "a").scores.tolist() == [6.0]


@pytest.mark.parametrize(
    ("first_line", "failure"),
    [
        ("raise OSError('no licence')", r"OSError: no licence \(reward.py, line 1\)"),
        ("import os; os._exit(4)", "ended its process with exit status 4"),
        ("kept = bytearray(3 << 30)", r"MemoryError:  \(reward.py, line 1\)"),
        ("while True: pass", "did not return within 1 s"),
    ],
)
def test_a_file_that_cannot_be_imported_on_the_rank_is_reported_with_its_line(load, monkeypatch, first_line, failure):
    if first_line.startswith("while"):
        monkeypatch.setattr(user_reward, "START_LIMIT_S", 1.0)
    module = load("def score(prompt, response, record): return 1")
    Path(module.__file__).write_text(f"{first_line}\ndef score(prompt, response, record): return 1")
    expected = rf"reward.py cannot be imported in its own process with reward_memory_gib = 1: {failure}; fix the file, or "
    with pytest.raises(ValueError, match=expected):
        FunctionScorer.of(module.score, **LIMITS).open(CPU)


def test_the_process_and_everything_it_started_end_with_the_scorer(load, tmp_path):
    code = (
        "import os, subprocess\n"
        "def score(prompt, response, record):\n"
        "    started = subprocess.Popen(['sleep', '1000'])\n"
        f"    open({str(tmp_path / 'pids')!r}, 'w').write(f'{{os.getpid()}} {{started.pid}}')\n"
        "    return 1"
    )
    scorer = FunctionScorer.of(load(code).score, **LIMITS)
    scorer.open(CPU)
    scorer.scores(rollouts("a"))
    own, started = map(int, (tmp_path / "pids").read_text().split())
    assert is_alive(own)
    assert is_alive(started)
    del scorer
    assert not is_alive(own)
    assert wait_until(lambda: not is_alive(started))


@pytest.mark.parametrize("body", [HOLDS_THE_GIL, "return 1"])
def test_a_rank_that_is_killed_leaves_no_process_behind(tmp_path, body):
    file = tmp_path / "pid"
    (tmp_path / "reward.py").write_text(
        f"import os, re\ndef score(prompt, response, record):\n    open({str(file)!r}, 'w').write(f'{{os.getpid()}}.')\n    {body}"
    )
    rank = (
        "import sys, time, torch\n"
        "sys.path.append(sys.argv[1])\n"
        "import reward\n"
        "from gpt.rl.scoring import Rollout\n"
        "from gpt.rl.user_reward import FunctionScorer\n"
        f"scorer = FunctionScorer.of(reward.score, **{ {**LIMITS, 'timeout_s': 1000.0}!r})\n"
        "scorer.open(torch.device('cpu'))\n"
        "scorer.scores([Rollout({'prompt': []}, [1], [2], 'a')])\n"
        "time.sleep(1000)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", rank, str(tmp_path)])
    try:
        assert wait_until(lambda: file.exists() and file.read_text().endswith("."))
        child = int(file.read_text()[:-1])
        assert is_alive(child)
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    assert wait_until(lambda: not is_alive(child))
