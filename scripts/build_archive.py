#!/usr/bin/env python3
"""Package a checkpoint as a model archive: `skewless build`, with the same arguments."""

import sys

from skewless.cli import main

main(["build", *sys.argv[1:]])
