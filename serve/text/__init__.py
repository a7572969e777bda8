"""Text on either side of the token ids: tokenizer, chat template, detokeniser, stop strings."""
