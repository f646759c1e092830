"""Everything in deploy/ is told: files, settings, what was run. No secret stands in clear."""

from __future__ import annotations

import math
import re
from collections import Counter
from pathlib import Path

import pytest

from service.settings import ClientSettings, Settings
from tests.deploy.files import DEPLOY, README, ROOT, RUNBOOK, documents, files, walk, yaml_files

VARIABLE = re.compile(r"\b(?:D2FT|RAY|AWS|NCCL|NVIDIA|POSTGRES|PG|REDIS|OMP|PYTHON)_?[A-Za-z0-9_]*(?==)")
OURS = {f"D2FT_{name.upper()}" for name in (*Settings.model_fields, *ClientSettings.model_fields)}
RANDOM = re.compile(r"[A-Za-z0-9+]{24,}")  # words of paths and names are shorter
KNOWN_SHAPES = (
    r"d2ft_(?=[\w-]*[A-Z])(?=[\w-]*\d)[\w-]{30,}",
    r"whsec_[A-Za-z0-9+/=]{20,}",
    r"AKIA[0-9A-Z]{16}",
    r"-----BEGIN [A-Z ]*PRIVATE KEY",
    r"://[^/\s:@$]+:[^/\s@$]+@",
    r"(?i)(password|secret|token|api_?key)\s*[:=]\s*['\"]?[A-Za-z0-9+/]{12,}['\"]?\s*$",
)


def variables() -> dict[str, Path]:
    """Every environment variable that a file of deploy/ sets, and where."""
    found: dict[str, Path] = {}
    for path in yaml_files():
        for each in (one for document in documents(path) for one in walk(document)):
            if isinstance(each, dict):
                added = [each["value"]] if str(each.get("path")).endswith("/env/-") else []
                found |= {one["name"]: path for one in [*(each.get("env") or []), *added]}
                for name in (each.get("environment"), each.get("data") if each.get("kind") == "ConfigMap" else None):
                    found |= dict.fromkeys(name or {}, path)
    for path in files():
        if path.suffix in (".env", ".service", ".conf") or path.name in ("Dockerfile", "cluster.yaml", "compose.yaml"):
            text = "\n".join(line for line in path.read_text().splitlines() if not line.startswith("#"))
            found |= dict.fromkeys(VARIABLE.findall(text), path)
    return found


def entropy(text: str) -> float:
    """Bits per character."""
    counts = Counter(text)
    return -sum(n / len(text) * math.log2(n / len(text)) for n in counts.values())


def test_every_variable_is_a_setting_that_is_documented() -> None:
    told = README.read_text() + (ROOT / "service/README.md").read_text()
    found = variables()
    assert {"D2FT_DATABASE_URL", "RAY_AUTH_MODE", "RAY_gcs_storage", "PGPASSWORD", "POSTGRES_DB"} <= set(found)
    for name, path in found.items():
        assert f"`{name}`" in told, f"{name} in {path.name}"
        if name.startswith("D2FT_"):
            assert name in OURS | {"D2FT_TORCH_INDEX", "D2FT_EXTRAS"}, f"{name} in {path.name}"


def test_every_file_is_told_of() -> None:
    told = README.read_text()
    for path in files():
        name = path.relative_to(DEPLOY).as_posix()
        assert path.name in told or name in told, name


@pytest.mark.parametrize("path", files(), ids=lambda path: str(path.relative_to(DEPLOY)))
def test_no_secret_stands_in_clear(path: Path) -> None:
    for line in path.read_text().splitlines():
        for shape in KNOWN_SHAPES:
            assert not re.search(shape, line), line
        for word in RANDOM.findall(line):
            mixed = re.search(r"\d", word) and re.search(r"[A-Za-z]", word)
            assert not (mixed and entropy(word) > 3.8) and not re.fullmatch(r"[0-9a-f]{32,}", word), line


def test_secrets_of_kubernetes_are_named_and_not_written() -> None:
    for path in yaml_files():
        for document in documents(path):
            assert not (isinstance(document, dict) and document.get("kind") == "Secret"), path


def test_the_search_for_secrets_finds_some() -> None:
    bad = ("password: hunter2hunter2", "postgresql://d2ft:hunter2@host/db", "d2ft_" + "aB3" * 12)
    for line in bad:
        assert any(re.search(shape, line) for shape in KNOWN_SHAPES), line
    assert RANDOM.search("x=q7Zp0Vt3sXw9Lk2Jd8Rb5Nf1") and entropy("q7Zp0Vt3sXw9Lk2Jd8Rb5Nf1") > 3.8


def test_the_runbook_says_how_to() -> None:
    text = RUNBOOK.read_text().lower()
    for heading in ("upgrade", "backup", "restore", "rotate keys", "drain a node", "what to watch"):
        assert re.search(rf"^#+ {heading}", text, re.M), heading
    for command in re.findall(r"`(d2ft [a-z]+)", text):
        assert f"`{command}" in (ROOT / "service/README.md").read_text(), command


def test_what_was_run_and_what_was_not_is_said() -> None:
    text = README.read_text()
    assert "## What was run, and what was not" in text
    for word in ("No Docker engine", "No Kubernetes cluster", "No GPU"):
        assert word in text, word


def test_versions_agree() -> None:
    ray = re.search(r"^ray==(.*)$", (DEPLOY / "constraints.txt").read_text(), re.M)
    assert ray is not None
    for path in yaml_files():
        for each in (one for document in documents(path) for one in walk(document)):
            if isinstance(each, dict) and "rayVersion" in each:
                assert each["rayVersion"] == ray[1], path
    project = re.search(r'^version = "(.*)"$', (ROOT / "pyproject.toml").read_text(), re.M)
    assert project is not None
    for path in (*yaml_files(), DEPLOY / "Dockerfile"):
        for tag in re.findall(r"d2ft/(?:api|worker|worker-cpu):([\w.]+)|newTag: ([\w.]+)", path.read_text()):
            assert project[1] in tag, path
