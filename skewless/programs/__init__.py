"""Two programs that are not ours, compared line by line: where a service computes something that its training never has."""
