"""NiNo, the graph network that nowcasts weights, and WNN+, the same without messages between edges."""
