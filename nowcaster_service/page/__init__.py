"""The live page: what the service says of itself, in a browser."""
