"""Programs that models write: data sets, prompts, the sandbox that runs them, and their scores."""
