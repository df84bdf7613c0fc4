"""Which axes of a network's tensors carry which neurons, found by watching one run of it."""
