"""The door to a cluster's job server: send it a shell line, ask what became of it, read what it printed, have it stopped.

    jobs = Jobs("http://10.0.0.5:8265")         its dashboard's address; who asks must know the cluster's token
    jobs.submit("20261122-...", "exec python ...", {"NAME": "value"})
    jobs.state("20261122-...").word             PENDING, RUNNING, STOPPED, SUCCEEDED or FAILED

The job table lives as long as the cluster does: what must outlive that belongs into the store.
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

KNOCK_S = 5.0
ANSWER_S = 90.0
STOP_WAIT_S = 60
"""Between SIGTERM and SIGKILL when Ray stops a job: time for a step to finish and its checkpoint to be saved. Ray's own 3 s is none."""
OVERRIDES = ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS")
"""Ray lets these beat the address that its client is given."""
ENDED = ("STOPPED", "SUCCEEDED", "FAILED")


@dataclass(frozen=True)
class JobState:
    """`JobState("FAILED", "runtime_env setup failed: ...", None)`"""

    word: str
    """PENDING, RUNNING, STOPPED, SUCCEEDED or FAILED."""
    message: str = ""
    """Why, in Ray's words."""
    exit_code: int | None = None
    """The driver's; -9 after SIGKILL."""

    @property
    def ended(self) -> bool:
        return self.word in ENDED


class Jobs:
    """One cluster's jobs.

    ValueError: the address is none, or lies elsewhere and there is no token for it. ConnectionError: nobody answers as Ray there.
    PermissionError: the cluster wants a token, or another one. Every later call may raise the last two.
    """

    def __init__(self, address: str, *, insecure: bool = False) -> None:
        """`insecure`: send jobs to another machine without a token, too."""
        url = _checked(address)
        self.address = address.rstrip("/")
        secret = token()
        if secret is None and not insecure and not on_loopback(url.hostname or ""):
            raise ValueError(
                f"{self.address} is another machine, and there is no token for it: whoever can reach a cluster without one runs what they "
                "like there. Set RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH to the cluster's token, or write --insecure"
            )
        self._has_token = secret is not None
        self._knock(url)
        with self._in_words(), _without(OVERRIDES):
            self._client = _client(self.address, {} if secret is None else {"Authorization": f"Bearer {secret}"})

    def submit(self, name: str, entrypoint: str, environment: Mapping[str, str]) -> None:
        """Have `entrypoint`, a shell line, run on the head node. `name` may be used once in a cluster's life."""
        variables = {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_WAIT_S), **environment}
        with self._in_words():
            self._client.submit_job(entrypoint=entrypoint, submission_id=name, runtime_env={"env_vars": variables})

    def state(self, name: str) -> JobState | None:
        """None when the cluster has no such job: it was started anew since, or is another one."""
        with self._in_words(), _none_if_unknown():
            info = self._client.get_job_info(name)
            return JobState(info.status.value, info.message or "", info.driver_exit_code)
        return None

    def log(self, name: str) -> str:
        """What the job printed so far, and what Ray wrote while it set the job up."""
        with self._in_words(), _none_if_unknown():
            return str(self._client.get_job_logs(name))
        return ""

    def stop(self, name: str) -> None:
        """Ask for it; the job gets SIGTERM, and SIGKILL after STOP_WAIT_S. One that waits to be started ends when it would have."""
        with self._in_words(), _none_if_unknown():
            self._client.stop_job(name)

    def _knock(self, url: SplitResult) -> None:
        """At once, where Ray's client would wait for minutes."""
        port = url.port or {"http": 80, "https": 443}[url.scheme]
        try:
            socket.create_connection((url.hostname or "", port), timeout=KNOCK_S).close()
        except OSError as error:
            why = error.strerror or str(error) or type(error).__name__
            raise ConnectionError(
                f"nothing listens at {self.address} ({why.lower()}): wanted the address of a cluster's dashboard, as "
                "`ray start --head --include-dashboard=true` prints it"
            ) from error

    @contextlib.contextmanager
    def _in_words(self) -> Iterator[None]:
        from ray.exceptions import AuthenticationError
        from requests.exceptions import RequestException

        try:
            yield
        except AuthenticationError as error:
            where = "RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH or ~/.ray/auth_token"
            refused = f"the cluster at {self.address} refuses the token that it was given; mend the one of {where}"
            wanted = f"the cluster at {self.address} wants a token, and there is none: put it into {where}"
            raise PermissionError(refused if self._has_token else wanted) from error
        except (RequestException, ConnectionError, RuntimeError, LookupError, TypeError, ValueError) as error:
            lines = [line.strip() for line in str(error).rstrip(" .\n").splitlines() if line.strip()] or [type(error).__name__]
            if lines[0].startswith("Request failed with status code"):  # Ray's client, of an answer that was Ray's
                line = lines[-1] if "Traceback" in lines[0] else lines[0]
                raise ConnectionError(f"the cluster at {self.address} can't do that: {line[:300]}") from error
            raise ConnectionError(
                f"what listens at {self.address} does not answer as Ray's dashboard does ({lines[0][:300]}): "
                "wanted the dashboard's address, port 8265 unless it was given another"
            ) from error


def token() -> str | None:
    """The cluster's shared secret, from where Ray takes it: RAY_AUTH_TOKEN, the file of RAY_AUTH_TOKEN_PATH, ~/.ray/auth_token.

    None where there is none, or where RAY_AUTH_MODE is "disabled"; ValueError where a file that was named can't be read.
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
            raise ValueError(f"RAY_AUTH_TOKEN_PATH = {named} can't be read ({error.strerror}); wanted the token's file") from error
        return None


def on_loopback(host: str) -> bool:
    """True for names and addresses that lead to this machine alone."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _checked(address: str) -> SplitResult:
    example = "wanted the address of a cluster's dashboard, such as http://127.0.0.1:8265"
    try:
        url = urlsplit(address)
        known = url.scheme in ("http", "https") and bool(url.hostname) and url.port != 0
    except ValueError:  # what stands where a port should, or half an IPv6 address
        known = False
    if not known:
        near = f"; did you mean http://{address}?" if "://" not in address and ":" in address else ""
        raise ValueError(f"--address {address!r} is no URL; {example}{near}")
    if url.username or url.password:
        raise ValueError(f"--address holds a password, and addresses are recorded; {example}, with the token in RAY_AUTH_TOKEN")
    return url


def _client(address: str, headers: dict[str, str]) -> Any:
    from ray.job_submission import JobSubmissionClient

    class Client(JobSubmissionClient):
        """Ray's own waits for an answer without end."""

        def _do_request(self, *arguments: Any, **named: Any) -> Any:
            return super()._do_request(*arguments, timeout=ANSWER_S, **named)

    return Client(address, headers=headers)


@contextlib.contextmanager
def _without(names: tuple[str, ...]) -> Iterator[None]:
    kept = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(kept)


@contextlib.contextmanager
def _none_if_unknown() -> Iterator[None]:
    """Ray's answer 404 about a job; its client has no type for it."""
    try:
        yield
    except RuntimeError as error:
        if "status code 404" not in str(error):
            raise
