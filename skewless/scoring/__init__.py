"""Scoring folders of files with a built archive, by several processes or machines, as a server would answer them."""
