"""For each stage: reuse, run, resume, wait or blocked, and why, in words. Reads the store and changes nothing."""

from __future__ import annotations

import difflib
import functools
import importlib.metadata
import json
import platform
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from cluster.checkpoint import attempts, newest_checkpoint
from gpt.hf_folder import checkpoint_files
from gpt.settings import TrainSettings
from pipelines.plan.code import Code, differences, flat, key_of
from pipelines.plan.config import Fault
from pipelines.plan.graph import ARTIFACTS, BARE_DIGEST, DIGEST, HF_FOLDER, IMPORTS, MODEL_ALIAS, RUN_STAGE, Graph, Stage
from pipelines.store.journal import read_journal
from pipelines.store.lease import Watch, describe
from pipelines.store.store import Action, Store

Word = Literal["reuse", "run", "resume", "wait", "blocked"]

TRACKED = ("torch", "deepspeed", "ray", "mlflow", "tokenizers", "safetensors", "numpy", "datasets")


@dataclass(frozen=True)
class Decision:
    """What will be done about one stage."""

    stage: str
    word: Word
    reason: str
    key: str | None = None
    """None where an input is not made yet, so that the key can't be known."""
    leaves: dict[str, Any] = field(default_factory=dict)
    inputs: dict[str, list[str]] = field(default_factory=dict)
    action: Action | None = None
    """What is reused."""
    output: str | None = None
    series: int = 1
    forced: bool = False
    expected_s: float | None = None
    """Seconds that it took last time; None when nobody knows."""
    notes: tuple[str, ...] = ()
    closed: str | None = None
    """Why nothing may read what is reused: a gate of its stage."""


class Planner:
    """Decides stage by stage, given the digests that the stages above have come to."""

    def __init__(
        self,
        graph: Graph,
        store: Store,
        code_root: Path,
        *,
        user_folders: Mapping[str, Path] = MappingProxyType({}),
        fresh: Collection[str] = (),
        given: Mapping[str, str] = MappingProxyType({}),
        until: str | None = None,
        inline: bool = False,
    ) -> None:
        """`code_root` holds our packages, `user_folders` a stage's user code where that is not beside the TOML: in a snapshot.

        `fresh`, `given` (stage to reference) and `until` are the command line's. ConfigError tells all that is wrong with them.
        """
        self.graph = graph
        self.store = store
        self.fresh = fresh
        self.inline = inline
        faults = [
            Fault(f"{option} {name}", f"there is no such stage; there are {', '.join(graph.stages)}")
            for option, names in (("--fresh", fresh), ("--until", [until] if until else []), ("--use", given))
            for name in names
            if name not in graph.stages
        ]
        self.given, found = self._resolve_given({name: each for name, each in given.items() if name in graph.stages})
        self._external, more = self._resolve_external()
        if faults := [*faults, *found, *more]:
            raise graph.loaded.error(faults)
        self.chosen = graph.needed([until] if until else graph.last(), given=self.given)
        self._code_root = code_root
        self._user_folders = user_folders
        readers: dict[Path | None, Code] = {}
        # all of it now: an edit after this moment is the next run's
        self._code = {stage.name: self._read_code(stage, readers) for stage in graph.stages.values()}

    def plan(self) -> list[Decision]:
        """The chosen stages, as things stand now."""
        decisions: dict[str, Decision] = {}
        for stage in self.graph.stages.values():
            if stage.name not in self.chosen:
                continue
            closed = [each for name in self.upstream(stage) if (each := decisions[name].closed)]
            pending = [name for name in self.upstream(stage) if decisions[name].output is None]
            if closed:
                decisions[stage.name] = Decision(stage.name, "blocked", closed[0])
            elif pending:
                blocked = [name for name in pending if decisions[name].word == "blocked"]
                decisions[stage.name] = self._not_yet(stage, decisions[(blocked or pending)[0]])
            else:
                decisions[stage.name] = self.decide(stage, {name: each.output for name, each in decisions.items() if each.output})
        return list(decisions.values())

    def upstream(self, stage: Stage) -> list[str]:
        """What must be there before a stage can be decided: nothing where its output was given."""
        return [] if stage.name in self.given else stage.upstream()

    def decide(self, stage: Stage, outputs: dict[str, str], *, held: bool = False) -> Decision:
        """One stage, all of whose inputs are made. `held`: the caller holds its lease, so there is nobody to wait for."""
        if stage.name in self.given:
            digest = self.given[stage.name]
            return Decision(stage.name, "reuse", f"--use names artifact {digest[:12]}", output=digest, expected_s=0.0)
        inputs = {name: [self.digest(each, outputs) for each in references] for name, references in stage.inputs.items()}
        try:
            leaves = self.leaves(stage, inputs)
        except OSError as error:
            gone = [source.name for source in stage.sources if str(source.path) == str(error.filename)]
            if not gone:
                raise  # the store's own
            return Decision(stage.name, "blocked", f"its source {gone[0]} can't be read ({error.strerror}); put it back")
        key = key_of(leaves)
        actions = self.store.actions(key)
        common: dict[str, Any] = {"key": key, "leaves": leaves, "inputs": inputs, "expected_s": self._seconds(stage)}
        last = actions[-1].number if actions else 0
        newest_series = max(self._series(key), default=0)
        if stage.name in self.fresh:
            return Decision(stage.name, "run", "asked for afresh", series=max(newest_series, last) + 1, forced=True, **common)
        rerun_interrupted = 0 < last < newest_series
        damage = None
        for action in reversed(actions if not rerun_interrupted else []):
            damage = self.store.intact(action.output)
            if damage is None:
                common["expected_s"] = 0.0
                closed = closed_gate(stage, action)
                notes = (*_notes(action, stage), *([closed] if closed else []))
                reason = f"made by run {action.run}"
                return Decision(stage.name, "reuse", reason, action=action, output=action.output, notes=notes, closed=closed, **common)
        common |= {"series": max(newest_series, last + 1), "forced": rerun_interrupted}
        holder = Watch(self.store, key).taken_by()
        if holder is not None and not held:
            return Decision(stage.name, "wait", f"{describe(holder)} is making it", **common)
        if isinstance(stage.config, TrainSettings):
            checkpoint, _ = newest_checkpoint(attempts(self.store.work(key), common["series"]), verify=False)
            if checkpoint is not None:
                misfit = checkpoint.fits(identity(stage, inline=self.inline))
                if misfit:
                    other_way = "without --inline" if self.inline else "with --inline"
                    advice = f". Or go on {other_way}" if checkpoint.fits(identity(stage, inline=not self.inline)) is None else ""
                    return Decision(stage.name, "blocked", f"{misfit} (--fresh {stage.name}){advice}", **common)
                return Decision(stage.name, "resume", f"goes on at step {checkpoint.step} of {stage.config.steps}", **common)
        why = damage or ("an asked-for rerun did not come to its end" if rerun_interrupted else self._why(stage, leaves))
        return Decision(stage.name, "run", why, **common)

    def leaves(self, stage: Stage, inputs: dict[str, list[str]]) -> dict[str, Any]:
        """What the stage's key is made of."""
        leaves: dict[str, Any] = {"kind": stage.kind.uses, "seed": self.graph.loaded.file.seed}
        leaves.update(flat(stage.semantic(), "config"))
        leaves.update((f"input.{name}.{index}", digest) for name, digests in inputs.items() for index, digest in enumerate(digests))
        leaves.update(self.sources(stage))
        leaves.update((f"code.{name}", sha256) for name, sha256 in self._code[stage.name].items())
        if self.graph.loaded.file.strict_environment:
            leaves.update((f"environment.{name}", version) for name, version in versions().items())
        return leaves

    def sources(self, stage: Stage) -> dict[str, str]:
        digests = self.store.content_sha256([source.path for source in stage.sources])
        return {f"source.{source.name}": digest for source, digest in zip(stage.sources, digests, strict=True)}

    def digest(self, reference: str, outputs: dict[str, str]) -> str:
        return self._external[reference] if ":" in reference else outputs[reference]

    def recoded(self, stage: Stage) -> bool:
        """Whether the code that the stage can reach was changed since it was read for the stage's key."""
        try:
            return self._read_code(stage, {}) != self._code[stage.name]
        except (ValueError, OSError):
            return True  # in the middle of an edit

    def _read_code(self, stage: Stage, readers: dict[Path | None, Code]) -> dict[str, str]:
        user = self._user_folders.get(stage.name) or stage.user_folder()
        code = readers.setdefault(user, Code(self._code_root, user))
        return code.leaves(stage.kind.entries(), [each.entry() for each in stage.user_code])

    def _not_yet(self, stage: Stage, above: Decision) -> Decision:
        if above.word == "run" and self.store.latest(self.graph.loaded.file.pipeline, stage.name) is None:
            return Decision(stage.name, "run", "never made here")
        word: Word = "blocked" if above.word == "blocked" else "run"
        verb = {"run": "is made anew", "resume": "is not finished", "wait": "is being made", "blocked": "can't be made"}[above.word]
        return Decision(stage.name, word, f"its input {above.stage} {verb}", expected_s=self._seconds(stage))

    def _why(self, stage: Stage, leaves: dict[str, Any]) -> str:
        """Why there is nothing to reuse: how this key differs from the one that the stage had last."""
        latest = self.store.latest(self.graph.loaded.file.pipeline, stage.name)
        if latest is None:
            return "never made here"
        found = differences(latest.leaves, leaves)
        shown = "; ".join(found[:3])
        return shown + (f"; and {len(found) - 3} more" if len(found) > 3 else "") or "what it made is gone"

    def _seconds(self, stage: Stage) -> float | None:
        latest = self.store.latest(self.graph.loaded.file.pipeline, stage.name)
        if latest is None:
            return None
        if isinstance(stage.config, TrainSettings) and (steps := latest.leaves.get("config.steps")):
            return latest.seconds * stage.config.steps / steps
        return latest.seconds

    def _series(self, key: str) -> list[int]:
        work = self.store.work(key)
        heads = [path.name.partition(".")[0] for path in work.iterdir()] if work.is_dir() else []
        return [int(head) for head in heads if head.isdecimal()]

    def _resolve_external(self) -> tuple[dict[str, str], list[Fault]]:
        faults, resolved = [], {}
        for stage in self.graph.stages.values():
            for parameter, references in stage.inputs.items():
                for reference in references:
                    if ":" in reference:
                        wanted = stage.kind.inputs[parameter].artifact.kind
                        resolved[reference], fault = self._resolve_as(reference, wanted)
                        if fault:
                            faults.append(Fault(f"stages.{stage.name}.inputs.{parameter}", fault))
        return resolved, faults

    def _resolve_given(self, given: Mapping[str, str]) -> tuple[dict[str, str], list[Fault]]:
        faults, resolved = [], {}
        for name, reference in given.items():
            resolved[name], fault = self._resolve_as(reference, self.graph.stages[name].kind.output.kind)
            if fault:
                faults.append(Fault(f"--use {name}={reference}", fault))
        return resolved, faults

    def _resolve_as(self, reference: str, wanted: str) -> tuple[str, str | None]:
        """The digest of a reference to an artifact of this kind, or why there is none."""
        try:
            digest = resolve(self.store, reference)
            kind = self.store.kind_of(digest)
        except ValueError as error:
            return "", str(error)
        return digest, None if kind == wanted else f"{reference!r} is {kind}, wanted {wanted}"


def resolve(store: Store, reference: str) -> str:
    """The digest that a reference names; ValueError says what there is instead."""
    if match := DIGEST.fullmatch(reference) or BARE_DIGEST.fullmatch(reference):
        found = [digest for digest in store.digests() if digest.startswith(match[1])]
        if len(found) == 1:
            return found[0]
        if found:
            raise ValueError(f"{reference!r} fits {len(found)} artifacts: {', '.join(each[:16] for each in found)}; give more of it")
        raise ValueError(f"{reference!r} is not in the store {store.root}; `gptline plan` and the run's page show digests")
    if match := RUN_STAGE.fullmatch(reference):
        run, stage = match.groups()
        ended = [each for each in read_journal(store, run) if each["type"] == "stage_ended" and each.get("output")]
        for event in reversed(ended):
            if event["stage"] == stage:
                return str(event["output"])
        if run not in store.runs():
            raise ValueError(f"{reference!r}: there is no run {run!r}; the newest are {', '.join(store.runs()[-3:]) or 'none'}")
        raise ValueError(f"{reference!r}: that run made no {stage!r}; it has {', '.join(each['stage'] for each in ended) or 'nothing'}")
    if match := MODEL_ALIAS.fullmatch(reference):
        name, alias = match.groups()
        if digest := store.pointed(name, alias):
            return digest
        known = sorted(each.removeprefix("aliases/").removesuffix(".json").replace("/", "@") for each in store.backend.list("aliases"))
        raise ValueError(f"{reference!r}: no model is called so; there are {', '.join(f'model:{each}' for each in known) or 'none yet'}")
    if match := HF_FOLDER.fullmatch(reference):
        return _imported(store, Path(match[1]).expanduser())
    raise ValueError(f"{reference!r} names no artifact; wanted {ARTIFACTS}")


def _imported(store: Store, folder: Path) -> str:
    """The model that was made of a folder's files as they are now."""
    names = checkpoint_files(folder)
    now = dict(zip(names, store.content_sha256([(folder / name).absolute() for name in names]), strict=True))
    for action in sorted(store.all_actions(), key=lambda action: action.started_ms, reverse=True):
        read = {Path(name).name: digest for name, digest in action.leaves.items() if name.startswith("source.")}
        if action.kind == IMPORTS["model"] and read == now:
            return action.output
    raise ValueError(
        f"{folder} was not imported into the store {store.root} as it is now; name it in a pipeline's inputs or with --use, and run that"
    )


def closed_gate(stage: Stage, action: Action) -> str | None:
    """Why what a stage made may not be read, as a sentence; None when it passes all its gates."""
    known = {name: points[-1][1] for name, points in action.curves.items() if points} | action.figures
    found = []
    remedy = ""
    for gate in stage.gates:
        value = known.get(gate.figure)
        if value is None:
            near = difflib.get_close_matches(gate.figure, known, n=1)
            there = f"perhaps {near[0]} is meant" if near else "there are " + ", ".join(sorted(known)) if known else "nor any other"
            found.append(f"it has no figure {gate.figure}, {there}")
        elif not gate.passes(value):
            shown = next(text for text in (f"{value:.6g}", repr(value)) if not gate.passes(float(text)))  # no rounding across the bound
            found.append(f"{gate.figure} is {shown}, wanted {gate.wanted()}")
            remedy = "train it longer or otherwise, or " if stage.kind.trains() else "change its settings or its inputs, or "
    return f"{stage.name}'s gate is closed: {', and '.join(found)}; {remedy}change the gate" if found else None


def identity(stage: Stage, *, inline: bool = False) -> dict[str, Any]:
    """What a checkpoint must share with the gang that loads it."""
    config = stage.config
    assert isinstance(config, TrainSettings)
    engine = "torch" if inline else config.engine
    return {
        "world_size": 1 if inline else stage.resources.ranks,
        "engine": engine,
        "zero_stage": config.zero_stage if engine == "deepspeed" else None,
        "precision": config.precision,
        "versions": versions(),  # for the record: they are not compared
    }


@functools.cache
def versions() -> dict[str, str]:
    """Of the interpreter and of the libraries that decide results."""
    found = {"python": platform.python_version()}
    for name in TRACKED:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "none"
    return found


def _notes(action: Action, stage: Stage) -> list[str]:
    """What differs without making a difference: operational settings, and versions."""
    notes = []
    for name, asked in stage.operational().items():
        made = action.operational.get(name, asked)
        if made != asked and name in ("ranks", "micro_batch_size", "zero_stage", "engine", "gpus_per_rank", "cpus_per_rank", "offload"):
            notes.append(f"made with {name} = {json.dumps(made)}, you ask for {json.dumps(asked)}")
    now = versions()
    for name, made in action.versions.items():
        if now.get(name, made) != made:
            notes.append(f"made with {name} {made}, here is {now[name]}")
    return notes
