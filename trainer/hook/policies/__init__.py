"""What becomes of predictions: applied as jumps or as pushes, judged, undone or ended."""
