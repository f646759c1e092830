"""Settings of the control plane, read from `D2FT_*` in the environment; nothing reads the environment elsewhere.

All state lies under `home`:

    d2ft.db           the store
    key, ray_token    secrets, mode 0600
    server.json       what `up` started: URL, ports, process ids
    models.json       which timm models can be trained
    secret            from which the secrets of webhooks follow, mode 0600
    jobs/ID/aN/       one attempt: context.json, control.json, events.jsonl, logs/, result/,
                      tensorboard/
    storage/          Ray Train's own state; checkpoints/ID/, from which a job goes on; sweeps/ID/, a search so far;
                      scheduler/devices.json, what is known of the devices
    cache/            copies of datasets that lie elsewhere, on this machine
    ray               link to Ray's temp directory
    logs/             ray.log, api.log, catalogue.log, planner.log
"""

from __future__ import annotations

import json
import os
import re
import sys
from ipaddress import IPv4Network, IPv6Network
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

LOOPBACK = ("127.0.0.1", "localhost", "::1")
ANY = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # not a host but all of them, and where this machine finds it

RemoteRoot = Annotated[str, Field(pattern=r"^(s3|gs|hf)://[^/]+")]
_BETWEEN_ROOTS = re.compile(f"{re.escape(os.pathsep)}(?!//)")  # a prefix such as s3:// has such a sign of its own


def _lower(value: Any) -> Any:
    return value.lower() if isinstance(value, str) else value


class Settings(BaseSettings):
    """Typed, frozen, checked when made; every field is explained under it and in the README's table."""

    model_config = SettingsConfigDict(
        env_prefix="D2FT_", frozen=True, extra="ignore", use_attribute_docstrings=True, env_parse_none_str="null"
    )

    home: Path = Field(default_factory=lambda: Path.home() / ".d2ft")
    """Where all state lies."""
    host: str = "127.0.0.1"
    """Address the API listens on."""
    port: Annotated[int, Field(ge=1, le=65535)] = 7421
    """Port the API listens on."""
    tls_cert: Path | None = None
    """File with the API's certificate chain (PEM); with it and `tls_key` the API speaks HTTPS."""
    tls_key: Path | None = None
    """File with the certificate's private key (PEM)."""
    plain_http: bool = False
    """Speak HTTP on another host than loopback, too: a proxy in front does the TLS, or the network is trusted."""
    public_url: str | None = None
    """Where runs on other nodes reach the API; by default its own URL."""
    allowed_hosts: Annotated[tuple[str, ...], NoDecode] = ()
    """Names by which clients may call the API, comma-separated; by default loopback names, or any on another host."""
    roots: Annotated[tuple[RemoteRoot | Path, ...], NoDecode] = ()
    """Directories under which datasets and weights may lie, and prefixes (s3://bucket/sets, gs://bucket) for datasets,
    separated like PATH; home is always one of them."""
    database_url: str | None = None
    """SQLAlchemy URL of the store; by default SQLite at `home`/d2ft.db."""
    storage_path: Path | None = None
    """Where Ray Train keeps its own checkpoints; by default `home`/storage. All nodes must see it."""
    ray_address: str | None = None
    """Ray's dashboard address, http://host:port; `up` fills it in."""
    ray_token_path: Path | None = None
    """File with Ray's token; by default `home`/ray_token."""
    max_running: Annotated[int, Field(ge=1, le=1000)] = 1
    """How many jobs hold the cluster at once; the others are queued."""
    max_running_each: Annotated[int, Field(ge=1, le=1000)] | None = None
    """How many of them may be of one user, where an administrator has not set it for that user."""
    max_sweeps: Annotated[int, Field(ge=1, le=1000)] = 4
    """How many sweeps have a driver at once, which takes no place of a job; the others are queued."""
    max_queued: Annotated[int, Field(ge=0, le=10**6)] = 10_000
    """How many jobs of one user may wait, where an administrator has not set it for that user."""
    preempt_after_s: Annotated[float, Field(ge=0)] | None = 60.0
    """How long a job runs at least before one of higher priority may have it paused; "null" switches that off."""
    max_faults: Annotated[int, Field(ge=0, le=1000)] = 3
    """How many attempts of a job may be lost to faults of the system before it fails; 0: the first one ends it."""
    outside_silence_s: Annotated[float, Field(ge=10)] = 120.0
    """How long a run that was started elsewhere may be silent before its job is given up; it posts every 5 seconds."""
    lease_s: Annotated[float, Field(gt=0)] = 5.0
    """Of several API processes on one store, how long the one that supervises may be silent before another does."""
    resources_per_worker: dict[str, float] | None = None
    """What Ray books for each worker, as JSON; by default half a CPU, and one GPU where `use_gpu` is on.

    Without a GPU, `memory` (bytes) is also what its process may take: plans keep to it.
    """
    use_gpu: bool | None = None
    """Train on GPUs; by default where Ray's cluster has one."""
    start_timeout_s: Annotated[float, Field(gt=0)] = 60.0
    """How long the cluster may take to start a job's workers before the job fails."""
    poll_s: Annotated[float, Field(gt=0)] = 1.0
    """How often the supervisor follows the attempts that are open."""
    reconcile_s: Annotated[float, Field(gt=0)] = 10.0
    """How often the supervisor compares the whole store with Ray's job list."""
    settle_s: Annotated[float, Field(ge=0)] = 30.0
    """How long a driver may live on after its job has ended before it is stopped."""
    catalogue_wait_s: Annotated[float, Field(ge=0)] = 60.0
    """How long a submit or a dry run waits for the model catalogue while it is being made."""
    catalogue_file: Path | None = None
    """A catalogue that was made elsewhere (`python -m workers.catalog --out FILE`); none is made here then."""
    max_body_bytes: Annotated[int, Field(ge=1024)] = 1 << 20
    """Largest request body."""
    body_timeout_s: Annotated[float, Field(gt=0)] = 30.0
    """How long a client may take to send a request's head, and its body."""
    plan_workers: Annotated[int, Field(ge=1, le=64)] = 1
    """How many dry runs are planned at once, each in a process of its own."""
    plan_queue: Annotated[int, Field(ge=0, le=10_000)] = 8
    """How many dry runs may wait for that; more are refused."""
    plan_timeout_s: Annotated[float, Field(gt=0)] = 30.0
    """How long the planning of one dry run may take."""
    predict_workers: Annotated[int, Field(ge=1, le=64)] = 2
    """How many results are loaded at once to be tried on images, each in a process of its own."""
    predict_queue: Annotated[int, Field(ge=0, le=10_000)] = 8
    """How many predictions may wait for that; more are refused."""
    predict_timeout_s: Annotated[float, Field(gt=0)] = 60.0
    """How long a prediction may take, the loading of the model included."""
    predict_idle_s: Annotated[float, Field(ge=0)] = 60.0
    """How long a result stays loaded when nobody tries it."""
    max_predict_bytes: Annotated[int, Field(ge=1024)] = 16 << 20
    """Largest request body with images to predict."""
    max_streams: Annotated[int, Field(ge=1)] = 2000
    """How many event and log streams may be open at once."""
    max_streams_each: Annotated[int, Field(ge=1)] = 1000
    """How many of them one user may have."""
    max_image_pixels: Annotated[int, Field(ge=1)] = 25_000_000
    """The largest image of which a thumbnail is made, or which is predicted."""
    webhooks: bool = False
    """Whether users may have messages about their jobs sent to addresses that they name."""
    webhook_networks: Annotated[tuple[IPv4Network | IPv6Network, ...], NoDecode] = ()
    """Networks that are not public to which messages may go, by http too, comma-separated: "10.0.0.0/8"."""
    log_level: Annotated[Literal["debug", "info", "warning", "error"], BeforeValidator(_lower)] = "info"
    """From which level on the API writes its log: debug, info, warning or error."""
    hub_downloads: bool = False
    """Whether runs may download weights from Hugging Face's hub; otherwise those in the machine's cache have to do."""
    mlflow_tracking_uri: str | None = None
    """MLflow server that runs report to, without a password in it: its own variables in Ray's environment have that."""
    driver_module: str = "workers.loop"
    """Module run as the driver of an attempt: `python -m MODULE --context FILE`."""
    sweep_module: str = "workers.sweep"
    """Module run as the driver of a sweep's attempt."""
    driver_python: str = Field(default_factory=lambda: sys.executable)
    """Python that runs the driver, as the Ray head sees it."""

    @field_validator("home", "storage_path", "ray_token_path", "tls_cert", "tls_key", "catalogue_file")
    @classmethod
    def _absolute(cls, value: Path | None) -> Path | None:
        return None if value is None else value.expanduser().absolute()

    @field_validator("roots", mode="before")
    @classmethod
    def _split_roots(cls, value: Any) -> Any:
        return tuple(part for part in _BETWEEN_ROOTS.split(value) if part) if isinstance(value, str) else value

    @field_validator("allowed_hosts", "webhook_networks", mode="before")
    @classmethod
    def _split_commas(cls, value: Any) -> Any:
        return tuple(part.strip() for part in value.split(",") if part.strip()) if isinstance(value, str) else value

    @model_validator(mode="after")
    def _tls_whole(self) -> Settings:
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ValueError("D2FT_TLS_CERT and D2FT_TLS_KEY go together; set both or neither")
        return self

    def as_env(self) -> dict[str, str]:
        """What differs from the defaults, as the environment of a child that is to have the same settings."""
        given = {name: getattr(self, name) for name in type(self).model_fields}
        return {
            f"D2FT_{name.upper()}": _as_text(name, value)
            for name, value in given.items()
            if value != type(self).model_fields[name].default
        }

    @property
    def is_loopback(self) -> bool:
        return self.host in LOOPBACK

    @property
    def host_names(self) -> tuple[str, ...]:
        """The names the API answers to; empty means any."""
        if self.allowed_hosts:
            own = () if self.host in ANY else (self.host,)
            return (*self.allowed_hosts, *LOOPBACK, *own)
        return LOOPBACK if self.is_loopback else ()

    @property
    def all_roots(self) -> tuple[str | Path, ...]:
        return (*self.roots, self.home)

    @property
    def url(self) -> str:
        """Where a client on this machine finds the API."""
        host = ANY.get(self.host, self.host)
        scheme = "https" if self.tls_cert else "http"
        return f"{scheme}://{f'[{host}]' if ':' in host else host}:{self.port}"

    @property
    def runs_url(self) -> str:
        """Where runs find what is theirs."""
        return f"{self.public_url or self.url}/v1/runs"

    @property
    def is_exposed(self) -> bool:
        """Whether keys would travel in clear over a network, and nobody said that this is meant."""
        return not (self.is_loopback or self.tls_cert or self.plain_http)

    @property
    def store_url(self) -> str:
        return self.database_url or f"sqlite:///{self.home / 'd2ft.db'}"

    @property
    def token_file(self) -> Path:
        return self.ray_token_path or self.home / "ray_token"

    @property
    def storage(self) -> Path:
        return self.storage_path or self.home / "storage"

    @property
    def devices_file(self) -> Path:
        return self.storage / "scheduler" / "devices.json"

    @property
    def models_file(self) -> Path:
        return self.catalogue_file or self.home / "models.json"

    @property
    def logs_dir(self) -> Path:
        return self.home / "logs"

    def checkpoints_dir(self, job_id: str) -> Path:
        return self.storage / "checkpoints" / job_id

    def sweep_dir(self, sweep_id: str) -> Path:
        return self.storage / "sweeps" / sweep_id

    def attempt_dir(self, job_id: str, attempt: int) -> Path:
        return self.home / "jobs" / job_id / f"a{attempt}"


class ClientSettings(BaseSettings):
    """What the command line reads from the environment."""

    model_config = SettingsConfigDict(env_prefix="D2FT_", frozen=True, extra="ignore", use_attribute_docstrings=True)

    home: Path = Field(default_factory=lambda: Path.home() / ".d2ft")
    """Where `up` keeps its state: the key and the URL are read from there."""
    url: str | None = None
    """The service to talk to; by default the one that `up` started on this machine."""
    api_key: str | None = None
    """The key; by default that in `home`, which is sent to this machine's service alone."""


def _as_text(name: str, value: Any) -> str:
    if name in ("allowed_hosts", "webhook_networks"):
        return ",".join(map(str, value))
    if name == "roots":
        return os.pathsep.join(map(str, value))
    return json.dumps(value) if value is None or isinstance(value, dict | bool) else str(value)
