"""Quantized Side Tuning: narrow networks that read a frozen 4-bit base and steer its output."""
