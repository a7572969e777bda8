"""The web interface: a client of the HTTP API, in the server's process or alone."""
