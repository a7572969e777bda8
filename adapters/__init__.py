"""What attaches to a base decoder: training, files, and what the decoder runs."""
