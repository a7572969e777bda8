"""Language evaluation by log-likelihood: perplexity and multiple choice."""
