"""Plain torch: what every other executor is tested against, and what training differentiates."""
