"""The courier: the process beside each rank that does all networking; it imports neither torch nor the hook."""
