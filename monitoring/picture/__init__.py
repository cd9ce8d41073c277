"""The dashboard drawn by Grafana's own components, without a Grafana."""
