"""Taking over a model that another service runs: which pipeline that service is, proven on its own answers."""
