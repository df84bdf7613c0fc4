"""What a farm has found, as tables, charts and pages."""
