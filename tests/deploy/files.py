"""What lies in deploy/: the files, the documents in them, and every container and variable that they name."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
KUBERNETES = DEPLOY / "kubernetes"
COMPOSE = DEPLOY / "compose/compose.yaml"
README = DEPLOY / "README.md"
RUNBOOK = DEPLOY / "RUNBOOK.md"
KUSTOMIZED = ("base", "overlays/gpu", "overlays/s3", "overlays/single-node", "overlays/production", "rayjob")


def files() -> list[Path]:
    """All that is kept under version control, and what is about to be."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "deploy"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    return [ROOT / name for name in listed if (ROOT / name).exists()]


def yaml_files() -> list[Path]:
    return [path for path in files() if path.suffix in (".yaml", ".yml")]


def documents(path: Path) -> list[Any]:
    return [document for document in yaml.safe_load_all(path.read_text()) if document is not None]


def manifests() -> list[tuple[Path, dict[str, Any]]]:
    """Every Kubernetes object as it is written, patches and kustomizations left out."""
    found = []
    for path in yaml_files():
        if path.is_relative_to(KUBERNETES):
            for each in documents(path):
                if isinstance(each, dict) and "kustomize" not in each["apiVersion"] and path.name != "settings.yaml":
                    found.append((path, each))
    return found


def pod_templates(manifest: dict[str, Any]) -> list[dict[str, Any]]:
    """The pod templates of an object, those of a Ray cluster included."""
    if manifest["kind"] == "RayJob":
        return ray_templates(manifest["spec"]["rayClusterSpec"])
    if manifest["kind"] == "RayCluster":
        return ray_templates(manifest["spec"])
    template = manifest.get("spec", {}).get("template")
    return [template] if template else []


def ray_templates(cluster: dict[str, Any]) -> list[dict[str, Any]]:
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    return [group["template"] for group in groups]


def walk(value: Any) -> Iterator[Any]:
    """Everything in a document, itself first."""
    yield value
    inside = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    for each in inside:
        yield from walk(each)


def dashboards() -> dict[str, dict[str, Any]]:
    return {path.name: json.loads(path.read_text()) for path in sorted((DEPLOY / "grafana").glob("*.json"))}
