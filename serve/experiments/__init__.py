"""Votes on comparisons: kept in a file, and counted."""
