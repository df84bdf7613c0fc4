"""What tests of metrics, alerts and dashboards share."""
