"""The hook: stages snapshots, hands them to the courier, votes on predictions and applies them."""
