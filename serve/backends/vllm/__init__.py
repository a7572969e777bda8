"""vLLM as a backend, and as a host of the same attachments and strategies through its plugins.

- `plugin`: what vLLM's entry points call.
- `settings`: what backend and workers tell one another.
- `linears`, `packed_linear`, `loader`: our weights, in whatever format, in vLLM's own models.
- `models`, `side_stack`, `side_manager`: side networks beside those models.
- `sampling`, `rows`: our sampler inside vLLM's.
- `backend`, `builder`, `streams`, `reports`: `serve.backends.protocol.Backend` over its engine.

Modules whose names do not appear in `plugin` or `builder` need no vLLM to be imported.
"""
