"""Executors of a decoder's program, one folder each, behind `models.decoder.Executor`.

- `native`: a C++ library without torch; what a CPU serves with.
- `reference`: plain torch; what the others are tested against and what training differentiates.
- `cuda`: one NVIDIA GPU.

`plain_cache` and `tensors` are what more than one of them needs.
"""
