"""Decides for each stage: reuse, run, resume, wait or blocked, and says why. Reads the store and changes nothing."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from cluster.checkpoint import attempts, newest_checkpoint
from gpt.settings import TrainSettings
from pipelines.plan.code import Code
from pipelines.plan.config import Fault
from pipelines.plan.environment import versions
from pipelines.plan.faults import did_you_mean
from pipelines.plan.forecast import expected_s
from pipelines.plan.gates import closed_gate
from pipelines.plan.graph import Graph, Stage
from pipelines.plan.key import differences, flat, key_of
from pipelines.plan.model_flow import Traits, traits_of
from pipelines.plan.references import names_stage
from pipelines.plan.resolve import resolve
from pipelines.store.action import Action
from pipelines.store.events import DecisionName
from pipelines.store.lease import Watch
from pipelines.store.store import Store


@dataclass(frozen=True)
class Decision:
    """What a run will do about one stage: `Decision("pretrain", "run", "lr: 0.001 -> 0.0005", key="1f0c...")`."""

    stage: str
    action: DecisionName
    reason: str
    key: str | None = None
    """None if it is unknown, because an input does not exist yet."""
    leaves: dict[str, Any] = field(default_factory=dict)
    inputs: dict[str, list[str]] = field(default_factory=dict)
    reused: Action | None = None
    """The record of the action whose output is reused."""
    output: str | None = None
    series: int = 1
    forced: bool = False
    start: int = 0
    """The finished steps that a resume begins with."""
    expected_s: float | None = None
    """Seconds that it is expected to take; None if unknown. Only a whole plan has it."""
    notes: tuple[str, ...] = ()
    closed: str | None = None
    """Why no stage may read the reused output: a gate is closed."""


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
        """`code_root` holds our packages; `user_folders` holds a stage's user code if that is in a snapshot rather than beside the TOML.

        `fresh`, `given` (stage to reference) and `until` come from the command line. ConfigError lists all faults in them.
        """
        self.graph = graph
        self.store = store
        self.fresh = fresh
        self.inline = inline
        known = ", ".join(graph.stages)
        faults = [
            Fault(f"{option} {name}", "there is no such stage" + (did_you_mean(name, graph.stages) or f"; the stages are {known}"))
            for option, names in (("--fresh", fresh), ("--until", [until] if until else []), ("--use", given))
            for name in names
            if name not in graph.stages
        ]
        self.given, found = self._resolve_given({name: each for name, each in given.items() if name in graph.stages})
        self._external, more = self._resolve_external()
        outside = self._traits({**self._external, **self.given})
        if faults := [*faults, *found, *more, *graph.model_faults(outside)]:
            raise graph.loaded.error(faults)
        self.chosen = graph.needed([until] if until else graph.last(), given=self.given)
        self._code_root = code_root
        self._user_folders = user_folders
        readers: dict[Path | None, Code] = {}
        # all of it now: an edit made later belongs to the next run
        self._code = {stage.name: self._read_code(stage, readers) for stage in graph.stages.values()}

    def plan(self) -> list[Decision]:
        """Decide the chosen stages on the present state of the store."""
        decisions: dict[str, Decision] = {}
        for stage in self.graph.stages.values():
            if stage.name not in self.chosen:
                continue
            closed = [each for name in self.upstream(stage) if (each := decisions[name].closed)]
            pending = [name for name in self.upstream(stage) if decisions[name].output is None]
            if closed:
                decisions[stage.name] = Decision(stage.name, "blocked", closed[0])
            elif pending:
                blocked = [name for name in pending if decisions[name].action == "blocked"]
                decisions[stage.name] = self._not_yet(stage, decisions[(blocked or pending)[0]])
            else:
                decisions[stage.name] = self.decide(stage, {name: each.output for name, each in decisions.items() if each.output})
        return [replace(each, expected_s=self._expected_s(each)) for each in decisions.values()]

    def upstream(self, stage: Stage) -> list[str]:
        """The stages that must have an output before a stage can be decided; none if its own output is given."""
        return [] if stage.name in self.given else stage.upstream()

    def decide(self, stage: Stage, outputs: dict[str, str], *, held: bool = False) -> Decision:
        """Decide one stage, all of whose inputs exist. `held`: the caller holds its lease, so there is no other run to wait for."""
        if stage.name in self.given:
            digest = self.given[stage.name]
            return Decision(stage.name, "reuse", f"--use names artifact {digest[:12]}", output=digest)
        inputs = {name: [self.digest(each, outputs) for each in references] for name, references in stage.inputs.items()}
        try:
            leaves = self.leaves(stage, inputs)
        except OSError as error:
            gone = [source.name for source in stage.sources if str(source.path) == str(error.filename)]
            if not gone:
                raise  # a file of the store
            return Decision(stage.name, "blocked", f"its source {gone[0]} can't be read ({error.strerror}); put it back")
        key = key_of(leaves)
        actions = self.store.actions(key)
        common: dict[str, Any] = {"key": key, "leaves": leaves, "inputs": inputs}
        last = actions[-1].number if actions else 0
        newest_series = max(self._series(key), default=0)
        if stage.name in self.fresh:
            return Decision(stage.name, "run", "rerun requested", series=max(newest_series, last) + 1, forced=True, **common)
        rerun_interrupted = 0 < last < newest_series
        damage = None
        for action in reversed(actions if not rerun_interrupted else []):
            damage = self.store.damage(action.output)
            if damage is None:
                closed = closed_gate(stage, action)
                notes = (*_notes(action, stage), *([closed] if closed else []))
                reason = f"made by run {action.run}"
                return Decision(stage.name, "reuse", reason, reused=action, output=action.output, notes=notes, closed=closed, **common)
        common |= {"series": max(newest_series, last + 1), "forced": rerun_interrupted}
        holder = Watch(self.store, key).holder()
        if holder is not None and not held:
            return Decision(stage.name, "wait", f"{holder} is building it", **common)
        if isinstance(stage.config, TrainSettings):
            checkpoint, _ = newest_checkpoint(attempts(self.store.work(key), common["series"]), verify=False)
            if checkpoint is not None:
                misfit = checkpoint.fits(identity(stage, inline=self.inline))
                if misfit:
                    other_way = "without --inline" if self.inline else "with --inline"
                    advice = f". Or continue {other_way}" if checkpoint.fits(identity(stage, inline=not self.inline)) is None else ""
                    return Decision(stage.name, "blocked", f"{misfit} (--fresh {stage.name}){advice}", **common)
                why = f"resumes at step {checkpoint.step} of {stage.config.steps}"
                return Decision(stage.name, "resume", why, start=checkpoint.step, **common)
        why = damage or ("a requested rerun was interrupted" if rerun_interrupted else self._why(stage, leaves))
        return Decision(stage.name, "run", why, **common)

    def leaves(self, stage: Stage, inputs: dict[str, list[str]]) -> dict[str, Any]:
        """Return what the stage's key is the digest of."""
        leaves: dict[str, Any] = {"kind": stage.kind.uses, "seed": self.graph.loaded.file.seed}
        leaves.update(flat(stage.semantic(), "config"))
        leaves.update((f"input.{name}.{index}", digest) for name, digests in inputs.items() for index, digest in enumerate(digests))
        leaves.update(self.sources(stage))
        leaves.update((f"code.{name}", sha256) for name, sha256 in self._code[stage.name].items())
        if self.graph.loaded.file.strict_environment:
            leaves.update((f"environment.{name}", version) for name, version in versions().items())
        return leaves

    def sources(self, stage: Stage) -> dict[str, str]:
        """The leaves of its source files: the digests of their content."""
        digests = self.store.content_sha256([source.path for source in stage.sources])
        return {f"source.{source.name}": digest for source, digest in zip(stage.sources, digests, strict=True)}

    def digest(self, reference: str, outputs: dict[str, str]) -> str:
        """The digest of an input, given those of the stages above."""
        return self._external[reference] if not names_stage(reference) else outputs[reference]

    def recoded(self, stage: Stage) -> bool:
        """Whether the code that the stage can reach has changed since it was read for the stage's key."""
        try:
            return self._read_code(stage, {}) != self._code[stage.name]
        except (ValueError, OSError):
            return True  # in the middle of an edit

    def _read_code(self, stage: Stage, readers: dict[Path | None, Code]) -> dict[str, str]:
        user = self._user_folders.get(stage.name) or stage.user_folder()
        code = readers.setdefault(user, Code(self._code_root, user))
        return code.leaves(stage.kind.entries(), [each.entry() for each in stage.user_code])

    def _not_yet(self, stage: Stage, above: Decision) -> Decision:
        if above.action == "run" and self.store.latest(self.graph.loaded.file.pipeline, stage.name) is None:
            return Decision(stage.name, "run", "not built here before")
        action: DecisionName = "blocked" if above.action == "blocked" else "run"
        why = {"run": "will be rebuilt", "resume": "will be resumed first", "wait": "is being built", "blocked": "can't be built"}
        return Decision(stage.name, action, f"its input {above.stage} {why[above.action]}")

    def _why(self, stage: Stage, leaves: dict[str, Any]) -> str:
        """Say why there is nothing to reuse: how this key differs from the one that the stage had last."""
        latest = self.store.latest(self.graph.loaded.file.pipeline, stage.name)
        if latest is None:
            return "not built here before"
        found = differences(latest.leaves, leaves)
        shown = "; ".join(found[:3])
        return shown + (f"; and {len(found) - 3} more" if len(found) > 3 else "") or "its output is gone"

    def _expected_s(self, decision: Decision) -> float | None:
        if decision.action in ("reuse", "blocked"):
            return 0.0
        stage = self.graph.stages[decision.stage]
        leaves = decision.leaves or dict(flat(stage.semantic(), "config"))
        return expected_s(self.store, self.graph.loaded.file.pipeline, stage, leaves, decision.key, decision.start)

    def _series(self, key: str) -> list[int]:
        work = self.store.work(key)
        heads = [path.name.partition(".")[0] for path in work.iterdir()] if work.is_dir() else []
        return [int(head) for head in heads if head.isdecimal()]

    def _resolve_external(self) -> tuple[dict[str, str], list[Fault]]:
        faults, resolved = [], {}
        for stage in self.graph.stages.values():
            for parameter, references in stage.inputs.items():
                for reference in references:
                    if not names_stage(reference):
                        expected = stage.kind.inputs[parameter].artifact.kind
                        resolved[reference], fault = self._resolve_as(reference, expected)
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

    def _resolve_as(self, reference: str, expected: str) -> tuple[str, str | None]:
        """Return the digest of a reference to an artifact of this type, or why there is none."""
        try:
            digest = resolve(self.store, reference)
            kind = self.store.kind_of(digest)
        except ValueError as error:
            return "", str(error)
        return digest, None if kind == expected else f"{reference!r} is {kind}, expected {expected}"

    def _traits(self, digests: Mapping[str, str]) -> dict[str, Traits]:
        """What the store knows of the artifacts that no stage here makes."""
        manifests = {name: self.store.manifest(digest) for name, digest in digests.items() if digest}
        return {
            name: traits_of(digests[name], each["kind"], each["metadata"], self.store.read(digests[name], "config.json"))
            for name, each in manifests.items()
            if each
        }


def identity(stage: Stage, *, inline: bool = False) -> dict[str, Any]:
    """Return what a checkpoint must share with the gang that loads it."""
    config = stage.config
    assert isinstance(config, TrainSettings)
    engine = "torch" if inline else config.engine
    return {
        "world_size": 1 if inline else stage.resources.ranks,
        "engine": engine,
        "zero_stage": config.zero_stage if engine == "deepspeed" else None,
        "precision": config.precision,
        "versions": versions(),  # recorded, but not compared
    }


def _notes(action: Action, stage: Stage) -> list[str]:
    """Say what differs from how an output was made without being in its key: operational settings and versions."""
    notes = []
    for name, asked in stage.operational().items():
        made = action.operational.get(name, asked)
        if made != asked and name in ("ranks", "micro_batch_size", "zero_stage", "engine", "gpus_per_rank", "cpus_per_rank", "offload"):
            notes.append(f"made with {name} = {json.dumps(made)}, now {json.dumps(asked)}")
    now = versions()
    for name, made in action.versions.items():
        if now.get(name, made) != made:
            notes.append(f"made with {name} {made}, installed is {now[name]}")
    return notes
