"""A run's folder: what is in it, where it came from, and what is drawn from it."""
