"""The client of a cluster's job server: submit a shell command, read its status and log, stop it.

    jobs = Jobs("http://10.0.0.5:8265")         the dashboard's address; the cluster's token is required
    jobs.submit("20261122-...", "exec python ...", {"NAME": "value"})
    jobs.state("20261122-...").status           PENDING, RUNNING, STOPPED, SUCCEEDED or FAILED

The job table lives only as long as the cluster; what must outlive it belongs in the store.
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
import socket
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import SplitResult, urlsplit

CONNECT_TIMEOUT_S = 5.0
ANSWER_TIMEOUT_S = 90.0
STOP_WAIT_S = 60
"""Time between SIGTERM and SIGKILL when Ray stops a job, to finish a step and save a checkpoint; Ray's default of 3 s is too short."""
OVERRIDES = ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS")
"""Environment variables that override the address given to Ray's client."""
ENDED = ("STOPPED", "SUCCEEDED", "FAILED")


@dataclass(frozen=True)
class JobState:
    """`JobState("FAILED", "runtime_env setup failed: ...", None)`"""

    status: str
    """PENDING, RUNNING, STOPPED, SUCCEEDED or FAILED."""
    message: str = ""
    """Why, in Ray's words."""
    exit_code: int | None = None
    """The driver's exit code; -9 after SIGKILL."""

    @property
    def ended(self) -> bool:
        return self.status in ENDED


class Jobs:
    """One cluster's jobs.

    Raises ValueError for an address that is malformed, or on another machine without a token; ConnectionError if no Ray
    dashboard answers there; PermissionError if the cluster requires a token or rejects this one. Every call may raise the last two.
    """

    def __init__(self, address: str, *, insecure: bool = False) -> None:
        """`insecure` allows sending jobs to another machine without a token."""
        url = _checked(address)
        self.address = address.rstrip("/")
        secret = token()
        if secret is None and not insecure and not on_loopback(url.hostname or ""):
            raise ValueError(
                f"{self.address} is another machine and no token was found: anyone who can reach a cluster without a token can run code "
                "on it. Set RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH to the cluster's token, or pass --insecure"
            )
        self._has_token = secret is not None
        self._check_reachable(url)
        with self._translated_errors(), _without_variables(OVERRIDES):
            self._client = _client(self.address, {} if secret is None else {"Authorization": f"Bearer {secret}"})

    def submit(self, name: str, entrypoint: str, environment: Mapping[str, str]) -> None:
        """Run `entrypoint`, a shell command, on the head node. Each `name` can be used only once per cluster."""
        variables = {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_WAIT_S), **environment}
        with self._translated_errors():
            self._client.submit_job(entrypoint=entrypoint, submission_id=name, runtime_env={"env_vars": variables})

    def state(self, name: str) -> JobState | None:
        """None if the cluster has no such job: it was restarted since, or it is a different cluster."""
        with self._translated_errors(), _none_if_unknown():
            info = self._client.get_job_info(name)
            return JobState(info.status.value, info.message or "", info.driver_exit_code)
        return None

    def log(self, name: str) -> str:
        """The job's output so far, including Ray's messages while it set the job up."""
        with self._translated_errors(), _none_if_unknown():
            return str(self._client.get_job_logs(name))
        return ""

    def stop(self, name: str) -> None:
        """Request a stop: the job gets SIGTERM, and SIGKILL after STOP_WAIT_S. A pending job ends when it would have started."""
        with self._translated_errors(), _none_if_unknown():
            self._client.stop_job(name)

    def _check_reachable(self, url: SplitResult) -> None:
        """Raise ConnectionError at once if nothing listens, where Ray's client would wait for minutes."""
        port = url.port or {"http": 80, "https": 443}[url.scheme]
        try:
            socket.create_connection((url.hostname or "", port), timeout=CONNECT_TIMEOUT_S).close()
        except OSError as error:
            reason = error.strerror or str(error) or type(error).__name__
            raise ConnectionError(
                f"nothing listens at {self.address} ({reason.lower()}); expected the address of a cluster's dashboard, which "
                "`ray start --head --include-dashboard=true` prints"
            ) from error

    @contextlib.contextmanager
    def _translated_errors(self) -> Iterator[None]:
        from ray.exceptions import AuthenticationError
        from requests.exceptions import RequestException

        try:
            yield
        except AuthenticationError as error:
            sources = "RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH or ~/.ray/auth_token"
            rejected = f"the cluster at {self.address} rejects this token; correct it in {sources}"
            required = f"the cluster at {self.address} requires a token and none was found; set it in {sources}"
            raise PermissionError(rejected if self._has_token else required) from error
        except (RequestException, ConnectionError, RuntimeError, LookupError, TypeError, ValueError) as error:
            lines = [line.strip() for line in str(error).rstrip(" .\n").splitlines() if line.strip()] or [type(error).__name__]
            if lines[0].startswith("Request failed with status code"):  # Ray's client wraps an answer of Ray's server
                line = lines[-1] if "Traceback" in lines[0] else lines[0]
                raise ConnectionError(f"the cluster at {self.address} refused: {line[:300]}") from error
            raise ConnectionError(
                f"the server at {self.address} does not answer like Ray's dashboard ({lines[0][:300]}); "
                "expected the dashboard's address, port 8265 unless configured otherwise"
            ) from error


def token() -> str | None:
    """The cluster's shared secret, looked up as Ray does: RAY_AUTH_TOKEN, the file RAY_AUTH_TOKEN_PATH, ~/.ray/auth_token.

    None if there is none or RAY_AUTH_MODE is "disabled"; ValueError if RAY_AUTH_TOKEN_PATH can't be read.
    """
    if os.environ.get("RAY_AUTH_MODE", "").lower() == "disabled":
        return None
    if given := os.environ.get("RAY_AUTH_TOKEN", "").strip():
        return given
    named = os.environ.get("RAY_AUTH_TOKEN_PATH")
    path = Path(named) if named else Path.home() / ".ray" / "auth_token"
    try:
        return path.read_text().strip() or None
    except OSError as error:
        if named:
            raise ValueError(f"RAY_AUTH_TOKEN_PATH = {named} can't be read ({error.strerror}); expected the token's file") from error
        return None


def on_loopback(host: str) -> bool:
    """True for names and addresses that can only reach this machine."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _checked(address: str) -> SplitResult:
    expected = "expected the URL of a cluster's dashboard, such as http://127.0.0.1:8265"
    try:
        url = urlsplit(address)
        valid = url.scheme in ("http", "https") and bool(url.hostname) and url.port != 0
    except ValueError:  # a port that isn't a number, or half an IPv6 address
        valid = False
    if not valid:
        hint = f"; did you mean http://{address}?" if "://" not in address and ":" in address else ""
        raise ValueError(f"--address {address!r} is not a URL; {expected}{hint}")
    if url.username or url.password:
        raise ValueError(f"--address contains a password, but addresses are recorded; {expected}, with the token in RAY_AUTH_TOKEN")
    return url


def _client(address: str, headers: dict[str, str]) -> Any:
    from ray.job_submission import JobSubmissionClient

    class Client(JobSubmissionClient):
        """Adds a timeout: Ray's client waits for an answer without limit."""

        def _do_request(self, *arguments: Any, **named: Any) -> Any:
            return super()._do_request(*arguments, timeout=ANSWER_TIMEOUT_S, **named)

    return Client(address, headers=headers)


@contextlib.contextmanager
def _without_variables(names: tuple[str, ...]) -> Iterator[None]:
    removed = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(removed)


@contextlib.contextmanager
def _none_if_unknown() -> Iterator[None]:
    """Suppress Ray's answer 404 about a job, for which its client has no exception type."""
    try:
        yield
    except RuntimeError as error:
        if "status code 404" not in str(error):
            raise
