"""Relations between types: half precision, steps of 8 and 16 bits, truncation, integers that overflow."""

from __future__ import annotations

from typing import Any

import numpy as np

from skewless.programs.relation.pair import (
    Pair,
    Relation,
    in_blocks,
    number,
    places_in,
    ratio_numbers,
    sample_first,
    slope_of,
    times_training,
)

STEPS = {
    1.0: "whole numbers",
    2 / 255: "8-bit steps of 2/255",
    1 / 127: "8-bit steps of 1/127",
    1 / 128: "8-bit steps of 1/128",
    1 / 255: "8-bit steps of 1/255",
    1 / 256: "8-bit steps of 1/256",
    1 / 32767: "16-bit steps of 1/32767",
    1 / 32768: "16-bit steps of 1/32768",
}
FACTORS = (32768.0, 32767.0, 256.0, 255.0, 128.0, 127.5, 127.0)  # between integers and [-1, 1] or [0, 1]
# The distance by which an integer type wraps around, its step, and its name; also after the division by full scale.
WRAPS = (
    (65536.0, 1.0, "16-bit integers"),
    (256.0, 1.0, "8-bit integers"),
    (2.0**32, 1.0, "32-bit integers"),
    (2.0, 1 / 32768, "16-bit integers divided by 32768"),
    (256 / 255, 1 / 255, "8-bit integers divided by 255"),
)


def as_type(pair: Pair) -> Relation | None:
    return _wrapped(pair) or _stepped(pair) or _half(pair)


def _wrapped(pair: Pair) -> Relation | None:
    for modulus, step, name in WRAPS:
        for side, exact, wrapped in (("the service", 0, 1), ("training", 1, 0)):
            low, high = pair.low[wrapped], pair.high[wrapped]
            lower, upper = (0.0, modulus - step) if low >= 0 else (-modulus / 2, modulus / 2 - step)
            fits = low >= lower - step / 2 and high <= upper + step / 2
            beyond = pair.low[exact] < lower - step or pair.high[exact] > upper + step
            if not fits or not beyond or pair.r.size < 8:
                continue
            tolerance = max(pair.tolerance, 1.01 * step)
            if all(np.abs(_from_multiple(c - r, modulus)).max() <= tolerance for r, c in sample_first(pair)):
                count = sum(int((np.abs(c - r) > modulus / 2).sum()) for r, c in in_blocks(pair.r, pair.c))
                text = (
                    f"{side} wraps around at {count} of {pair.r.size} numbers, which are {number(modulus)} off:"
                    f" an overflow of {name}"
                )
                return pair.relation("type", text, {"modulus": modulus, "count": count, "of": pair.r.size})
    return None


def _stepped(pair: Pair, ratio: float = 1.0) -> Relation | None:
    """One side lies on a grid, and the other within a step of it; or both do, and one is nearer to zero by one step.

    With a ratio, of which the service's numbers are rounded: then a scale, with that rounding.
    """
    r, c = pair.sample[0] * ratio, pair.sample[1]
    for step, name in STEPS.items():
        if step <= 2 * pair.tolerance_of(ratio) or np.abs(r - c).max() > 1.02 * step:
            continue
        on_r, on_c = _on_grid(r, step), _on_grid(c, step)
        both = on_r.all() and on_c.all()
        if both and ratio != 1:
            continue
        if not both and not (on_c.all() and on_r.mean() < 0.9) and not (on_r.all() and on_c.mean() < 0.9):
            continue
        service = bool(on_c.all()) if not both else True
        if not service and ratio != 1:
            continue
        if pair.low[service] == pair.high[service]:  # a constant is no grid
            continue
        if not all(_on_grid(x, step).all() for x, _ in in_blocks(*((pair.c, pair.r) if service else (pair.r, pair.c)))):
            continue
        nearest = down = up = inward = outward = True
        changed = 0
        slack = 0.02 * step
        for x, y in in_blocks(pair.r, pair.c):
            x = x * ratio
            if not service:
                x, y = y, x
            gap = y - x
            nearest &= bool(np.abs(gap).max() <= 0.5 * step + slack)
            down &= bool(gap.max() <= slack and gap.min() >= -step - slack)
            up &= bool(gap.min() >= -slack and gap.max() <= step + slack)
            toward = gap * np.sign(x)
            inward &= bool(toward.max() <= slack and np.abs(gap).max() <= step + slack)
            outward &= bool(toward.min() >= -slack and np.abs(gap).max() <= step + slack)
            changed += int((np.abs(gap) > slack).sum())
        side, other = ("the service", "training") if service else ("training", "the service")
        numbers: dict[str, Any] = {"step": step, "side": side, "count": changed, "of": pair.r.size}
        if both:
            if not 0.05 <= changed / pair.r.size <= 0.95 or len(np.unique(r)) < 16 or not (inward or outward):
                continue
            cut, near = ("the service", "training") if inward else ("training", "the service")
            text = (
                f"{cut}'s numbers are one step of {number(step)} nearer to zero at {changed} of {pair.r.size}:"
                f" {cut} truncates where {near} rounds"
            )
            return pair.relation("type", text, {**numbers, "side": cut, "rounding": "truncated"})
        how = (
            "rounded" if nearest else "truncated" if inward else "rounded down" if down else "rounded up" if up else ""
        )
        if not how:
            continue
        if ratio != 1:
            text = f"the service's value is {times_training(ratio)}, {how} to {name}"
            return pair.relation("scale", text, {**ratio_numbers(ratio), **numbers, "rounding": how})
        return pair.relation("type", f"{side} has {other}'s numbers {how} to {name}", {**numbers, "rounding": how})
    return None


def as_scale_stepped(pair: Pair) -> Relation | None:
    if len(np.unique(pair.sample[1])) < 16:  # of few numbers, some ratio rounds to anything
        return None
    slope = slope_of(pair)
    known = [f for factor in FACTORS for f in (factor, 1 / factor) if abs(slope / f - 1) < 2e-3]
    return next(filter(None, (_stepped(pair, ratio) for ratio in [*known, slope] if ratio > 0)), None)


def _half(pair: Pair) -> Relation | None:
    for name, bits, rounded in (("float16", 10, _float16), ("bfloat16", 7, _bfloat16)):
        for side, other, exact, coarse in (
            ("the service", "training", pair.r, pair.c),
            ("training", "the service", pair.c, pair.r),
        ):
            places = places_in(pair.shape)
            if _few_steps(coarse[places], 2 << bits):
                continue
            if (rounded(coarse[places]) != coarse[places]).any() or (
                rounded(exact[places]) == exact[places]
            ).mean() > 0.9:
                continue
            if not all((rounded(block) == block).all() for block, _ in in_blocks(coarse, exact)):
                continue
            # Half of the distance to the next number of the type; 0.1 % more, for what training rounds in float32.
            worst = max(float((np.abs(x - y) / _spacing(y, bits, name)).max()) for x, y in in_blocks(exact, coarse))
            if worst <= 0.5005:
                text = f"{side} has {other}'s numbers rounded to {name}"
            elif pair.largest <= 2 * float(_spacing(np.array(np.abs(coarse).max()), bits, name)):
                text = f"{side} has {name} numbers, up to {number(pair.largest)} from {other}'s: calculated in {name}"
            else:
                continue
            return pair.relation("type", text, {"type": name, "side": side, "steps": worst})
    return None


def _from_multiple(values: np.ndarray, modulus: float) -> np.ndarray:
    return values - modulus * np.rint(values / modulus)


def _few_steps(values: np.ndarray, most: int) -> bool:
    """Whether the values are whole numbers of so few steps that half precision holds them, however they came to be."""
    return any(np.abs(values).max() <= most * step and _on_grid(values, step).all() for step in STEPS)


def _on_grid(values: np.ndarray, step: float) -> np.ndarray:
    """Which values lie whole steps from zero or, as 2 k / 255 - 1 does, from -1; 2 % of a step is rounding."""
    origin = -1.0 if step == 2 / 255 else 0.0
    return np.abs(_from_multiple(values - origin, step)) <= 0.02 * step


def _float16(values: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):  # beyond 65504, which then is no number of the type
        return values.astype(np.float16).astype(np.float64)


def _bfloat16(values: np.ndarray) -> np.ndarray:
    """Round to the nearest, ties to even: bfloat16 is the upper half of a float32."""
    with np.errstate(over="ignore"):
        bits = values.astype(np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).astype(np.uint32).view(np.float32).astype(np.float64)


def _spacing(values: np.ndarray, bits: int, name: str) -> np.ndarray:
    """The distance to the next number of a type with so many bits behind the point."""
    _, exponent = np.frexp(np.abs(values))
    least = -24 if name == "float16" else -133
    return np.ldexp(1.0, np.maximum(np.where(values == 0, -1074, exponent - 1 - bits), least))
