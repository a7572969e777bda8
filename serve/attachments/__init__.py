"""What is attached to the base by name: variants and side networks."""
