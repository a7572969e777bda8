"""Evaluation of models over the HTTP API: code, chat, language, and arms against each other."""
