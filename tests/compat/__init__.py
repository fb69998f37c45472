"""The same tests against several versions of Open WebUI."""
