"""Saved checkpoints of any supported format, read tensor by tensor; one file per format."""
