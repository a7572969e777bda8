"""The executor for one NVIDIA GPU: right, not tuned.

- `executor`: places a program on the device and runs it.
- `four_bit`: products with 4-bit matrices, by bitsandbytes.
- `graphs`: decode steps captured once and replayed.
"""
