"""The telemetry adapter: listens to the core's events and tells Prometheus and the log."""
