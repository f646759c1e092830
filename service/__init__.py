"""The control plane: HTTP API, store, supervisor and command line. Never imports torch."""
