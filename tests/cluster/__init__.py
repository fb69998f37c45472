"""Three Open WebUI processes over PostgreSQL and Redis, behind nginx."""
