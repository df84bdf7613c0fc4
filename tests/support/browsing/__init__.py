"""A browser, and what there is for it to see."""
