"""What stages read of each other: references checked against the kinds' signatures, and the order that follows from them."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping
from typing import Protocol

from pipelines.plan.config import Fault
from pipelines.plan.faults import Origin
from pipelines.plan.kinds import Input, Kind
from pipelines.plan.references import HfFolder, StageName, parse, stages_in


class Reader(Protocol):
    """A stage as far as its inputs are concerned, whatever is wrong with its settings."""

    @property
    def name(self) -> str: ...
    @property
    def kind(self) -> Kind: ...
    @property
    def inputs(self) -> dict[str, list[str]]: ...


def check_inputs(stage: Reader, stages: Mapping[str, Reader], tables: Collection[str], dropped: Mapping[str, Origin]) -> list[Fault]:
    """Check a stage's inputs against its kind. `stages` can be read as far as their kinds; `tables` are all stages of the file, and
    `dropped` those that it leaves out of what it extends.
    """
    faults = []
    where = f"stages.{stage.name}.inputs"
    for parameter, references in stage.inputs.items():
        expected = stage.kind.inputs.get(parameter)
        if expected is None:
            near = difflib.get_close_matches(parameter, stage.kind.inputs)
            known = ", ".join(f"{name} ({each})" for name, each in stage.kind.inputs.items()) or "nothing"
            hint = f"did you mean {near[0]!r}?" if near else f"{stage.kind.uses} takes {known}"
            faults.append(Fault(f"{where}.{parameter}", f"unknown input; {hint}"))
            continue
        if not references:
            faults.append(Fault(f"{where}.{parameter}", "is an empty list, expected at least one reference"))
        if len(references) > 1 and not expected.many:
            faults.append(
                Fault(f"{where}.{parameter}", f"has {len(references)} references; {stage.kind.uses} takes one {expected.artifact.kind}")
            )
        for reference in references:
            fault = _reference_fault(reference, expected, stages, tables, dropped)
            if fault:
                faults.append(Fault(f"{where}.{parameter}", fault))
    for parameter, expected in stage.kind.inputs.items():
        if parameter not in stage.inputs and not expected.optional:
            fitting = [each.name for each in stages.values() if issubclass(each.kind.output, expected.artifact) and each is not stage]
            hint = f"{parameter} = ['{fitting[0]}'] would fit" if fitting else f"no stage here makes {expected.artifact.kind}"
            faults.append(Fault(f"{where}.{parameter}", f"is missing; {stage.kind.uses} needs {expected}; {hint}"))
    return faults


def _reference_fault(
    reference: str, expected: Input, stages: Mapping[str, Reader], tables: Collection[str], dropped: Mapping[str, Origin]
) -> str | None:
    try:
        parsed = parse(reference)
    except ValueError as error:
        return str(error)
    if isinstance(parsed, HfFolder):  # where one fits, a stage that imports it stands in its place by now
        return f"{reference!r} is a model or a tokenizer, expected {expected.artifact.kind}"
    if not isinstance(parsed, StageName):
        return None  # which artifact it stands for, only the store knows
    if reference in dropped and reference not in tables:
        return f"there is no stage {reference!r} any more, {dropped[reference].place()} drops it; name another or drop this stage too"
    if reference not in tables:
        near = difflib.get_close_matches(reference, tables)
        return f"there is no stage {reference!r}; " + (f"did you mean {near[0]!r}?" if near else f"the stages are {', '.join(tables)}")
    if reference in stages and not issubclass(stages[reference].kind.output, expected.artifact):
        return f"{reference!r} makes {stages[reference].kind.output.kind}, expected {expected.artifact.kind}"
    return None


def order_of(stages: Mapping[str, Reader]) -> tuple[list[str], list[str]]:
    """Order stages after what they read, otherwise as in the file; or return a cycle's names, the first one repeated at the end."""
    order: list[str] = []
    path: list[str] = []

    def visit(name: str) -> list[str]:
        if name in order:
            return []
        if name in path:
            return [*path[path.index(name) :], name]
        path.append(name)
        for above in stages_in(stages[name].inputs):
            if above in stages and (cycle := visit(above)):
                return cycle
        path.pop()
        order.append(name)
        return []

    for name in stages:
        if cycle := visit(name):
            return order, cycle
    return order, []
