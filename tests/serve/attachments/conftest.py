"""The adapters of the engine's scripted model."""

from tests.serve.engine.scripted_adapters import folders

__all__ = ["folders"]
