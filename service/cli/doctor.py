"""`doctor`: looks at this machine and at the service, and says of each part whether it is well and what to do.

Each check returns findings; none changes anything, and one that breaks is a finding itself.
"""

from __future__ import annotations

import email.utils
import importlib.metadata
import re
import shutil
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import httpx2
import typer

from scheduler.errors import D2ftError
from service.cli import talk
from service.cli.exits import Exit
from service.cli.frame import Json, Url, command, connected, service_url
from service.cli.machine import existing
from service.cli.profile import profile_path
from service.client import ApiNotFoundError
from service.home import KEY_FILE, SECRET_FILE, read_secret, read_server
from service.processes import find
from service.settings import ClientSettings, Settings

OK, WARN, FAIL = "ok", "warn", "fail"
LITTLE_DISK_BYTES, NO_DISK_BYTES = 5 * 10**9, 10**9
SKEW_S, MUCH_SKEW_S = 5.0, 300.0
_STYLES = {OK: "green", WARN: "yellow", FAIL: "red"}
_REQUIREMENT = re.compile(r"([A-Za-z0-9._-]+)(?:\[[^]]*\])?([^;]*)(;.*extra.*)?")


@dataclass(frozen=True)
class Finding:
    """What was found of one part, and what to do about it."""

    name: str
    state: str
    detail: str
    fix: str | None = None


@dataclass(frozen=True)
class Patient:
    """What the checks look at."""

    settings: Settings
    url: str
    asked: bool  # the user named this service, by flag, environment or login


@command()
def doctor(url: Url = None, json_: Json = False) -> None:
    """Check this machine and the service, and say what to do; exit code 1 when something fails."""
    client = ClientSettings()
    target = service_url(url, client)
    patient = Patient(Settings(), target, asked=bool(url or client.url or profile_path().exists()))
    findings = list(examine(patient))
    if json_:
        talk.put_json({"object": "list", "data": [asdict(finding) for finding in findings]})
    else:
        for finding in findings:
            _put(finding)
    raise typer.Exit(Exit.FAILED if any(finding.state == FAIL for finding in findings) else Exit.OK)


def examine(patient: Patient) -> Iterator[Finding]:
    """All findings, one check after the other."""
    for name, check in CHECKS.items():
        try:
            yield from check(patient)
        except Exception as error:
            yield Finding(name, FAIL, f"the check itself broke: {type(error).__name__}: {error}")


def check_python(patient: Patient) -> Iterator[Finding]:
    text = ".".join(map(str, sys.version_info[:3]))
    good = sys.version_info >= (3, 11)
    yield Finding("python", OK if good else FAIL, text, None if good else "Install Python 3.11 or newer.")


def check_packages(patient: Patient) -> Iterator[Finding]:
    """Every requirement is there, in a version that was tried."""
    wrong = [text for text in map(_complaint, importlib.metadata.requires("d2ft") or []) if text]
    own = importlib.metadata.version("d2ft")
    if wrong:
        yield Finding("packages", FAIL, "; ".join(wrong), "pip install --upgrade d2ft")
    else:
        yield Finding("packages", OK, f"d2ft {own}, all requirements met")


def check_home(patient: Patient) -> Iterator[Finding]:
    home = patient.settings.home
    if not home.exists():
        yield Finding("home", OK, f"{home} is not made yet; d2ft up makes it")
    elif not home.is_dir() or not _writable(home):
        yield Finding("home", FAIL, f"{home} cannot be written", "chown it to yourself, or set D2FT_HOME")
    elif home.stat().st_mode & 0o077:
        yield Finding("home", WARN, f"{home} is open to others", f"chmod 700 {home}")
    else:
        yield Finding("home", OK, f"{home} is writable and private")


def check_disk(patient: Patient) -> Iterator[Finding]:
    free = shutil.disk_usage(existing(patient.settings.home)).free
    state = FAIL if free < NO_DISK_BYTES else WARN if free < LITTLE_DISK_BYTES else OK
    fix = None if state == OK else "Free some: old jobs lie in D2FT_HOME/jobs, checkpoints in D2FT_STORAGE_PATH."
    yield Finding("disk", state, f"{free / 1e9:.1f} GB free", fix)


def check_secrets(patient: Patient) -> Iterator[Finding]:
    home = patient.settings.home
    paths = [home / KEY_FILE, home / SECRET_FILE, patient.settings.token_file, profile_path()]
    there = [path for path in paths if path.exists()]
    open_ = [path for path in there if stat.S_IMODE(path.stat().st_mode) & 0o077]
    for path in open_:
        yield Finding("secrets", FAIL, f"{path} can be read by others", f"chmod 600 {path}, and make a new one")
    if not open_:
        yield Finding("secrets", OK, f"{len(there)} files, each for its owner alone")


def check_store(patient: Patient) -> Iterator[Finding]:
    """The database opens, and its tables are of this version."""
    settings = patient.settings
    path = settings.home / "d2ft.db"
    if settings.database_url is None and not path.exists():
        yield Finding("store", OK, "not made yet; d2ft up makes it")
        return
    url = settings.database_url or f"sqlite:///file:{path}?mode=ro&uri=true"
    found, newest, known = _revisions(url)
    if found == newest:
        yield Finding("store", OK, f"opens, tables {found}")
    elif found in known or found is None:
        yield Finding("store", WARN, f"tables {found or 'none'}, newest {newest}", "d2ft down, then d2ft up")
    else:
        fix = "Install the version that made it, or a newer one; older ones do not read it."
        yield Finding("store", FAIL, f"tables {found} come from a newer version", fix)


def check_port(patient: Patient) -> Iterator[Finding]:
    settings = patient.settings
    noted = read_server(settings.home)
    with socket.socket(socket.AF_INET6 if ":" in settings.host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((settings.host, settings.port))
        except OSError as error:
            ours = find(noted.get("api")) and noted.get("url") == settings.url
            text = f"{settings.port}: {'our API has it' if ours else error.strerror}"
            fix = None if ours else "d2ft up --port OTHER, or set D2FT_PORT"
            yield Finding("port", OK if ours else WARN, text, fix)
            return
    yield Finding("port", OK, f"{settings.port} is free")


def check_ray(patient: Patient) -> Iterator[Finding]:
    settings = patient.settings
    noted = read_server(settings.home)
    address = settings.ray_address or noted.get("ray_address")
    if not address:
        yield Finding("ray", OK, "not started here; d2ft up starts it")
        return
    headers = {"Authorization": f"Bearer {read_secret(settings.token_file) or ''}"}
    try:
        answer = httpx2.get(f"{address}/api/jobs/", headers=headers, timeout=5.0, trust_env=False)
    except httpx2.RequestError as error:
        yield Finding("ray", FAIL, f"{address}: {error or type(error).__name__}", "d2ft up; see logs/ray.log in home")
        return
    if answer.status_code in (401, 403):
        fix = "Set D2FT_RAY_TOKEN_PATH to the cluster's token."
        yield Finding("ray", FAIL, f"{address} refuses the token in {settings.token_file}", fix)
    elif answer.is_success:
        yield Finding("ray", OK, f"{address} takes our token")
    else:
        yield Finding("ray", FAIL, f"{address} answered {answer.status_code}", "See logs/ray.log in home.")


def check_gpu(patient: Patient) -> Iterator[Finding]:
    program = shutil.which("nvidia-smi")
    if program is None:
        yield Finding("gpu", OK, "none seen (no nvidia-smi): jobs train on CPUs")
        return
    query = [program, "--query-gpu=name,memory.total", "--format=csv,noheader"]
    done = subprocess.run(query, capture_output=True, text=True, timeout=20, check=False)
    names = [line.strip() for line in done.stdout.splitlines() if line.strip()]
    if done.returncode == 0 and names:
        yield Finding("gpu", OK, "; ".join(names))
    else:
        said = (done.stderr or done.stdout).strip().partition("\n")[0]
        yield Finding("gpu", WARN, f"nvidia-smi sees none: {said}", "Check the driver; jobs train on CPUs.")


def check_service(patient: Patient) -> Iterator[Finding]:
    """It answers, is ready, and takes the key."""
    noted = read_server(patient.settings.home).get("api")
    try:
        with connected(patient.url) as client:
            states = client.ready()
            yield _readiness(patient.url, states)
            me = client.me()
            yield Finding("key", OK, f"{me.user.name}, may {', '.join(me.scopes)}")
    except ApiNotFoundError as error:
        yield Finding("service", FAIL, error.message, "Is this the address of the service?")
    except D2ftError as error:
        if error.code != "unreachable":
            yield Finding("key", FAIL, error.message, "d2ft login URL, or set D2FT_API_KEY.")
        elif patient.asked or noted:
            yield Finding("service", FAIL, f"{patient.url} does not answer", "d2ft up; see logs/api.log in home")
        else:
            yield Finding("service", WARN, f"{patient.url} does not answer", "d2ft up")


def check_clock(patient: Patient) -> Iterator[Finding]:
    """Ages, deadlines and signatures of webhooks go wrong where two clocks do not agree."""
    try:
        answer = httpx2.get(f"{patient.url}/healthz", timeout=5.0)
        told = email.utils.parsedate_to_datetime(answer.headers["date"]).timestamp()
    except (httpx2.RequestError, KeyError, ValueError):
        return
    skew = time.time() - told
    state = OK if abs(skew) <= SKEW_S else WARN if abs(skew) <= MUCH_SKEW_S else FAIL
    yield Finding("clock", state, f"{skew:+.0f} s from the service's", None if state == OK else "Set it by NTP.")


CHECKS: dict[str, Callable[[Patient], Iterator[Finding]]] = {
    "python": check_python,
    "packages": check_packages,
    "home": check_home,
    "disk": check_disk,
    "secrets": check_secrets,
    "store": check_store,
    "port": check_port,
    "ray": check_ray,
    "gpu": check_gpu,
    "service": check_service,
    "clock": check_clock,
}


def _put(finding: Finding) -> None:
    talk.put_styled(f"{finding.state:5}", _STYLES[finding.state], f" {finding.name:10}{talk.line(finding.detail)}")
    if finding.fix:
        talk.put(f"      {'':10}→ {finding.fix}")


def _readiness(url: str, states: dict[str, str]) -> Finding:
    ill = {part: state for part, state in states.items() if state != "ok"}
    if not ill:
        return Finding("service", OK, f"{url} is ready")
    text = ", ".join(f"{part}: {state}" for part, state in ill.items())
    return Finding("service", FAIL if "store" in ill else WARN, f"{url}: {text}", "d2ft up; see the logs in home")


def _revisions(url: str) -> tuple[str | None, str | None, set[str]]:
    """(of the tables, the newest that we know, all that we know). Opened to be read: nothing is migrated here."""
    from service.store.revisions import read_revisions  # here: the other commands do without a database library

    return read_revisions(url)


def _complaint(requirement: str) -> str | None:
    """What is wrong with one of our requirements, if anything."""
    match = _REQUIREMENT.match(requirement)
    if match is None or match[3]:
        return None
    name, wanted = match[1], match[2]
    try:
        found = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return f"{name} is not installed"
    for operator, bound in re.findall(r"(>=|<)\s*([0-9.]+)", wanted):
        if (_numbers(found) < _numbers(bound)) == (operator == ">="):
            return f"{name} is {found}, wanted {wanted.strip()}"
    return None


def _numbers(version: str) -> tuple[int, ...]:
    match = re.match(r"[0-9]+(?:\.[0-9]+)*", version)
    return tuple(map(int, match[0].split("."))) if match else ()


def _writable(directory: Path) -> bool:
    probe = directory / ".doctor"
    try:
        probe.touch()
        probe.unlink()
    except OSError:
        return False
    return True
