"""Templates, and how times, sizes and shares are written on pages.

Everything that comes from a user is text: Jinja escapes it, the policy below lets no inline script run, and
`plain` takes out what would turn the direction of a line or cannot be seen.
"""

from __future__ import annotations

import json
import math
import time
import unicodedata
from pathlib import Path
from typing import Any

from fastapi import Request
from fastapi.responses import HTMLResponse
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from service.lifecycle import FINAL, JobState

HERE = Path(__file__).parent
STATIC = HERE / "static"
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; connect-src 'self'; "
    "form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)
THEMES = ("light", "dark")
THEME_COOKIE = "d2ft_theme"  # set by the page itself
# state → (icon, the class of its colour)
LOOKS = {
    JobState.VALIDATING: ("◌", "wait"),
    JobState.QUEUED: ("◷", "wait"),
    JobState.PLANNING: ("◔", "work"),
    JobState.STARTING: ("◔", "work"),
    JobState.RUNNING: ("▶", "work"),
    JobState.FINALIZING: ("◕", "work"),
    JobState.RECOVERING: ("↻", "warn"),
    JobState.PAUSING: ("‖", "wait"),
    JobState.PAUSED: ("‖", "wait"),
    JobState.CANCELLING: ("⊘", "warn"),
    JobState.SUCCEEDED: ("✔", "good"),
    JobState.FAILED: ("✖", "bad"),
    JobState.CANCELLED: ("⊘", "off"),
}
_UNITS = ("B", "kB", "MB", "GB", "TB", "PB")


def page(request: Request, template: str, code: int = 200, **values: Any) -> HTMLResponse:
    """A template as an answer, with what every page knows: who looks, and in which theme."""
    theme = request.cookies.get(THEME_COOKIE)
    known = {
        "caller": getattr(request.state, "caller", None),
        "theme": theme if theme in THEMES else "auto",
        "path": request.url.path,
        "now": time.time(),
    }
    text = ENVIRONMENT.get_template(template).render({**known, **values})
    return HTMLResponse(text, code, {"Content-Security-Policy": POLICY, "Referrer-Policy": "same-origin"})


def plain(text: Any) -> str:
    """Text without control and direction characters, each of which is shown as what it is: "␀", "⟨202E⟩"."""
    return "".join(_shown(char) for char in str(text))


def _shown(char: str) -> str:
    if ord(char) < 0x20:
        return " " if char in "\t\n" else chr(0x2400 + ord(char))
    kind = unicodedata.category(char)
    return f"⟨{ord(char):04X}⟩" if kind in ("Cc", "Cf", "Cs", "Co") else char


def number(value: Any) -> float | None:
    """A finite number; None of anything else, since what a run tells of itself may be anything."""
    is_one = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return value if is_one else None


def duration(seconds: Any) -> str:
    """ "12 s", "3 min", "5 h 12 min", "4 d"."""
    seconds = number(seconds)
    if seconds is None:
        return "–"
    seconds = max(0.0, seconds)
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes, hours = int(seconds // 60), int(seconds // 3600)
    if minutes < 120:
        return f"{minutes} min"
    return f"{hours} h {minutes % 60} min" if hours < 48 else f"{hours // 24} d"


def size(count: Any) -> str:
    """ "1.5 MB", in steps of 1000."""
    count = number(count)
    if count is None:
        return "–"
    power = min(len(_UNITS) - 1, int(math.log(count, 1000))) if count >= 1 else 0
    return f"{count / 1000**power:.3g} {_UNITS[power]}" if power else f"{count:.0f} B"


def share(fraction: Any) -> str:
    fraction = number(fraction)
    return "–" if fraction is None else f"{100 * fraction:.1f} %"


def figure(value: Any, digits: int = 4) -> str:
    value = number(value)
    return "–" if value is None else f"{value:.{digits}g}"


def moment(at: float | None) -> Markup:
    """A time that the page's script turns into the reader's own zone, and its age."""
    if at is None:
        return Markup("–")
    text = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(at))
    iso = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(at))
    return Markup('<time datetime="{}" title="{}">{}</time>').format(iso, text, f"{duration(time.time() - at)} ago")


def as_json(value: Any) -> Markup:
    """For a `<script type="application/json">`, where only these end it."""
    text = json.dumps(value, separators=(",", ":"))
    return Markup(text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026"))


def pretty(value: Any) -> Markup:
    """JSON to be read and copied: what `plain` would show otherwise stands there as JSON's own escapes."""
    text = json.dumps(value, indent=2, ensure_ascii=False)
    return escape("".join(char if char == "\n" or _shown(char) == char else json.dumps(char)[1:-1] for char in text))


def brief(data: dict[str, Any]) -> str:
    """The first few plain values of an event's data, on one line."""
    told = [(key, value) for key, value in data.items() if isinstance(value, str | int | float)]
    return ", ".join(f"{key} {figure(value) if isinstance(value, float) else value}" for key, value in told[:4])


def lines(text: str) -> Markup:
    """`plain`, but for the ends of lines."""
    return escape("\n".join(map(plain, text.splitlines())))


def look(state: str) -> tuple[str, str]:
    """The icon of a state and the class of its colour."""
    return LOOKS.get(JobState(state), ("?", "off"))


ENVIRONMENT = Environment(
    loader=FileSystemLoader(HERE / "templates"),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    finalize=lambda value: value if isinstance(value, Markup) or not isinstance(value, str) else plain(value),
)
ENVIRONMENT.filters |= {
    "duration": duration, "size": size, "share": share, "figure": figure, "moment": moment, "json": as_json,
    "pretty": pretty, "lines": lines, "brief": brief, "look": look,
}  # fmt: skip
ENVIRONMENT.globals |= {"FINAL": FINAL, "LOOKS": LOOKS}
