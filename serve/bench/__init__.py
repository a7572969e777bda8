"""Measuring how fast tokens come, of an engine in this process or of a server."""
