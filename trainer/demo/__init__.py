"""The demo: a service and a training job on this machine, with and without nowcasts, and a report."""
