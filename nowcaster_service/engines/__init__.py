"""Whose turn it is with an engine, and what happens to one that hangs or dies; free of Ray."""
