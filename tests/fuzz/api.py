"""Schemathesis against the whole API on a real socket, with an administrator's key and the token of a run.

python -m tests.fuzz.api             a long run, FUZZ_SECONDS of it (by default 1800), then a summary on stdout
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx2

from service.home import make_home, read_secret
from service.settings import Settings
from service.store import Store
from tests.service.conftest import FakeRay, free_port, serving, sizes, write_catalogue
from workers.sweeps.contract import SweepSpec

ST = Path(sys.executable).with_name("st")
CONFIG = Path(__file__).with_name("schemathesis.toml")
MODELS = {
    "d2ft_digits": sizes(img_size=28, patch_size=4, in_chans=1, embed_dim=96, depth=6, num_heads=6),
    "vit_tiny_patch16_224": sizes(embed_dim=192, num_heads=3),
    "resnet50": "architecture resnet is not a vision transformer",
}


@contextmanager
def fuzzed(home: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """(the URL of a service of its own, the environment with its key and the token of a run that goes on)."""
    make_home(home)
    write_catalogue(home, MODELS)
    settings = Settings(home=home, port=free_port(), use_gpu=False, webhooks=True, webhook_networks="127.0.0.0/8")  # type: ignore[arg-type]
    ray = FakeRay()
    token = _start_run(settings, ray)
    with serving(settings, ray) as url:
        key = read_secret(home / "key") or ""
        me = _ask(url, key, "/v1/me").json()
        own = {"D2FT_FUZZ_KEY_ID": me["key_id"], "D2FT_FUZZ_USER_ID": me["user"]["id"]}
        paths = {"PYTHONPATH": str(Path(__file__).parents[2]), "SCHEMATHESIS_HOOKS": "tests.fuzz.hooks"}
        yield url, {**os.environ, **paths, **own, "D2FT_FUZZ_KEY": key, "D2FT_FUZZ_RUN": token}


def _start_run(settings: Settings, ray: FakeRay) -> str:
    """Have a sweep run whose driver says nothing by itself."""
    store = Store(settings.store_url)
    space = {"seed": {"values": [1, 2]}}
    store.sweeps.create(SweepSpec.model_validate({"name": "the run that posts", "space": space}), owner="user_first")
    attempt = store.queue.claim_sweep(1)
    assert attempt
    store.close()
    ray.jobs[attempt.submission_id] = {"submission_id": attempt.submission_id, "status": "RUNNING", "message": ""}
    return str(attempt.token)


def fuzz(url: str, env: dict[str, str], directory: Path, command: str, *options: str) -> tuple[int, str]:
    """(exit code, what was printed). Raises AssertionError where the key does not open the service afterwards."""
    key = env["D2FT_FUZZ_KEY"]
    described = directory / "openapi.json"  # the service shows it to nobody without a key
    described.write_bytes(_ask(url, key, "/openapi.json").content)
    asked = [str(ST), "--config-file", str(CONFIG), "--no-color", command, str(described), "--url", url, *options]
    done = subprocess.run(asked, env=env, cwd=directory, capture_output=True, text=True)
    still_in = _ask(url, key, "/v1/users").status_code == 200
    assert still_in, "the run has taken its own key away: what came after that tested nothing"
    return done.returncode, done.stdout + done.stderr


def _ask(url: str, key: str, path: str) -> httpx2.Response:
    return httpx2.get(f"{url}{path}", headers={"Authorization": f"Bearer {key}"}, trust_env=False)


def main() -> int:
    seconds = int(os.environ.get("FUZZ_SECONDS", "1800"))
    with tempfile.TemporaryDirectory(prefix="d2ft-fuzz-") as name:
        directory = Path(name)
        with fuzzed(directory / "home") as (url, env):
            began = time.monotonic()
            options = ("--max-time", str(seconds), "--max-examples", os.environ.get("FUZZ_EXAMPLES", "500"))
            code, text = fuzz(url, env, directory, "run", *options)
            took_s = time.monotonic() - began
    failures = re.findall(r"^- (ST\d+ .+)$", text, re.MULTILINE)
    print(text if failures or code else text[text.rfind("SUMMARY") :])
    print(f"fuzzed for {took_s:.0f} s: {len(failures)} failures")
    return code


if __name__ == "__main__":
    sys.exit(main())
