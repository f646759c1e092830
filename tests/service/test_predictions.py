"""A quick look at a result, by a real client against a real server: tiny models, real children, no Ray."""

from __future__ import annotations

import asyncio
import io
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2
import psutil
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from service.cli import app
from service.client import ApiConflictError, ApiNotFoundError, Client
from service.errors import TooManyError, UnavailableError
from service.home import make_home, read_secret
from service.predictors import Predictors
from service.settings import Settings
from tests.service.both import blocking_client
from tests.service.conftest import FakeRay, free_port, serving, sizes, write_catalogue
from tests.service.results import fill_result, tiny_spec
from workers.model import build_model

Predict = Callable[..., Any]
TOP_ONE = '{"images": [{"top": [{"index": 0, "label": "a", "probability": 1.0}]}]}'


def image(color: int = 1, size: tuple[int, int] = (40, 30), kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, (color, 2 * color, 90)).save(file, kind)
    return file.getvalue()


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Settings]:
    """One service for all tests, since a child that has loaded a model takes seconds; its settings."""
    home = tmp_path_factory.mktemp("predictions") / "home"
    make_home(home)
    write_catalogue(home, {"vit_tiny_patch16_224": sizes(embed_dim=192, num_heads=3)})
    bounds = {"max_image_pixels": 10_000, "max_predict_bytes": 50_000, "max_running": 2}
    settings = Settings(home=home, port=free_port(), poll_s=0.02, use_gpu=False, **bounds)  # type: ignore[arg-type]
    ray = FakeRay(drives=True)
    with serving(settings, ray):
        yield settings
    ray.join()


@pytest.fixture
def key(served: Settings) -> str:
    return read_secret(served.home / "key") or ""


@pytest.fixture
def client(served: Settings, key: str) -> Iterator[Client]:
    with Client(served.url, key) as client:
        yield client


@pytest.fixture(scope="module")
def job_id(served: Settings) -> str:
    """A job that has succeeded, with a real result."""
    with Client(served.url, read_secret(served.home / "key")) as client:
        return succeeded(client, served)


def succeeded(client: Client, served: Settings) -> str:
    made = client.submit(tiny_spec(steps=2))
    made.wait(poll_s=0.05)
    fill_result(served.attempt_dir(made.id, 1))
    return made.id


@pytest.fixture
def post(served: Settings, key: str, job_id: str) -> Iterator[Callable[..., httpx2.Response]]:
    """A plain request for a prediction."""
    with httpx2.Client(base_url=served.url, headers={"Authorization": f"Bearer {key}"}, trust_env=False) as http:
        yield lambda **given: http.post(f"/v1/jobs/{job_id}/predict", timeout=90, **given)


def test_a_result_says_what_its_model_says(client: Client, job_id: str, tmp_path: Path) -> None:
    path = tmp_path / "grey one.png"
    path.write_bytes(image(7))
    answer = client.predict(job_id, path, image(100, kind="JPEG"), image(7, kind="WEBP"), top=2)
    first, second, third = answer.data
    assert (first.file, second.file) == ("grey one.png", "image-1") and len(first.top) == 2
    model = build_model(tiny_spec(), 3).eval()
    mean, std = (torch.tensor(model.pretrained_cfg[name])[:, None, None] for name in ("mean", "std"))
    pixels_CHW = (torch.tensor([7, 14, 90])[:, None, None] / 255).expand(-1, 16, 16)
    by_hand = model(((pixels_CHW - mean) / std)[None]).softmax(1)[0]
    for found in first.top:
        assert found.label == ("ant", "bee", "Ameise <i>")[found.index]
        assert found.probability == pytest.approx(by_hand[found.index].item(), abs=1e-5)
    assert first.top[0].probability == pytest.approx(by_hand.max().item(), abs=1e-5)
    assert third.top[0].index == first.top[0].index


def test_the_second_question_is_answered_at_once_by_the_same_child(client: Client, job_id: str) -> None:
    client.predict(job_id, image())
    child = children_of(job_id)
    assert len(child) == 1
    began = time.monotonic()
    answer = client.predict(job_id, *[image(n) for n in range(16)])
    assert len(answer.data) == 16 and answer.data[0].top
    assert time.monotonic() - began < 2 and answer.seconds < 2  # to load torch alone takes that long
    assert children_of(job_id) == child


def test_the_async_client_and_the_handle_say_the_same(client: Client, served: Settings, key: str, job_id: str) -> None:
    with blocking_client(served.url, key) as other:
        assert other.predict(job_id, image(), top=3).data == client.predict(job_id, image(), top=3).data
        assert other.job(job_id).predict(image()) is not None
    assert client.job(job_id).predict(image(), top=1)[0].top[0].probability > 0


def test_an_image_is_the_body_or_part_of_a_form(post: Callable[..., httpx2.Response]) -> None:
    plain = post(content=image(), headers={"Content-Type": "image/png"}, params={"top": 1})
    assert plain.status_code == 200, plain.text
    assert plain.json()["data"][0]["file"] is None and len(plain.json()["data"][0]["top"]) == 1
    form = post(files={"images": ("a.png", image(), "image/png")}, params={"top": 1})
    assert form.json()["data"][0]["top"] == plain.json()["data"][0]["top"] and form.json()["object"] == "list"
    unknown = post(content=image(), headers={"Content-Type": "application/octet-stream; x=y"})
    assert unknown.status_code == 200


def test_what_is_no_image_is_refused_and_named(post: Callable[..., httpx2.Response]) -> None:
    def answer(status: int, code: str, **given: Any) -> Any:
        found = post(**given)
        assert (found.status_code, found.json()["code"]) == (status, code), found.text
        return found.json()

    png = {"Content-Type": "image/png"}
    answer(415, "unsupported_media_type", json={})
    answer(415, "unsupported_media_type", content=image(), headers={"Content-Type": "image/svg+xml"})
    answer(422, "no_image", content=b"", headers=png)
    answer(422, "no_image", data={"images": "text"}, files={"other": ("a", b"")})
    answer(422, "no_image", content=b"--x\r\ncut", headers={"Content-Type": "multipart/form-data; boundary=x"})
    answer(422, "invalid_form", content=b"x", headers={"Content-Type": "multipart/form-data"})
    answer(422, "invalid_form", files=[("images", (f"{n}.png", image())) for n in range(17)])
    answer(422, "invalid_request", content=image(), headers=png, params={"top": 0})
    answer(422, "image_unreadable", content=b"<script>alert(1)</script>", headers=png)
    answer(422, "image_unreadable", content=image()[:-30], headers=png)
    tiff = io.BytesIO()
    Image.new("RGB", (8, 8)).save(tiff, "TIFF")
    answer(422, "image_unreadable", content=tiff.getvalue(), headers=png)
    good, bad = ("images", ("a.png", image())), ("images", ("b.png", b"bad"))
    told = answer(422, "image_unreadable", files=[good, bad, good, bad])
    assert [error["pointer"] for error in told["errors"]] == ["/images/1", "/images/3"]
    bomb = image(size=(2000, 2000))
    assert len(bomb) < 20_000
    assert "10000 pixels" in answer(413, "image_too_large", content=bomb, headers=png)["detail"]
    large = answer(413, "body_too_large", content=b"x" * 50_001, headers=png)
    assert "D2FT_MAX_PREDICT_BYTES" in large["detail"]
    assert post(content=image(), headers=png).status_code == 200


def test_only_ones_own_jobs_that_have_succeeded_are_tried(client: Client, served: Settings, job_id: str) -> None:
    running = client.submit({"steps": 10_000, "metadata": {"pause_s": "0.1"}})
    with pytest.raises(ApiConflictError, match="only one that has succeeded"):
        client.predict(running.id, image())
    failed = client.submit({"steps": 2, "metadata": {"outcome": "failed"}})
    failed.wait(poll_s=0.05)
    with pytest.raises(ApiConflictError, match="is failed: only one"):
        failed.predict(image())
    user = client.make_user({"name": "bob"})
    with Client(served.url, client.make_key({"user": "bob", "scopes": ["read", "write"]}).key) as bob:
        assert user.name == "bob"
        with pytest.raises(ApiNotFoundError) as theirs:
            bob.predict(job_id, image())
        with pytest.raises(ApiNotFoundError) as none:
            bob.predict("ftjob_none", image())
        assert theirs.value.code == none.value.code
    running.cancel()


def test_a_result_whose_file_is_gone_is_not_found(client: Client, served: Settings) -> None:
    job_id = succeeded(client, served)
    (served.attempt_dir(job_id, 1) / "result" / "model.safetensors").unlink()
    with pytest.raises(ApiNotFoundError, match="gone"):
        client.predict(job_id, image())


def test_a_result_that_is_damaged_is_said_to_be(client: Client, served: Settings) -> None:
    job_id = succeeded(client, served)
    (served.attempt_dir(job_id, 1) / "result" / "config.json").write_text('{"architecture": "hf-hub:evil/model"}')
    with pytest.raises(ApiConflictError, match="cannot be") as raised:
        client.predict(job_id, image())
    assert raised.value.code == "bad_result"


def test_the_command_shows_a_table_or_what_the_service_sent(
    served: Settings, job_id: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("D2FT_HOME", str(served.home))
    monkeypatch.setenv("D2FT_URL", served.url)
    paths = [tmp_path / f"{n}.png" for n in range(18)]
    for n, path in enumerate(paths):
        path.write_bytes(image(n))
    run = CliRunner().invoke
    shown = run(app, ["predict", "--job", job_id, "--top", "1", str(paths[0])])
    assert shown.exit_code == 0 and "probability" in shown.stdout and str(paths[0]) in shown.stdout
    told = json.loads(run(app, ["predict", "--job", job_id, "--json", *map(str, paths)]).stdout)
    assert [each["file"] for each in told["data"]] == [path.name for path in paths] and told["job_id"] == job_id
    paths[0].write_bytes(b"bad")
    assert run(app, ["predict", "--job", job_id, str(paths[0])]).exit_code == 2
    assert run(app, ["predict", "--job", "none", str(paths[1])]).exit_code == 3
    gone = run(app, ["predict", "--job", job_id, str(tmp_path / "gone.png")])
    assert gone.exit_code in (1, 2) and "gone.png" in gone.stderr


def children_of(job_id: str) -> list[int]:
    found = [child for child in psutil.Process().children() if job_id in " ".join(child.cmdline())]
    return [child.pid for child in found]


ANSWERS = f"""
import json, sys
for line in sys.stdin.buffer:
    sys.stdin.buffer.read(sum(json.loads(line)["sizes"]))
    print('{TOP_ONE}', flush=True)
"""


def scripted(settings: Settings, script: str, **changes: Any) -> Predictors:
    make_home(settings.home)
    return Predictors(settings.model_copy(update=changes), [sys.executable, "-c", script])


def test_a_child_that_takes_too_long_is_killed_and_the_next_request_gets_another(settings: Settings) -> None:
    async def ask() -> None:
        predictors = scripted(settings, "import time; time.sleep(60)", predict_timeout_s=0.3)
        for _ in range(2):
            with pytest.raises(UnavailableError, match="took longer than") as raised:
                await predictors.predict(Path("/tried"), [b"x"], 1)
            assert raised.value.code == "predict_timeout"
        assert children_of("/tried") == []
        await predictors.close()

    asyncio.run(ask())


@pytest.mark.parametrize("script", ["", "print('no json', flush=True)", "import os; os.kill(os.getpid(), 9)"])
def test_a_child_that_dies_is_said_to_have(settings: Settings, script: str) -> None:
    async def ask() -> None:
        predictors = scripted(settings, script)
        with pytest.raises(UnavailableError) as raised:
            await predictors.predict(Path("/tried"), [b"x" * 10_000_000], 1)
        assert raised.value.code == "predictor_died"
        await predictors.close()

    asyncio.run(ask())


def test_a_few_results_are_loaded_at_once_and_the_one_idle_longest_makes_room(settings: Settings) -> None:
    async def ask() -> None:
        predictors = scripted(settings, ANSWERS, predict_workers=2)
        for result in ("/tried1", "/tried2", "/tried1"):
            await predictors.predict(Path(result), [b"x"], 1)
        kept = children_of("/tried1")
        await predictors.predict(Path("/tried3"), [b"x"], 1)
        assert children_of("/tried2") == [] and children_of("/tried1") == kept and len(children_of("/tried3")) == 1
        await asyncio.gather(*[predictors.predict(Path("/tried1"), [b"x"], 1) for _ in range(5)])
        assert children_of("/tried1") == kept
        await predictors.close()
        assert children_of("/tried") == []

    asyncio.run(ask())


def test_a_child_that_nobody_asks_ends(settings: Settings) -> None:
    async def ask() -> None:
        predictors = scripted(settings, ANSWERS, predict_idle_s=0.2)
        await predictors.predict(Path("/tried"), [b"x"], 1)
        first = children_of("/tried")
        await asyncio.sleep(0.6)
        assert first and children_of("/tried") == []
        await predictors.predict(Path("/tried"), [b"x"], 1)
        assert children_of("/tried") != first
        await predictors.close()

    asyncio.run(ask())


def test_a_bounded_number_waits(settings: Settings) -> None:
    async def ask() -> list[Any]:
        slow = ANSWERS.replace("    print", "    import time; time.sleep(0.3); print")
        predictors = scripted(settings, slow, predict_workers=1, predict_queue=2)
        asked = [predictors.predict(Path(f"/tried{n}"), [b"x"], 1) for n in range(4)]
        told = await asyncio.gather(*asked, return_exceptions=True)
        await predictors.close()
        return told

    told = asyncio.run(ask())
    assert [isinstance(each, TooManyError) for each in told] == [False, False, False, True]


def test_the_child_inherits_no_secrets(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("D2FT_DATABASE_URL", "postgresql://user:password@host/db")
    script = "import json, os; print(json.dumps({'images': [{'top': sorted(os.environ)}]}), flush=True); input()"

    async def ask() -> list[Any]:
        predictors = scripted(settings, script)
        told: list[Any] = (await predictors.predict(Path("/tried"), [b"x"], 1))[0]
        await predictors.close()
        return told

    told = asyncio.run(ask())
    assert "PATH" in told and not any("D2FT" in name for name in told)


def test_without_torch_it_says_so_and_starts_no_child(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.predictors.importlib.util.find_spec", lambda name: None)
    predictors = Predictors(Settings(home=tmp_path))
    with pytest.raises(UnavailableError, match="without torch") as refused:
        asyncio.run(predictors.predict(tmp_path, [image()], 1))
    assert refused.value.code == "predictions_need_torch"
