"""What the daemon says of itself to a monitoring system: /metrics, /healthz and /readyz over HTTP."""
