"""Ways in for people who bring their own training loop."""
