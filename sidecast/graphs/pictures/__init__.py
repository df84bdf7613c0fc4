"""Pictures of neural graphs, as HTML and as PNG."""
