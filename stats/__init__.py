"""Statistics of what was counted and timed; numbers in, numbers out."""
