"""Trying a new version of a model on live traffic: a gateway that splits it, and a rollout that moves the split."""
