"""Serving: the engine, the backends, the HTTP API and the command line."""
