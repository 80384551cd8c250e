"""Grafana dashboards as code: one module a dashboard; ``build`` writes what Grafana reads into ``json/``."""
