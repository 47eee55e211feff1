"""What the gateway tells of itself: metrics for Prometheus, log lines, and spans for OpenTelemetry."""
