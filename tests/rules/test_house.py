"""The house keeps its own rules: layers, room sizes, and documentation that names everything."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("scheduler", "workers", "service")
FILES = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]


def read(name):
    return (ROOT / name).read_text()


def test_imports_point_down_only():
    command = [str(Path(sys.executable).with_name("lint-imports"))]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout


def test_every_room_of_scheduler_and_workers_has_its_place_in_the_contracts():
    contracts = read("pyproject.toml").partition("[tool.importlinter]")[2]
    for package in ("scheduler", "workers"):
        for path in (ROOT / package).glob("*.py"):
            if path.stem != "__init__":
                assert re.search(rf"\b{path.stem}\b", contracts), f"{package}/{path.name} is in no contract"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_rooms_are_small_and_say_what_they_are(path):
    text = path.read_text()
    assert text.count("\n") < 400
    tree = ast.parse(text)
    assert ast.get_docstring(tree) or not text.strip()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno - node.lineno < 80, f"{node.name} is too long"


def test_unsafe_readers_are_not_used():
    for path in FILES:
        text = path.read_text()
        assert not re.search(r"^\s*(import|from) (pickle|joblib|shelve|marshal)\b", text, re.M), path
        assert not re.search(r"(?<!safetensors\.)torch\.load\(|all_gather_object", text), path


def test_every_room_is_in_its_readme():
    for package in PACKAGES:
        readme = read(f"{package}/README.md")
        for path in (ROOT / package).glob("*.py"):
            if path.stem != "__init__":
                assert re.search(rf"\b{path.stem}\b", readme), f"{package}/{path.name}"


def test_every_setting_route_and_command_is_in_the_service_readme(tmp_path):
    from service.app import create_app
    from service.cli.commands import app as command_line
    from service.settings import Settings

    readme = read("service/README.md")
    for name in Settings.model_fields:
        assert f"`D2FT_{name.upper()}`" in readme, name
    for command in command_line.registered_commands:
        assert f"`d2ft {command.name or command.callback.__name__}" in readme
    paths = create_app(Settings(home=tmp_path)).openapi()["paths"]
    for path in paths:
        if path.startswith("/v1"):
            assert path in readme, path


def test_every_event_type_is_documented():
    import workers.events as events

    emitted = set()
    for path in (ROOT / "workers").glob("*.py"):
        emitted |= set(re.findall(r'emit\(\s*(?:context, )?"([a-z.]+)"', path.read_text()))
    assert emitted and all(name in events.__doc__ for name in emitted), emitted


def test_every_make_target_is_documented():
    readmes = read("README.md") + read("tests/README.md")
    for target in re.search(r"\.PHONY: (.*)", read("Makefile"))[1].split():
        assert f"make {target}" in readmes, target


def test_every_field_of_a_job_is_in_the_readme():
    from workers.contract import Augment, JobSpec, Optimiser
    from workers.method import Method
    from workers.precision import Precision

    readme = read("README.md")
    for model in (JobSpec, Method, Optimiser, Augment, Precision):
        for name in model.model_fields:
            assert f"`{name}`" in readme, name


def test_every_kind_of_dataset_is_in_the_readme_and_in_the_contract():
    from workers.contract import JobSpec
    from workers.sources.address import STORES
    from workers.sources.opening import KINDS

    readme = read("workers/README.md")
    for kind in KINDS:
        assert f"`{kind}:" in readme, kind
    for store in STORES:
        assert f"+{store}:" in readme, store
        JobSpec(dataset=f"folder+{store}://bucket/prefix")
    for path in (ROOT / "workers/sources").glob("*.py"):
        if path.stem != "__init__":
            assert re.search(rf"^    {path.stem}  ", read("workers/sources/__init__.py"), re.M), path.name
