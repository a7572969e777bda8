"""Quantized Side Tuning: narrow networks that read a frozen 4-bit base and steer its output."""

from adapters.qst.adapter import QstAdapter, load_qst, save_qst
from adapters.qst.config import QstConfig
from adapters.qst.convert import convert_published
from adapters.qst.network import QstNetwork

__all__ = [
    "QstAdapter",
    "QstConfig",
    "QstNetwork",
    "convert_published",
    "load_qst",
    "save_qst",
]
