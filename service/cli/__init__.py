"""The command line: `d2ft`. Data goes to stdout, talk to stderr; exit codes are in `exits`."""

from service.cli.commands import app, main

__all__ = ["app", "main"]
