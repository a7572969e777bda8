"""The executor for one NVIDIA GPU."""
