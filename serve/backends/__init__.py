"""What can run a request: one protocol, and the backends by name."""

BACKENDS = {
    "native": "serve.backends.native_builder",
    "vllm": "serve.backends.vllm.builder",
}
"""Name of a backend: the module whose `build` makes it (see `serve.backends.building`). It is
imported when it is asked for, since a backend may need libraries that are slow or not installed.
"""
