"""Alerts as code: ``rules`` declares them, ``build`` writes the file that Prometheus reads and the page with what to do."""
