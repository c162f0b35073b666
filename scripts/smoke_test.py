#!/usr/bin/env python3
"""Prove that a served model answers as evaluated: `skewless smoke`, with the same arguments."""

import sys

from skewless.cli import main

main(["smoke", *sys.argv[1:]])
