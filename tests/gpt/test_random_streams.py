from __future__ import annotations

import re
from pathlib import Path

from gpt.random_streams import stream_seed

ROOT = Path(__file__).resolve().parents[2]


def test_streams_of_other_names_or_places_have_other_seeds_and_the_same_one_has_the_same():
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


def test_no_two_training_loops_draw_from_a_stream_of_one_name():
    of_loop = {}
    for loop in ("pretrain", "sft", "reward", "rl"):
        code = (ROOT / "gpt" / f"{loop}.py").read_text(encoding="utf-8")
        of_loop[loop] = set(re.findall(r'(?:stream_seed\(seed, |ShuffledRows\(.*name=)"([^"]+)"', code))
    assert of_loop["sft"] == {"sft", "sft dropout"}
    assert len(set.union(*of_loop.values())) == sum(map(len, of_loop.values()))
