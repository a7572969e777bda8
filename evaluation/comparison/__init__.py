"""Arms against each other on the same prompts: effects, how sure they are, what a verdict needs."""
