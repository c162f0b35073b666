"""Two arrays of one shape: the relations that are tried, from the most specific one to the least."""

from __future__ import annotations

from collections.abc import Callable

from skewless.programs.relation.arrangement import (
    as_edges,
    as_order,
    as_order_scaled,
    as_padding,
    as_per_channel,
    as_reversed_per_channel,
    as_shift,
    as_shuffled,
    as_some,
)
from skewless.programs.relation.elementwise import (
    as_affine,
    as_clipped,
    as_constant,
    as_function,
    as_offset,
    as_same,
    as_scale,
)
from skewless.programs.relation.pair import Pair, Relation
from skewless.programs.relation.rounding import as_scale_stepped, as_type
from skewless.programs.relation.statistics import as_filter, as_noise, as_other

ATTEMPTS: tuple[Callable[[Pair], Relation | None], ...] = (
    as_same,
    as_constant,
    as_type,
    as_order,
    as_scale,
    as_offset,
    as_affine,
    as_scale_stepped,
    as_shift,
    as_clipped,
    as_padding,
    as_per_channel,
    as_order_scaled,
    as_reversed_per_channel,
    as_edges,
    as_some,
    as_shuffled,
    as_function,
    as_filter,
    as_noise,
    as_other,
)


def explain(pair: Pair) -> Relation:
    """The first relation that holds; `other` always does."""
    return next(filter(None, (attempt(pair) for attempt in ATTEMPTS)))
