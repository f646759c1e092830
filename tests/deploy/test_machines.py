"""Machines without Kubernetes: compose by its specification, units by systemd, the SSH cluster by Ray's own check."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from importlib.resources import files as package_files
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from service.settings import Settings
from tests.deploy.files import COMPOSE, DEPLOY, README

UNITS = sorted((DEPLOY / "systemd").glob("*.service"))
HARDENED = ("NoNewPrivileges=true", "ProtectSystem=strict", "ProtectHome=true", "PrivateTmp=true", "UMask=0077")


@pytest.fixture
def compose() -> dict[str, Any]:
    document: dict[str, Any] = yaml.safe_load(COMPOSE.read_text())
    return document


def environment(name: str) -> dict[str, str]:
    lines = (DEPLOY / "systemd" / name).read_text().splitlines()
    return dict(line.split("=", 1) for line in lines if "=" in line and not line.startswith("#"))


def test_compose_is_what_its_specification_asks(compose: dict[str, Any]) -> None:
    schema = package_files("check_jsonschema") / "builtin_schemas" / "vendor" / "compose-spec.json"
    validator = jsonschema.Draft202012Validator(json.loads(schema.read_text()))
    validator.validate(compose)
    assert not validator.is_valid({**compose, "services": {"api": {"imagee": "x"}}})


def test_compose_has_the_parts_and_what_they_name(compose: dict[str, Any]) -> None:
    services = compose["services"]
    assert set(services) == {"api", "postgres", "ray-head", "ray-worker"}
    assert services["ray-worker"]["deploy"]["replicas"] == 2
    for name, service in services.items():
        assert set(service["networks"]) <= set(compose["networks"]), name
        assert set(service["secrets"]) <= set(compose["secrets"]), name
        named = {volume.partition(":")[0] for volume in service["volumes"]} - {"${D2FT_DATA"}
        assert named <= set(compose["volumes"]), name
        assert set(service.get("depends_on", {})) <= set(services), name
        assert "no-new-privileges:true" in service["security_opt"] and service["mem_limit"], name


def test_only_the_api_is_published_and_only_on_loopback(compose: dict[str, Any]) -> None:
    assert compose["networks"]["inside"] == {"internal": True}
    for name, service in compose["services"].items():
        if name == "api":
            assert all(port.startswith("127.0.0.1:") for port in service["ports"])
        else:
            assert "ports" not in service and service["networks"] == ["inside"], name


def test_the_apis_settings_in_compose_can_be_read(compose: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in compose["services"]["api"]["environment"].items():
        monkeypatch.setenv(name, value)
    settings = Settings()
    assert not settings.is_exposed and settings.host_names[0] == "api"
    hosts = set(compose["services"])
    for url in (settings.public_url, settings.ray_address, settings.store_url):
        assert re.search(r"(?://|@)([a-z-]+):\d+", str(url))[1] in hosts  # type: ignore[index]


@pytest.mark.parametrize("unit", UNITS, ids=lambda path: path.name)
def test_units_are_hardened_and_read_their_settings(unit: Path) -> None:
    text = unit.read_text()
    for line in (*HARDENED, "User=d2ft", "CapabilityBoundingSet=", "SystemCallFilter=@system-service"):
        assert f"\n{line}\n" in text, line
    file = re.search(r"^EnvironmentFile=/etc/d2ft/(.*)$", text, re.M)
    assert file is not None and environment(file[1])


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd is not here")
def test_systemd_reads_the_units(tmp_path: Path) -> None:
    for unit in UNITS:  # the programs are not where they will be
        (tmp_path / unit.name).write_text(re.sub(r"/opt/d2ft/bin/\w+", "/bin/true", unit.read_text()))
    command = ["systemd-analyze", "verify", "--man=no", *map(str, sorted(tmp_path.glob("*.service")))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0 and tmp_path.name not in done.stderr, done.stderr


def test_settings_of_the_units_can_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in environment("d2ft.env").items():
        monkeypatch.setenv(name, value)
    assert not Settings().is_exposed
    assert environment("ray.env")["RAY_AUTH_MODE"] == "token"
    assert environment("ray.env")["RAY_AUTH_TOKEN_PATH"] == environment("d2ft.env")["D2FT_RAY_TOKEN_PATH"]


def test_ray_takes_the_cluster_of_ssh_machines() -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    cluster = yaml.safe_load((DEPLOY / "ssh/cluster.yaml").read_text())
    validate_config(prepare_config(dict(cluster)))
    assert "~/.ray/auth_token" in cluster["file_mounts"]
    for commands in (cluster["head_start_ray_commands"], cluster["worker_start_ray_commands"]):
        start = commands[-1]
        assert "RAY_AUTH_MODE=token" in start and "RAY_USAGE_STATS_ENABLED=0" in start


def test_the_ports_are_the_same_everywhere_and_told() -> None:
    texts = [path.read_text() for path in (DEPLOY / "ssh/cluster.yaml", *UNITS) if "api" not in path.name]
    told = README.read_text()
    for text in texts:
        ports = dict(re.findall(r"--([a-z-]*port)=(\d+)", text))
        assert {"node-manager-port", "object-manager-port", "min-worker-port", "max-worker-port"} <= set(ports)
        for name, port in ports.items():
            assert port in told, name


@pytest.mark.parametrize("name", ["compose/make-secrets.sh", "ssh/make-token.sh"])
def test_secrets_are_made_once_and_for_the_owner_alone(name: str, tmp_path: Path) -> None:
    script = shutil.copy(DEPLOY / name, tmp_path)
    subprocess.run([script], check=True, timeout=30)
    made = {path: path.read_text() for path in (tmp_path / "secrets").iterdir()}
    assert (tmp_path / "secrets").stat().st_mode & 0o077 == 0
    assert made and all(re.fullmatch("[0-9a-f]{64}", text) for text in made.values())
    assert len(set(made.values())) == len(made)
    subprocess.run([script], check=True, timeout=30)
    assert {path: path.read_text() for path in made} == made
    assert "/secrets/" in (DEPLOY / name).with_name(".gitignore").read_text()
