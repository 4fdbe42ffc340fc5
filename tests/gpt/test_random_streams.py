from __future__ import annotations

import re
from pathlib import Path

from gpt.random_streams import stream_seed

ROOT = Path(__file__).resolve().parents[2]


def test_streams_with_different_names_have_different_seeds_and_equal_names_have_equal_seeds():
    streams = [
        (1, "dropout", 3, 0, 0),
        (1, "dropout", 3, 0, 1),
        (1, "dropout", 30, 0),
        (1, "sft dropout", 3, 0, 0),
        (2, "dropout", 3, 0, 0),
    ]
    seeds = [stream_seed(*stream) for stream in streams]
    assert len(set(seeds)) == len(streams)
    assert seeds == [stream_seed(*stream) for stream in streams]
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_no_two_training_loops_share_the_name_of_a_stream():
    names: dict[str, set[str]] = {}
    for loop, pattern in {"pretrain": "pretrain.py", "sft": "sft.py", "reward": "reward.py", "rl": "rl/*.py"}.items():
        code = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "gpt").glob(pattern))
        names[loop] = set(re.findall(r'(?:stream_seed\(seed, |ShuffledRows\(.*name=)"([^"]+)"', code))
    assert names["sft"] == {"sft", "sft dropout"}
    assert names["rl"] == {"rl", "sample", "update"}
    assert len(set.union(*names.values())) == sum(map(len, names.values()))
