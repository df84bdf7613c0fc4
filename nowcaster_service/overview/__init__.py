"""What a service says of itself: one view, for `sidecast status` and for the page."""
