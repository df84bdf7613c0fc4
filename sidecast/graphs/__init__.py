"""Neural graphs: topology, builders per model family, positional encodings."""
