#!/usr/bin/env python3
"""Register an archive with the running server: `skewless register`, with the same arguments."""

import sys

from skewless.cli import main

main(["register", *sys.argv[1:]])
