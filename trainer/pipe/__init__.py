"""What a training rank and its courier share: the channel between them, shared memory, and the apply log."""
