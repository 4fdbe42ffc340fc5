"""Write the table of `benchmarks/README.md` from the files in `benchmarks/results/`.

python -m benchmarks.table            write it
python -m benchmarks.table --check    only report whether it agrees with the files
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent
README = FOLDER / "README.md"
BEGIN, END = "<!-- begin: python -m benchmarks.table -->\n", "<!-- end -->\n"

ROWS = {
    "train_step": "training loop of a 0.8M GPT on a CPU",
    "rl_signal": "the quickstart's policy gradient: responses for as much signal as noise",
    "plan_store": "`gptline plan` on a store of 10,000 actions",
    "gpu_ceiling": "bf16 matrix product on a GPU",
    "gpu_train_torch": "124M in bf16 on a GPU, plain engine",
    "gpu_train_deepspeed_zero1": "the same, DeepSpeed with ZeRO 1",
    "gpu_train_torch_compile": "the same, plain engine with torch.compile",
}


def table(results: Path = FOLDER / "results") -> str:
    found = {row["row"]: row for row in (json.loads(path.read_text(encoding="utf-8")) for path in sorted(results.glob("*.json")))}
    lines = ["| row | what | ours | peer | ratio (95 % interval) | notes | hardware, versions, date |", "| --- " * 7 + "|"]
    for name in [*ROWS, *(name for name in found if name not in ROWS)]:
        what = ROWS.get(name, "")
        if name not in found:
            lines.append(f"| `{name}` | {what} | ready to run; no result yet | | | | |")
            continue
        row = found[name]
        ours = f"no result: {row['error']}" if row.get("error") else "" if row["ours"] is None else f"{row['ours']:,.0f} {row['unit']}"
        lines.append(f"| `{name}` | {what} | {ours} | {_peer(row)} | {_ratio(row)} | {'; '.join(_notes(row))} | {_circumstances(row)} |")
    return "\n".join(lines) + "\n"


def with_table(readme: str, new: str) -> str:
    before, rest = readme.split(BEGIN)
    return before + BEGIN + new + END + rest.split(END)[1]


def _peer(row: Mapping[str, Any]) -> str:
    return f"{row['theirs']:,.0f}: {row['peer']}" if row["theirs"] else ""


def _ratio(row: Mapping[str, Any]) -> str:
    if row["ratio"] is None:
        return ""
    low, high = row.get("interval_95", (None, None))
    return f"{row['ratio']:.3f}" + (f" ({low:.3f} to {high:.3f})" if low is not None else "")


def _notes(row: Mapping[str, Any]) -> list[str]:
    notes = []
    if row.get("noisy"):
        notes.append("noisy: the machine was not idle")
    if row.get("peers"):
        notes.append("in CPU seconds " + ", ".join(f"{peer['cpu_ratio']:.3f} of {peer['peer']}" for peer in row["peers"]))
    if row.get("mfu"):
        notes.append(f"MFU {row['mfu']:.1%}")
    if row.get("peak_allocated_gib"):
        notes.append(f"peak {row['peak_allocated_gib']:.1f} GiB")
    if row.get("check"):
        notes.append(f"losses within {row['check']['largest_difference']:.1e} of fp32's")
    if row.get("cosines"):
        found = ", ".join(f"{name.replace('_', ' ')} {each:.2f}" for name, each in row["cosines"].items())
        each_of = f"{row['responses_in_each_half']:,} responses ({row['questions'] // 2} answers if supervised)"
        notes.append(f"cosine of two halves, each of {each_of}: {found}")
    if row.get("actions"):
        notes.append(f"{1 / row['ratio']:.2f} times the time on {row['actions']:,} actions, at most {1 / row['goal']:.1f} is the goal")
    if row.get("copy_bytes_per_s"):
        notes.append(f"copy {row['copy_bytes_per_s'] / 1e9:,.0f} GB/s")
    return notes


def _circumstances(row: Mapping[str, Any]) -> str:
    machine = row["hardware"]
    where = machine.get("gpu") or f"{machine['cpu']}, {machine['cores']} cores"
    threads = f", {row['threads']} thread" + ("s" if row["threads"] > 1 else "") if row.get("threads") else ""
    return f"{where}{threads}; torch {row['versions']['torch']}; {row['date']}"


def main(arguments: list[str]) -> int:
    readme = README.read_text(encoding="utf-8")
    fresh = with_table(readme, table())
    if arguments == ["--check"]:
        if fresh != readme:
            print(f"{README} doesn't show the files in benchmarks/results; run `python -m benchmarks.table`", file=sys.stderr)
        return int(fresh != readme)
    README.write_text(fresh, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
