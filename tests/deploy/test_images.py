"""The images: the Dockerfile by its linter and by the house's own rules, and the lists of what is installed."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from tests.deploy.files import DEPLOY, README, ROOT

DOCKERFILE = (DEPLOY / "Dockerfile").read_text()
TARGETS = ("api", "worker-cpu", "worker")
Stage = list[tuple[str, str]]


def stages() -> dict[str, Stage]:
    """The instructions of every stage, (NAME, rest)."""
    joined = re.sub(r"\\\n\s*", " ", "\n".join(line for line in DOCKERFILE.splitlines() if not line.startswith("#")))
    found: dict[str, Stage] = {}
    stage: Stage = []
    for line in filter(None, map(str.strip, joined.splitlines())):
        name, _, rest = line.partition(" ")
        if name == "FROM":
            stage = found[rest.split(" AS ")[1]] = []
        stage.append((name, rest))
    return found


def parent(stage: Stage) -> str:
    return stage[0][1].split(" AS ")[0]


def lineage(name: str) -> list[Stage]:
    """A stage and those below it, down to the base image."""
    found, all_stages = [], stages()
    while name in all_stages:
        found.append(all_stages[name])
        name = parent(all_stages[name])
    return found


def test_the_linter_has_nothing_to_say() -> None:
    linter = Path(sys.executable).with_name("hadolint")
    command = [str(linter), "--failure-threshold", "style", str(DEPLOY / "Dockerfile")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout


def test_the_targets_are_there_and_the_base_can_be_pinned() -> None:
    assert set(TARGETS) <= set(stages())
    assert set(map(parent, stages().values())) - set(stages()) == {"${PYTHON_IMAGE}"}
    assert re.search(r"^ARG PYTHON_IMAGE=python:3\.11-slim-bookworm$", DOCKERFILE, re.M)
    assert "PYTHON_IMAGE=python@sha256:" in README.read_text()


@pytest.mark.parametrize("name", list(stages()))
def test_every_stage_ends_as_a_user_without_rights(name: str) -> None:
    users = [rest for stage in reversed(lineage(name)) for instruction, rest in stage if instruction == "USER"]
    assert users[-1] == "10001:10001"


@pytest.mark.parametrize("name", TARGETS)
def test_images_have_what_was_built_and_nothing_of_the_builder(name: str) -> None:
    copies = [rest for stage in lineage(name) for instruction, rest in stage if instruction == "COPY"]
    assert copies and all(rest.startswith("--from=") and "/opt/d2ft" in rest for rest in copies)
    assert parent(stages()[name]) == "base"


def test_nothing_is_fetched_from_a_url_and_no_secret_is_an_argument() -> None:
    for stage in stages().values():
        for instruction, rest in stage:
            assert instruction != "ADD" and not re.search(r"\b(curl|git clone)\b", rest)
            assert instruction not in ("ARG", "ENV") or not re.search(r"TOKEN(?!=token)|PASSWORD|SECRET|_KEY\b", rest)
            assert instruction != "RUN" or "pip install" not in rest, "pip's steps belong to install.sh"


def test_what_is_copied_is_there_and_goes_to_the_builder() -> None:
    allowed = [line[1:] for line in (DEPLOY / "Dockerfile.dockerignore").read_text().splitlines() if line[:1] == "!"]
    for instruction, rest in stages()["build"]:
        if instruction == "COPY":
            for source in [word for word in rest.split()[:-1] if not word.startswith("--")]:
                assert (ROOT / source).exists() and source in allowed, source
    assert "*" in (DEPLOY / "Dockerfile.dockerignore").read_text().splitlines()


def test_image_and_check_install_by_the_same_script_and_by_the_constraints() -> None:
    script = (DEPLOY / "install.sh").read_text()
    assert "--constraint deploy/constraints.txt" in script and script.count("-m pip install") == 1
    for target in TARGETS:
        assert ("RUN", f"deploy/install.sh {target} /opt/d2ft") in stages()[f"build-{target}"]
    assert 'deploy/install.sh "$target" "$work/d2ft"' in (DEPLOY / "check-image.sh").read_text()


def test_the_api_is_a_part_of_the_whole_without_torch_and_every_package_has_one_version() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    whole = project["dependencies"] + project["optional-dependencies"]["otel"]

    def name_of(requirement: str) -> str:
        return re.split(r"[<>=\[;]", requirement)[0].lower().replace("_", "-")

    wanted = [line for line in (DEPLOY / "requirements-api.txt").read_text().splitlines() if line[:1] not in ("#", "")]
    missing = set(map(name_of, whole)) - set(map(name_of, wanted))
    assert set(map(name_of, wanted)) <= set(map(name_of, whole))
    assert missing == {"torch", "torchvision", "ray", "timm", "scikit-learn", "safetensors", "fsspec"}
    pinned = {name_of(line) for line in (DEPLOY / "constraints.txt").read_text().splitlines() if "==" in line}
    assert set(map(name_of, wanted)) | set(map(name_of, whole)) <= pinned


def test_the_service_and_its_children_load_no_more_than_that() -> None:
    modules = "service.app, service.cli, service.planner_child, service.thumbnail_child, workers.sources.parquet"
    unwanted = "torch, torchvision, ray, timm, sklearn, safetensors, fsspec"
    code = f"import sys\nfor name in '{unwanted}'.split(', '): sys.modules[name] = None\nimport {modules}"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=120)
