"""The application without Ray, as tests/service has it."""

from tests.service.conftest import api, home, models, ray, settings, submit

__all__ = ["api", "home", "models", "ray", "settings", "submit"]
