"""The training job for people who have none: configuration, data, models, loop, checkpoints and its log."""
