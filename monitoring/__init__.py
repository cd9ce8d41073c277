"""Pictures of a node: the Grafana dashboard, Prometheus' alert rules, and a check of the dashboard against a Prometheus."""

from pathlib import Path

DASHBOARD = Path(__file__).with_name("grafana") / "sgnode.json"
ALERTS = Path(__file__).with_name("prometheus") / "alerts.yml"
