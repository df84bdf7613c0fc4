"""Running averages of a run's states: which there are, how one more state comes in, and who may have one."""
