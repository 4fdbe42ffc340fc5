"""What an action becomes in MLflow: tags, datasets, logged models, figures and curves of the child run that shows it."""

from __future__ import annotations

import hashlib
from contextlib import suppress
from typing import Any

from cluster.commit import canonical_json
from cluster.events import Point
from pipelines.observe.lineage import code_digest
from pipelines.observe.mlflow_session import Measure, MlflowSession, flat, mlflow_name
from pipelines.observe.view import StageView
from pipelines.store.action import Action
from pipelines.store.events import StageEnded
from pipelines.store.store import Store

MOST_SOURCES = 20
"""More source files than this are shown as one dataset."""


class ActionsInMlflow:
    """The actions behind the stages of one run."""

    def __init__(self, session: MlflowSession, store: Store, pipeline: str, run: str) -> None:
        self._session = session
        self._store = store
        self._pipeline = pipeline
        self._run = run
        self._makers: dict[str, Action | None] = {}

    def find(self, ended: StageEnded | StageView) -> Action | None:
        """The action behind an ended stage."""
        if ended.key and ended.number is not None:
            with suppress(KeyError):
                return self._store.action(ended.key, ended.number)
        if ended.status == "reused" and ended.output:  # an artifact that the command line named
            return self.maker(ended.output)
        return None

    def tags(self, action: Action) -> dict[str, Any]:
        tags: dict[str, Any] = {
            "gptline.action": f"{action.key}/{action.number}",
            "gptline.kind": action.kind,
            "gptline.output": action.output,
            "gptline.code": code_digest(action),
            "gptline.restarts": action.restarts or None,
            "gptline.resumed_from_step": action.resumed_from_step,
        }
        for name, digests in action.inputs.items():
            for at, digest in enumerate(digests):
                tags[f"gptline.in.{name}" if len(digests) == 1 else f"gptline.in.{name}.{at}"] = digest
        tags |= {f"gptline.version.{mlflow_name(name)}": version for name, version in action.versions.items()}
        if action.run != self._run:
            tags["gptline.made_by_run"] = action.run
            tags["gptline.made_by_mlflow_run"] = self._session.maker_run(action)
            tags |= {f"gptline.made_with.{mlflow_name(name)}": value for name, value in flat(action.operational).items()}
        return tags

    def log_artifacts(self, run_id: str, action: Action) -> str | None:
        """Log what a stage read and made. Returns the model that its figures are about: the one it made, or the one it measured.

        A stage measures what its parameter `model` was given, or the only model among its inputs.
        """
        models: dict[str, str] = {}
        for name, digests in action.inputs.items():
            for digest in digests:
                if (self._store.manifest(digest) or {}).get("kind") == "model":
                    models[digest] = self._session.models.logged(digest, self.maker(digest), self._pipeline, run_id)
                else:
                    self._log_dataset(run_id, digest, "input", name)
        self._log_sources(run_id, action)
        if models:
            self._session.log_input_models(run_id, models.values())
        if action.output_kind != "model":
            self._log_dataset(run_id, action.output, "output", "output")
            measured = action.inputs.get("model") or list(models)
            return models.get(measured[0]) if len(measured) == 1 else None
        model = self._session.models.logged(action.output, action, self._pipeline, run_id)
        last_step = max((point.step for points in action.curves.values() for point in points), default=0)
        self._session.log_output_model(run_id, model, last_step)
        return model

    def log_measures(self, run_id: str, stage: StageView, action: Action, model: str | None) -> None:
        """Log figures, and the points that are not in the journal: none of a stage that ran here, all of a reused one."""
        in_journal = {name: {point.step for point in points} for name, points in stage.curves.items()}
        points = [
            Measure(name, point) for name, curve in action.curves.items() for point in curve if point.step not in in_journal.get(name, ())
        ]
        ended_ms = action.started_ms + round(1000 * action.seconds)
        figures = [
            Measure(name, Point(0, value, ended_ms), model if name in action.figures else None)
            for name, value in {"time/stage_s": action.seconds, **action.figures}.items()
            if name not in action.curves and name not in in_journal
        ]
        self._session.log(run_id, measures=[*points, *figures])

    def maker(self, digest: str) -> Action | None:
        """The newest action that made an artifact."""
        if self._makers.get(digest) is None:
            self._makers[digest] = next(iter(self._store.index.makers(digest)), None)
        return self._makers[digest]

    def _log_dataset(self, run_id: str, digest: str, context: str, parameter: str) -> None:
        manifest = self._store.manifest(digest) or {"kind": "artifact", "metadata": {}}
        maker = self.maker(digest)
        self._session.log_dataset(
            run_id,
            name=f"{manifest['kind']}:{maker.stage}" if maker is not None else manifest["kind"],
            digest=digest,
            context=context,
            parameter=parameter,
            source=str(self._store.artifact_folder(digest).resolve()),
            metadata=manifest["metadata"],
        )

    def _log_sources(self, run_id: str, action: Action) -> None:
        sources = action.sources()
        if len(sources) > MOST_SOURCES:
            sources = {f"{len(sources)} files": hashlib.sha256(canonical_json(sources)).hexdigest()}
        for name, digest in sources.items():
            self._session.log_dataset(
                run_id, name=f"source:{name}", digest=digest, context="source", parameter="source", source=name, metadata={}
            )
