"""Against a running Open WebUI, over its socket and its API."""
