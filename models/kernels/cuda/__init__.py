"""The executor for one NVIDIA GPU: right, not tuned.

- `executor`: places a program on the device and runs it.
- `graphs`: decode steps captured once and replayed.
"""
