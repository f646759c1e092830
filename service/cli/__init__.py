"""The command line: `d2ft`. Data goes to stdout, talk to stderr; exit codes are in `exits`, commands in `commands`."""

from service.cli.commands import main
from service.cli.frame import app

__all__ = ["app", "main"]
