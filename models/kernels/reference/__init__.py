"""Plain torch: what every other executor is tested against, and what training differentiates.

- `operations`: the mathematics of a program and of a side network, operation by operation.
- `executor`: whole steps over a plain cache.
"""
