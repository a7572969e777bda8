"""The OpenAI-style HTTP API."""

from serve.api.app import create_app
from serve.api.settings import ApiSettings

__all__ = ["ApiSettings", "create_app"]
