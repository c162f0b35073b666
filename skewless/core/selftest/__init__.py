"""The self-test: what every stage and the network gave when an archive was built, and the replay that a worker must pass.

An archive's `references/` holds recordings (evaluation's own with the probabilities it measured, and synthetic probes) and a
compact record of every stage's output for each: shape, type, statistics and a fixed subsample of values.
"""

from skewless.core.selftest.record import record
from skewless.core.selftest.replay import SelfTest, SelfTestError, self_test

__all__ = ["SelfTest", "SelfTestError", "record", "self_test"]
