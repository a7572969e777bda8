"""Chat templates, tokenizers, training texts: the only place that knows text."""
