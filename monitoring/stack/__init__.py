"""What ``outgrow monitor`` starts beside the node agent: Prometheus, Alertmanager and Grafana, as plain processes."""
