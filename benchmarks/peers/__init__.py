"""Other ways to serve the same model, for the serving benchmark: each a small server in a file of its own, see adapters.py."""
