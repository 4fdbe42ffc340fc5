"""The only file that imports MLflow: an open client, and what is looked up there before anything is created.

Everything is found by its `gptline.*` tags first, so that several processes, or the same one again, create each thing once.
"""

from __future__ import annotations

import fcntl
import json
import os
import posixpath
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, NamedTuple

from cluster.events import Point
from pipelines.observe.mlflow_address import ENVIRONMENT, resolve_uri
from pipelines.store.action import Action
from pipelines.store.store import Store

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

METRICS_PER_CALL = 1000
"""MLflow's own limit."""
ENTRIES_PER_CALL = 100
"""MLflow's own limit for tags and for params."""
PARAM_CHARS, TAG_CHARS, DIGEST_CHARS = 6000, 8000, 36
INCLUDING_DELETED_RUNS = 3
PERMANENT = ("INVALID_PARAMETER_VALUE", "BAD_REQUEST")
"""Errors after which the same request will fail again."""


class Measure(NamedTuple):
    """A point of a metric, and the logged model that it is about."""

    name: str
    point: Point
    model_id: str | None = None


class MlflowSession:
    """An open MlflowClient with experiments, runs and datasets. Every call names its run: nothing depends on an active one."""

    def __init__(self, store: Store, uri: str) -> None:
        for name, value in ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        from mlflow import MlflowClient

        self.uri = resolve_uri(uri, store)
        self._store = store
        self._experiments: dict[str, tuple[str, str]] = {}
        with self.lock("mlflow"):  # a fresh database migrates when it is first opened, and two migrations at once both fail
            self.client: MlflowClient = MlflowClient(self.uri)
            self.client.get_experiment_by_name("Default")
        self.models = MlflowModels(self, store)

    @contextmanager
    def lock(self, name: str) -> Iterator[None]:
        """Let one process at a time in this store enter. The lock ends with its holder, however that ends."""
        path = self._store.machine_file(f"{name}.lock")
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "a", encoding="utf-8") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    @staticmethod
    def refused(error: Exception) -> bool:
        """Whether MLflow rejected a request for good, so that sending it again is useless."""
        from mlflow.exceptions import MlflowException

        return isinstance(error, MlflowException) and error.error_code in PERMANENT

    # ---- experiments and runs ----

    def experiment(self, pipeline: str) -> tuple[str, str]:
        """The experiment's id, and what distinguishes it from another one of the same name. Created if it does not exist."""
        from mlflow.exceptions import MlflowException

        if pipeline not in self._experiments:
            found = self.client.get_experiment_by_name(pipeline)
            if found is None:
                files = self._store.machine_file(f"mlflow-artifacts/{pipeline}").resolve().as_uri()
                with suppress(MlflowException):  # another driver was faster
                    self.client.create_experiment(pipeline, artifact_location=files if self.uri.startswith("sqlite:") else None)
                found = self.client.get_experiment_by_name(pipeline)
                if found is None:
                    raise RuntimeError(f"MLflow {self.uri} has no experiment {pipeline!r} and did not create one")
            if found.lifecycle_stage == "deleted":
                raise RuntimeError(
                    f"MLflow {self.uri}: the experiment {pipeline!r} was deleted there; restore it (`mlflow experiments restore`) "
                    f"or give the pipeline another name"
                )
            self._experiments[pipeline] = (found.experiment_id, f"{found.experiment_id}:{found.creation_time}")
        return self._experiments[pipeline]

    def has_experiment(self, pipeline: str) -> bool:
        return pipeline in self._experiments or self.client.get_experiment_by_name(pipeline) is not None

    def runs(self, pipeline: str, run: str) -> dict[str, str | None]:
        """Stage name to the id of its MLflow run, "" to the parent's; None where a person deleted it."""
        found: dict[str, str | None] = {}
        token = None
        while True:
            page = self.client.search_runs(
                [self.experiment(pipeline)[0]],
                f"tags.`gptline.run` = '{run}'",
                run_view_type=INCLUDING_DELETED_RUNS,
                page_token=token,
            )
            for each in page:
                stage = each.data.tags.get("gptline.stage", "")
                if found.get(stage) is None:
                    found[stage] = each.info.run_id if each.info.lifecycle_stage == "active" else None
            token = page.token
            if not token:
                return found

    def maker_run(self, action: Action) -> str | None:
        """The MLflow run of the stage that carried an action out; None if this MLflow does not have it."""
        if not self.has_experiment(action.pipeline):
            return None
        return self.runs(action.pipeline, action.run).get(action.stage)

    def create_run(self, pipeline: str, name: str, started_ms: int | None, tags: dict[str, Any]) -> str:
        given = {tag: str(value)[:TAG_CHARS] for tag, value in tags.items() if value not in (None, "")}
        return self.client.create_run(self.experiment(pipeline)[0], start_time=started_ms, tags=given, run_name=name).info.run_id

    def end_run(self, run_id: str, status: str, time_ms: int) -> None:
        self.client.set_terminated(run_id, status, time_ms)

    # ---- what a run holds ----

    def log(
        self,
        run_id: str,
        *,
        measures: Iterable[Measure] = (),
        tags: dict[str, Any] | None = None,
        params: dict[str, str] | None = None,
    ) -> None:
        from mlflow.entities import Metric, Param, RunTag

        metrics = [
            Metric(posixpath.normpath(mlflow_name(name)), float(point.value), int(point.time_ms), int(point.step), model_id)
            for name, point, model_id in measures
        ]
        all_tags = [RunTag(name, str(value)[:TAG_CHARS]) for name, value in (tags or {}).items() if value not in (None, "")]
        all_params = [Param(name, value) for name, value in (params or {}).items()]
        for at in range(0, len(all_tags), ENTRIES_PER_CALL):
            self.client.log_batch(run_id, tags=all_tags[at : at + ENTRIES_PER_CALL])
        for at in range(0, len(metrics), METRICS_PER_CALL):
            self.client.log_batch(run_id, metrics=metrics[at : at + METRICS_PER_CALL])
        for at in range(0, len(all_params), ENTRIES_PER_CALL):
            self.client.log_batch(run_id, params=all_params[at : at + ENTRIES_PER_CALL])

    def log_file(self, run_id: str, name: str, text: str) -> None:
        self.client.log_text(run_id, text, name)

    def log_dataset(
        self, run_id: str, *, name: str, digest: str, context: str, parameter: str, source: str, metadata: dict[str, Any]
    ) -> None:
        from mlflow.entities import Dataset, DatasetInput, InputTag

        dataset = Dataset(name[:500], digest[:DIGEST_CHARS], "local", json.dumps({"uri": source}), profile=json.dumps(metadata))
        tags = [
            InputTag("mlflow.data.context", context),
            InputTag("gptline.digest", digest),
            InputTag("gptline.input", parameter[:500]),
        ]
        self.client.log_inputs(run_id, datasets=[DatasetInput(dataset, tags)])

    def log_input_models(self, run_id: str, model_ids: Iterable[str]) -> None:
        from mlflow.entities import LoggedModelInput

        self.client.log_inputs(run_id, models=[LoggedModelInput(each) for each in model_ids])

    def log_output_model(self, run_id: str, model_id: str, step: int) -> None:
        from mlflow.entities import LoggedModelOutput

        outputs = self.client.get_run(run_id).outputs
        if model_id not in {each.model_id for each in (outputs.model_outputs if outputs else [])}:  # MLflow refuses it a second time
            self.client.log_outputs(run_id, [LoggedModelOutput(model_id, step)])


class MlflowModels:
    """Logged models and the versions of registered ones, each created once per digest.

    Models are external: MLflow has their digest and their path in the store, never their weights.
    """

    def __init__(self, session: MlflowSession, store: Store) -> None:
        self._session = session
        self._store = store
        self._ids: dict[str, str] = {}

    def logged(self, digest: str, maker: Action | None, pipeline: str, run_id: str) -> str:
        """The id of the logged model that stands for an artifact. Created if it does not exist."""
        if digest in self._ids:
            return self._ids[digest]
        session, client = self._session, self._session.client
        own = session.experiment(pipeline)[0]
        home = session.experiment(maker.pipeline)[0] if maker is not None and session.has_experiment(maker.pipeline) else own
        source_run = (session.maker_run(maker) if maker is not None else None) or run_id
        with session.lock("mlflow-models"):
            found = list(client.search_logged_models(sorted({own, home}), f"tags.`gptline.digest` = '{digest}'"))
            if found:
                model = found[0]
            else:
                metadata = (self._store.manifest(digest) or {"metadata": {}})["metadata"]
                params = {"digest": digest, "path": str(self._store.artifact_folder(digest).resolve()), **flat(metadata)}
                model = client.create_logged_model(
                    home,
                    name=re.sub(r"[/:.%\"']", "-", maker.stage if maker is not None else "model"),
                    source_run_id=source_run,
                    tags={
                        "gptline.digest": digest,
                        "mlflow.model.isExternal": "true",
                        **({"gptline.key": maker.key, "gptline.made_by_run": maker.run} if maker is not None else {}),
                    },
                    params=dict(list(params.items())[:ENTRIES_PER_CALL]),
                    model_type=str(metadata.get("role", "model")),
                )
            if str(model.status) != "READY":
                client.finalize_logged_model(model.model_id, "READY")
        self._ids[digest] = model.model_id
        return model.model_id

    def register(self, name: str, model_id: str, digest: str, run: str) -> None:
        """Make a logged model a version of the registered model `name`."""
        from mlflow.exceptions import MlflowException

        client = self._session.client
        with self._session.lock("mlflow-models"):
            try:
                client.create_registered_model(name, tags={"gptline.pipeline": name})
            except MlflowException as error:
                if error.error_code != "RESOURCE_ALREADY_EXISTS":
                    raise
            model = client.get_logged_model(model_id)
            version = self._version(name, digest) or client.create_model_version(
                name,
                # Not models:/<id>: a database's client looks that up through the process's own tracking URI.
                model.artifact_location,
                run_id=model.source_run_id,
                model_id=model_id,  # without it a server refuses the source
                tags={"gptline.digest": digest, "gptline.model_id": model_id, "gptline.run": run},
                await_creation_for=0,
            )
            # A server writes this link, which the logged model's page shows; a database's client does not.
            links = json.loads(model.tags.get("mlflow.modelVersions", "[]"))
            link = {"name": name, "version": int(version.version)}
            if link not in links:
                client.set_logged_model_tags(model_id, {"mlflow.modelVersions": json.dumps([*links, link])})

    def set_newest(self, name: str) -> None:
        """Put the alias `newest` on the version that the store's alias means, whichever run is being sent."""
        with self._session.lock("mlflow-models"):
            digest = self._store.alias(name, "newest")
            version = None if digest is None else self._version(name, digest)
            if version is not None:
                self._session.client.set_registered_model_alias(name, "newest", str(version.version))

    def _version(self, name: str, digest: str) -> ModelVersion | None:
        """The first version, if processes on two machines have created two. A database numbers with int, a server with str."""
        found = self._session.client.search_model_versions(f"name = '{name}' AND tags.`gptline.digest` = '{digest}'")
        return min(found, key=lambda version: int(version.version), default=None)


def mlflow_name(name: str) -> str:
    """The name with what MLflow accepts: letters, digits and `_ - . : / space`."""
    return re.sub(r"[^A-Za-z0-9_\-. :/]", "_", name)[:250]


def flat(settings: dict[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested settings as params: `files.0`, `resources.ranks`."""
    params: dict[str, str] = {}
    for name, value in settings.items():
        path = f"{prefix}{name}"
        if isinstance(value, dict):
            params |= flat(value, f"{path}.")
        elif isinstance(value, list | tuple):
            params |= flat({str(at): each for at, each in enumerate(value)}, f"{path}.")
        elif value is not None:
            params[mlflow_name(path).strip("/. ")] = (value if isinstance(value, str) else json.dumps(value))[:PARAM_CHARS]
    return params
