"""The node agent: one plain process that reads the records of every run of its node and serves them as Prometheus metrics."""
