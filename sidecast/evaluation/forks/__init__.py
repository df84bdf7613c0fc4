"""What a decay of the learning rate would give a run at a constant one, and how much of it its read-outs have."""
