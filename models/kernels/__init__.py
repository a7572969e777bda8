"""Executors of a decoder's program: plain torch, native CPU, CUDA."""
