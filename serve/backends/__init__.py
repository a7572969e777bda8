"""What can run a request: one protocol, one module for each backend."""
