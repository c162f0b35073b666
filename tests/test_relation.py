"""In which way one array differs from another: one planted example for each kind, and near misses."""

from __future__ import annotations

import itertools
import json
from dataclasses import asdict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose
from scipy import signal

from skewless.errors import UsageError
from skewless.programs.relation import KINDS, Relation, describe

RATE = 16000


def waveform(n: int = 40000, seed: int = 1) -> np.ndarray:
    """Coloured noise below full scale, in [-0.7, 0.7]."""
    noise = signal.lfilter([1], [1, -0.9], np.random.default_rng(seed).normal(size=n))
    return 0.7 * noise / np.abs(noise).max()


def picture(height: int = 62, width: int = 82) -> np.ndarray:
    """A smooth picture, (height, width, 3), in [0, 1]."""
    noise = np.random.default_rng(2).random((height + 8, width + 8, 3))
    return signal.convolve(noise, np.ones((9, 9, 1)) / 81, mode="valid")


def spectrogram() -> np.ndarray:
    """Decibels below the maximum, (64, 205), without a floor."""
    noise = np.random.default_rng(3).normal(size=(66, 207)) * 60
    smooth = signal.convolve(noise, np.ones((3, 3)) / 9, mode="valid")
    return smooth - smooth.max()


def bag() -> np.ndarray:
    """Segments of a recording, (10, 3, 16, 20)."""
    return np.random.default_rng(4).normal(size=(10, 3, 16, 20))


def kind_of(reference: object, candidate: object, **options: float) -> str:
    return told(reference, candidate, **options).kind


def told(reference: object, candidate: object, **options: float) -> Relation:
    """The relation, of which everything is ready for JSON and the sentence is one line."""
    relation = describe(np.asarray(reference), np.asarray(candidate), **options)
    assert relation.kind in KINDS
    assert "\n" not in relation.text and relation.text
    assert json.loads(json.dumps(asdict(relation), allow_nan=False)) == asdict(relation)
    return relation


# --- the same


def test_equal_numbers_are_the_same_whatever_their_type_and_axes_of_length_1() -> None:
    x = waveform()
    relation = told(x, x.astype(np.float32)[None, :, None])
    assert relation.kind == "same"
    assert relation.largest is not None and 0 < relation.largest < 1e-7
    assert_allclose(relation.relative, relation.largest / 0.7)
    assert kind_of([1, 0, 1], [True, False, True]) == "same"


def test_rtol_decides_what_is_the_same() -> None:
    x = waveform()
    y = x + 2e-5 * 0.7
    assert kind_of(x, y) == "offset"
    assert kind_of(x, y, rtol=3e-5) == "same"
    assert kind_of(x, y, rtol=0) == "offset"


# --- types


@pytest.mark.parametrize("side", ["the service", "training"])
def test_rounding_to_float16(side: str) -> None:
    x = waveform()
    pair = (x, x.astype(np.float16)) if side == "the service" else (x.astype(np.float16), x)
    relation = told(*pair)
    assert (relation.kind, relation.numbers["type"], relation.numbers["side"]) == ("type", "float16", side)
    assert 0.4 < relation.numbers["steps"] <= 0.5005
    assert "rounded to float16" in relation.text


def test_rounding_to_bfloat16() -> None:
    torch = pytest.importorskip("torch")
    x = waveform().astype(np.float32)
    y = torch.from_numpy(x).to(torch.bfloat16).float().numpy()
    assert told(x, y).numbers["type"] == "bfloat16"


def test_arithmetic_in_float16_is_told_from_rounding() -> None:
    x = spectrogram() / 100
    y = (x.astype(np.float16) + np.float16(1)) / np.float16(2)
    relation = told((x + 1) / 2, y)
    assert relation.kind == "type"
    assert "calculated in float16" in relation.text


def test_one_number_that_is_a_step_off_is_not_rounding_to_float16() -> None:
    x = waveform()
    y = x.astype(np.float16)
    y[100] = np.nextafter(y[100], np.float16(1))
    assert "rounded" not in told(x, y).text


def test_noise_of_the_size_of_float16s_steps_is_not_called_float16() -> None:
    x = waveform()
    y = x * (1 + np.random.default_rng(0).uniform(-1, 1, x.size) * 2.0**-12)
    assert kind_of(x, y) == "noise"


@pytest.mark.parametrize(
    ("convert", "rounding"), [(np.rint, "rounded"), (np.trunc, "truncated"), (np.floor, "rounded down")]
)
@pytest.mark.parametrize("steps", [32768, 128])
def test_steps_of_a_waveform(convert: np.ufunc, rounding: str, steps: int) -> None:
    x = waveform()
    relation = told(x, convert(x * steps) / steps)
    assert relation.kind == "type"
    assert relation.numbers["step"] == 1 / steps
    assert relation.numbers["rounding"] == rounding


def test_steps_of_a_picture() -> None:
    x = picture()
    assert told(x * 255, (x * 255).astype(np.uint8)).numbers["rounding"] == "truncated"
    assert told(x, np.rint(x * 255) / 255).numbers["step"] == 1 / 255
    assert told(x * 2 - 1, np.rint(x * 255) / 127.5 - 1).numbers["step"] == 2 / 255
    assert told(np.rint(x * 255), x * 255).numbers["side"] == "training"


def test_truncation_against_rounding() -> None:
    x = picture() * 255
    relation = told(np.rint(x), x.astype(np.uint8))
    assert (relation.kind, relation.numbers["rounding"]) == ("type", "truncated")
    assert "the service truncates where training rounds" in relation.text
    assert 0.4 < relation.numbers["count"] / relation.numbers["of"] < 0.6
    relation = told(x.astype(np.uint8), np.rint(x))
    assert "training truncates where the service rounds" in relation.text


def test_one_step_up_and_down_is_not_truncation() -> None:
    x = np.rint(picture() * 255)
    y = x + np.random.default_rng(0).integers(-1, 2, x.shape)
    assert kind_of(x, y) not in ("type", "scale", "offset")


def test_pictures_a_few_steps_apart_are_not_called_half_precision() -> None:
    x = picture() * 255
    y = np.rint(x + np.random.default_rng(0).uniform(-1, 1, x.shape))
    assert kind_of(x, y) == "noise"


@pytest.mark.parametrize(
    ("reference", "wrapped", "modulus"),
    [
        (waveform() * 60000, lambda x: x.astype(np.int64).astype(np.int16), 65536),
        (picture() * 500, lambda x: x.astype(np.int64).astype(np.uint8), 256),
        (waveform() * 1.6, lambda x: np.rint(x * 32768).astype(np.int64).astype(np.int16) / 32768, 2),
    ],
)
def test_integers_that_overflow(reference: np.ndarray, wrapped: object, modulus: float) -> None:
    candidate = wrapped(reference)  # type: ignore[operator]
    relation = told(reference, candidate)
    beyond = int((np.abs(reference - candidate) > modulus / 2).sum())
    assert beyond > 0
    assert (relation.kind, relation.numbers["modulus"], relation.numbers["count"]) == ("type", modulus, beyond)
    assert "overflow" in relation.text


def test_a_limit_is_not_an_overflow() -> None:
    x = np.rint(waveform() * 60000)
    assert kind_of(x, np.clip(x, -32768, 32767)) == "clipped"


@pytest.mark.parametrize(("factor", "rounding"), [(32767, "truncated"), (32768, "rounded")])
def test_a_scale_to_integers_is_told_with_its_rounding(factor: int, rounding: str) -> None:
    x = waveform()
    y = x * factor if rounding == "truncated" else np.rint(x * factor)
    relation = told(x, y.astype(np.int16))
    assert (relation.kind, relation.numbers["ratio"], relation.numbers["rounding"]) == ("scale", factor, rounding)


# --- order


def test_channels_reversed() -> None:
    x = (picture() * 255).astype(np.uint8)
    relation = told(x, x[..., ::-1])
    assert (relation.kind, relation.numbers["mirrored"]) == ("order", [2])
    assert "RGB against BGR" in relation.text and "ratio" not in relation.numbers
    assert kind_of([0.1, 0.2, 0.3], [0.3, 0.2, 0.1]) == "order"  # and not 0.4 minus training's


@pytest.mark.parametrize(
    ("change", "axes", "mirrored"),
    [
        (lambda x: x.transpose(2, 0, 1), [2, 0, 1], []),
        (lambda x: x.transpose(2, 0, 1)[::-1], [2, 0, 1], [2]),
        (lambda x: x[:, ::-1], [0, 1, 2], [1]),
        (lambda x: x[::-1, ::-1], [0, 1, 2], [0, 1]),
        (lambda x: np.rot90(x), [1, 0, 2], [1]),
    ],
)
def test_axes_permuted_and_mirrored(change: object, axes: list[int], mirrored: list[int]) -> None:
    x = picture()
    relation = told(x, change(x))  # type: ignore[operator]
    assert relation.kind == "order"
    assert relation.numbers == {"axes": axes, "mirrored": mirrored}


def test_a_square_picture_turned_has_the_same_shape() -> None:
    x = picture(40, 40)
    relation = told(x, x.transpose(1, 0, 2))
    assert (relation.kind, relation.numbers["axes"]) == ("order", [1, 0, 2])


def test_slices_permuted() -> None:
    order = [3, 1, 2, 0, 4, 5, 6, 7, 9, 8]
    relation = told(bag(), bag()[order])
    assert (relation.kind, relation.numbers["axis"], relation.numbers["order"]) == ("order", 0, order)


def test_channels_turned_round() -> None:
    assert told(picture(), picture()[..., [1, 2, 0]]).numbers["order"] == [1, 2, 0]


def test_a_letterbox_at_another_place_is_a_shift_and_no_permutation() -> None:
    centred, first = (np.pad(spectrogram() / 80, (rows, (0, 0)), constant_values=-1) for rows in ((20, 20), (0, 40)))
    relation = told(centred, first)
    assert (relation.kind, relation.numbers["shift"], relation.numbers["axis"]) == ("shift", -20, 0)


def test_a_reshape_in_place_of_a_transpose() -> None:
    x = picture(50, 40)
    relation = told(x.transpose(2, 0, 1), x.reshape(3, 50, 40))
    assert (relation.kind, relation.text) == ("order", "the service has the same numbers in another order")
    assert "one after the other" in told(x, x.reshape(50, -1)).text


def test_order_with_a_scale_and_an_offset() -> None:
    x = (picture() * 255).astype(np.uint8)
    relation = told(x, x[..., ::-1] / 255)
    assert relation.kind == "order"
    assert_allclose(relation.numbers["ratio"], 1 / 255, rtol=1e-6)
    relation = told(x, x[..., ::-1].transpose(2, 0, 1) / 127.5 - 1)
    assert (relation.kind, relation.numbers["axes"], relation.numbers["mirrored"]) == ("order", [2, 0, 1], [2])
    assert_allclose([relation.numbers["ratio"], relation.numbers["offset"]], [1 / 127.5, -1], rtol=1e-6)


def test_channels_reversed_and_one_number_changed_is_not_an_order() -> None:
    x = picture()
    y = x[..., ::-1].copy()
    y[30, 40, 1] += 0.01
    assert kind_of(x, y) not in ("order", "same")


# --- scale, offset


def test_scale() -> None:
    relation = told(waveform(), waveform() * 0.6635)
    assert relation.kind == "scale"
    assert_allclose([relation.numbers["ratio"], relation.numbers["db"]], [0.6635, -3.563], rtol=1e-3)
    assert relation.text == "the service's value is 0.6635 times training's (-3.56 dB)"
    assert_allclose(relation.largest, 0.7 * (1 - 0.6635))
    assert_allclose(relation.relative, 1 - 0.6635)


def test_a_scale_close_to_1_is_told_with_enough_digits() -> None:
    text = told(waveform(), waveform() * 32767 / 32768, rtol=1e-6).text
    assert text == "the service's value is 0.999969 times training's (-0.00027 dB)"


def test_offset_and_affine() -> None:
    x = waveform()
    relation = told(x, x - 0.1)
    assert relation.kind == "offset"
    assert_allclose(relation.numbers["offset"], -0.1)
    assert "0.1 less" in relation.text
    relation = told(x, (x + 1) / 2)
    assert relation.kind == "affine"
    assert_allclose([relation.numbers["ratio"], relation.numbers["offset"]], [0.5, 0.5])
    assert kind_of([0.3, 0.7], [1.0, 5.0]) != "affine"  # two numbers always lie on a line


@pytest.mark.parametrize("distance", [3e-4, 3e-3])
def test_a_bend_is_neither_a_scale_nor_an_affine_relation(distance: float) -> None:
    x = waveform()
    assert kind_of(x, 2 * x + distance * x**3) not in ("scale", "affine")


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    ratio=st.floats(1e-3, 1e5) | st.floats(-1e5, -1e-3),
    offset=st.floats(0.01, 10) | st.floats(-10, -0.01) | st.just(0.0),
    seed=st.integers(0, 99),
)
def test_random_scales_and_offsets_are_found(ratio: float, offset: float, seed: int) -> None:
    x = np.random.default_rng(seed).normal(size=(3, 200))
    relation = describe(x, (ratio * x + offset).astype(np.float32))
    kind = relation.kind
    # A ratio near 1, or an offset that is small beside the ratio, is left out by a simpler relation.
    if abs(ratio - 1) > 1e-3 and abs(offset) > 1e-3 * abs(ratio):
        assert kind == "affine"
    if kind in ("scale", "affine"):
        assert_allclose(relation.numbers["ratio"], ratio, rtol=1e-4, atol=1e-5 * abs(offset))
    assert kind in ("same", "scale", "offset", "affine")


def test_one_number() -> None:
    relation = told(np.float64(44100), np.float64(16000))
    assert (relation.kind, relation.numbers["ratio"]) == ("scale", 16000 / 44100)
    assert "training has 44100, the service 16000" in relation.text
    assert told(0, 3).numbers["offset"] == 3
    assert told(0, 3).relative is None


def test_a_constant_in_place_of_numbers() -> None:
    relation = told(waveform(), np.zeros(40000))
    assert (relation.kind, relation.numbers["ratio"]) == ("scale", 0)
    relation = told(waveform(), np.full(40000, -1))
    assert (relation.kind, relation.numbers["offset"]) == ("affine", -1)
    assert kind_of(np.zeros(400), waveform(400)) == "other"


def test_a_power_and_a_logarithm_are_named() -> None:
    x = np.abs(waveform()) + 0.01
    assert_allclose(told(x, x**2).numbers["power"], 2)
    relation = told(x, 20 * np.log10(x))
    assert relation.kind == "other"
    assert_allclose(relation.numbers["per_decade"], 20)


# --- shift


@pytest.mark.parametrize(
    ("candidate", "shift", "filling"),
    [
        (lambda x: np.r_[np.zeros(100), x[:-100]], 100, "zeros"),
        (lambda x: np.roll(x, -7), -7, "circular"),
        (lambda x: np.r_[x[50:], np.full(50, 0.25)], -50, "constant"),
        (lambda x: np.r_[waveform(30, seed=9), x[:-30]], 30, "other"),
        (lambda x: np.r_[np.zeros(15000), x[:-15000]], 15000, "zeros"),
    ],
)
def test_shifts_of_a_waveform(candidate: object, shift: int, filling: str) -> None:
    x = waveform()
    relation = told(x, candidate(x))  # type: ignore[operator]
    assert (relation.kind, relation.numbers["shift"], relation.numbers["filling"]) == ("shift", shift, filling)


def test_a_shift_and_a_scale() -> None:
    x = waveform()
    relation = told(x, 0.5 * np.r_[x[50:], np.zeros(50)])
    assert (relation.kind, relation.numbers["shift"]) == ("shift", -50)
    assert_allclose(relation.numbers["ratio"], 0.5, rtol=1e-6)


@pytest.mark.parametrize(("array", "axis"), [(spectrogram(), 1), (picture(), 0), (bag(), 3)])
def test_shifts_along_an_axis(array: np.ndarray, axis: int) -> None:
    relation = told(array, np.roll(array, 3, axis))
    assert (relation.kind, relation.numbers["shift"], relation.numbers["axis"]) == ("shift", 3, axis)


def test_a_shift_in_a_long_recording_with_a_silent_start() -> None:
    x = np.r_[np.zeros(300000), waveform(200000)]
    relation = told(x, np.roll(x, 4321))
    assert (relation.kind, relation.numbers["shift"]) == ("shift", 4321)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(shift=st.integers(1, 490) | st.integers(-490, -1), seed=st.integers(0, 99))
def test_random_shifts_are_found(shift: int, seed: int) -> None:
    relation = describe(x := waveform(1000, seed), np.roll(x, shift))
    assert (relation.kind, relation.numbers["shift"]) == ("shift", shift)


def test_a_shift_with_one_number_changed_is_not_a_shift() -> None:
    x = waveform()
    y = np.roll(x, 5)
    y[20000] += 0.01
    assert kind_of(x, y) != "shift"


# --- limits


def test_clipped_on_both_sides_and_on_one() -> None:
    x = waveform()
    relation = told(x, np.clip(x, -0.3, 0.4))
    assert relation.kind == "clipped"
    assert (relation.numbers["below"], relation.numbers["above"]) == ((x < -0.3).sum(), (x > 0.4).sum())
    assert (relation.numbers["low"][1], relation.numbers["high"][1]) == (-0.3, 0.4)
    relation = told(np.minimum(x, 0.3), x)
    assert (relation.kind, relation.numbers["below"], relation.numbers["high"][0]) == ("clipped", 0, 0.3)
    assert "clipped by training" in relation.text


def test_floors_of_decibels_are_both_named() -> None:
    x = spectrogram()
    low = np.percentile(x, [10, 30])
    relation = told(np.maximum(x, low[0]), np.maximum(x, low[1]))
    assert relation.kind == "clipped"
    assert relation.numbers["low"] == list(low)
    assert f"{low[0]:.4g}" in relation.text and f"{low[1]:.4g}" in relation.text


def test_a_scale_that_clips() -> None:
    x = waveform()
    relation = told(x, np.clip(3 * x, -1, 1))
    assert relation.kind == "clipped"
    assert_allclose(relation.numbers["ratio"], 3)
    assert relation.numbers["above"] == (3 * x > 1).sum()


def test_a_soft_limit_is_not_clipped() -> None:
    assert kind_of(waveform(), np.tanh(2 * waveform()) / 2) != "clipped"


# --- places


def test_edges() -> None:
    x = spectrogram()
    y = x.copy()
    y[:, :2] += np.random.default_rng(0).normal(size=(64, 2))
    y[:, -3:] -= 5 * np.random.default_rng(1).random((64, 3))
    relation = told(x, y)
    assert relation.kind == "edges"
    assert [relation.numbers[key] for key in ("axis", "first", "last", "of")] == [1, 2, 3, 205]
    y[:, 100] += 1
    assert kind_of(x, y) != "edges"


def test_a_few_scaled_rows_at_the_end_are_edges_and_no_normalisation() -> None:
    x = np.random.default_rng(0).normal(size=(20, 50))
    relation = told(x, x * np.r_[np.ones(18), 2, 3][:, None])
    assert (relation.kind, relation.numbers["axis"], relation.numbers["last"]) == ("edges", 0, 2)


def test_a_few_places() -> None:
    x = waveform()
    y = x.copy()
    y[[5, 700, 800]] += 0.1
    relation = told(x, y)
    assert (relation.kind, relation.numbers["count"], relation.numbers["places"]) == ("some", 3, [[5], [700], [800]])
    assert kind_of([1, 2, 3], [1, 2, 4]) == "some"
    y[::10] += 0.1
    assert kind_of(x, y) != "some"


def test_another_padding_inside_one_shape() -> None:
    x = np.random.default_rng(0).uniform(-0.9, 0.9, (30, 40))
    ours, theirs = (np.pad(x, ((0, 0), (5, 6)), constant_values=value) for value in (-1, 0))
    relation = told(ours, theirs)
    assert relation.kind == "padding"
    assert [relation.numbers[key] for key in ("training", "service", "axis", "first", "last")] == [-1, 0, 1, 5, 6]
    ours, theirs = (np.pad(x, 4, constant_values=value) for value in (-1, 0))
    assert told(ours, theirs).numbers["inside"] == [[4, 34], [4, 44]]
    theirs[0] = np.linspace(0, 1, 48)
    assert kind_of(ours, theirs) != "padding"


def test_another_normalisation_of_each_channel() -> None:
    x = picture()
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    relation = told((x - mean) / std, (x - 0.5) / 0.5)
    assert (relation.kind, relation.numbers["axis"]) == ("per_channel", 2)
    assert_allclose(relation.numbers["ratios"], std / 0.5, rtol=1e-6)
    assert_allclose(relation.numbers["offsets"], (mean - 0.5) / 0.5, rtol=1e-6)
    relation = told(x - mean, x)
    assert_allclose(relation.numbers["offsets"], mean)
    assert "ratios" not in relation.numbers


def test_channels_reversed_and_another_normalisation_of_each() -> None:
    x = (picture() * 255).astype(np.uint8)
    relation = told(x / 255, x[..., ::-1] - np.array([103.939, 116.779, 123.68]))
    assert (relation.kind, relation.numbers["axis"], relation.numbers["mirrored"]) == ("per_channel", 2, [2])
    assert_allclose(relation.numbers["ratios"], 255, rtol=1e-6)
    assert_allclose(relation.numbers["offsets"], [-103.939, -116.779, -123.68], rtol=1e-5)
    assert "mirrored" not in told(x / 255, x - np.array([103.939, 116.779, 123.68])).numbers


def test_another_scale_of_each_segment() -> None:
    ratios = np.arange(1.0, 11.0)
    relation = told(bag(), bag() * ratios[:, None, None, None])
    assert (relation.kind, relation.numbers["axis"]) == ("per_channel", 0)
    assert_allclose(relation.numbers["ratios"], ratios)


def test_a_bend_in_one_channel_is_not_per_channel() -> None:
    x = picture()
    y = x * np.array([1.0, 2.0, 3.0])
    y[..., 1] += 0.01 * x[..., 1] ** 2
    assert kind_of(x, y) != "per_channel"


# --- other shapes


@pytest.mark.parametrize(
    ("ours", "theirs", "numbers"),
    [
        (slice(None), slice(9), {"training": 10, "service": 9, "where": "start", "equal": 9}),
        (slice(1, None), slice(None), {"training": 9, "service": 10, "where": "end", "equal": 9}),
        (slice(None), slice(None, None, 2), {"where": "interleaved", "every": 2, "start": 0, "equal": 5}),
        (slice(1, None, 3), slice(None), {"where": "interleaved", "every": 3, "start": 1, "equal": 3}),
        (slice(None), [0, 2, 3, 7, 9], {"where": "matched", "pairs": [[0, 0], [2, 1], [3, 2], [7, 3], [9, 4]]}),
        (slice(1), slice(2), {"training": 1, "service": 2, "where": "start", "equal": 1}),
    ],
)
def test_another_number_of_segments(ours: slice, theirs: slice, numbers: dict[str, object]) -> None:
    relation = told(bag()[ours], bag()[theirs])
    assert (relation.kind, relation.largest) == ("rows", 0)
    assert relation.numbers == {**relation.numbers, "axis": 0, **numbers}


def test_the_sentence_about_segments() -> None:
    assert told(bag(), bag()[:9]).text == "training has 10, the service 9 along axis 0; the first 9 are the same"


def test_another_number_of_segments_the_last_of_them_changed() -> None:
    y = bag()[:9]
    y[8] *= 0.3
    relation = told(bag(), y)
    assert (relation.kind, relation.numbers["where"], relation.numbers["equal"]) == ("rows", "start", 8)


def test_another_number_of_segments_and_a_scale() -> None:
    relation = told(bag(), bag()[:9] * 0.5)
    assert relation.kind == "rows"
    assert relation.numbers["shared"]["kind"] == "scale"
    assert_allclose(relation.numbers["shared"]["ratio"], 0.5)
    assert "over the first 9: the service's value is 0.5 times" in relation.text


def test_silence_that_both_have_does_not_hide_a_scale() -> None:
    x = np.r_[np.zeros(30000), waveform()[:20000]]
    relation = told(x, 0.5 * x[:-100])
    assert (relation.kind, relation.numbers["shared"]["kind"]) == ("rows", "scale")


def test_a_stretch_cut_out_of_a_waveform() -> None:
    relation = told(waveform(), waveform()[1234:-500])
    assert relation.kind == "rows"
    assert [relation.numbers[key] for key in ("where", "start", "equal")] == ["middle", 1234, 38266]


def test_one_channel_repeated() -> None:
    grey = picture()[..., 0]
    relation = told(grey, np.repeat(grey[..., None], 3, axis=2))
    assert relation.kind == "rows"
    assert [relation.numbers[key] for key in ("axis", "training", "service", "where")] == [2, 1, 3, "repeated"]


def test_a_margin_around() -> None:
    x = picture()
    relation = told(x, np.pad(x, ((5, 6), (3, 3), (0, 0)), constant_values=-1))
    assert relation.kind == "padding"
    assert [relation.numbers[key] for key in ("start", "constant", "side")] == [[5, 3], -1, "the service"]
    relation = told(np.r_[waveform(), np.zeros(100)], waveform())
    assert (relation.kind, relation.numbers["side"], relation.numbers["start"]) == ("padding", "training", 0)
    # A margin that mirrors the picture has no constant: then the picture is a part of it.
    assert kind_of(x, np.pad(x, ((5, 6), (3, 3), (0, 0)), mode="reflect")) == "rows"


def test_a_picture_cut_out_of_the_middle() -> None:
    relation = told(picture(), picture()[10:52, 20:62])
    assert (relation.kind, relation.numbers["start"]) == ("rows", [10, 20])


def test_resampled_and_resized() -> None:
    relation = told(waveform(), signal.resample_poly(waveform(), 5, 4))
    assert (relation.kind, relation.numbers["ratios"]) == ("resolution", [1.25])
    assert "resampled" in relation.text and relation.numbers["correlation"] > 0.99
    image = pytest.importorskip("PIL.Image")
    x = (picture() * 255).astype(np.uint8)
    relation = told(x, np.asarray(image.fromarray(x).resize((60, 50))))
    assert relation.kind == "resolution"
    assert_allclose(relation.numbers["ratios"], [50 / 62, 60 / 82])
    assert "resized" in relation.text and relation.numbers["correlation"] > 0.95


def test_another_picture_of_another_size_is_not_called_resized() -> None:
    relation = told(picture(), np.random.default_rng(0).random((50, 60, 3)))
    assert "not alike" in relation.text and abs(relation.numbers["correlation"]) < 0.1


# --- measured


def highpass(order: int = 2) -> np.ndarray:
    return signal.butter(order, 50, "high", fs=RATE, output="sos")


def rumbling() -> np.ndarray:
    return waveform() + 0.3 * np.sin(2 * np.pi * 20 / RATE * np.arange(40000))


@pytest.mark.parametrize(("missing", "sign"), [("the service", 1), ("training", -1)])
def test_a_missing_highpass(missing: str, sign: int) -> None:
    x, y = rumbling(), signal.sosfilt(highpass(), rumbling())
    relation = told(y, x) if missing == "the service" else told(x, y)
    assert relation.kind == "filter"
    assert relation.numbers["explained"] > 0.99
    bands = relation.numbers["bands"]
    # The response of the filter itself, between the bands' edges.
    _, response = signal.freqz_sos(highpass(), [20, 400, 4000], fs=RATE)
    for frequency, expected, tolerance in zip(
        [20, 400, 4000], 20 * np.log10(np.abs(response)), [2, 0.1, 0.1], strict=True
    ):
        gain = next(db for low, high, db in bands if low <= frequency / RATE < high)
        assert_allclose(gain, -sign * expected, atol=tolerance)
    assert ("louder" if sign > 0 else "quieter") in relation.text
    assert "cycles per sample" in relation.text


def test_another_order_of_the_filter() -> None:
    x = rumbling()
    relation = told(signal.sosfilt(highpass(2), x), signal.sosfilt(highpass(4), x))
    assert relation.kind == "filter" and relation.numbers["explained"] > 0.98


def test_a_filter_of_two_channels() -> None:
    x = np.stack([waveform(), waveform(seed=5)])
    relation = told(x, signal.lfilter([1, -0.97], [1], x))
    assert relation.kind == "filter" and relation.numbers["explained"] > 0.999
    for low, high, db in relation.numbers["bands"][5:-2]:
        middle = np.abs(1 - 0.97 * np.exp(-2j * np.pi * np.sqrt(low * high)))
        assert_allclose(db, 20 * np.log10(middle), atol=0.6)


def test_half_a_sample_later() -> None:
    x = waveform()
    y = np.fft.irfft(np.fft.rfft(x) * np.exp(-1j * np.pi * np.fft.rfftfreq(x.size)), x.size)
    relation = told(x, y)
    assert relation.kind == "filter"
    assert_allclose(relation.numbers["delay"], 0.5, atol=0.01)


@pytest.mark.parametrize(("ours", "theirs"), [(1, 100), (100, 1), (1, 1)])
def test_unrelated_signals_are_not_called_filtered(ours: float, theirs: float) -> None:
    relation = told(ours * waveform(), theirs * waveform(seed=8))
    assert relation.kind == "other"
    assert abs(relation.numbers["correlation"]) < 0.05
    difference = theirs * waveform(seed=8) - ours * waveform()
    level = 10 * np.log10(np.mean(difference**2) / np.mean((ours * waveform()) ** 2))
    assert_allclose(relation.numbers["level_db"], level)


def test_noise_and_its_level() -> None:
    x = waveform()
    noise = np.random.default_rng(0).normal(size=x.size)
    relation = told(x, x + noise * 0.01 * np.sqrt(np.mean(x**2) / np.mean(noise**2)))
    assert relation.kind == "noise"
    assert_allclose(relation.numbers["level_db"], -40, atol=0.01)
    assert kind_of(x, x + noise * np.sqrt(np.mean(x**2))) == "other"


def test_other_numbers() -> None:
    x, y = bag(), np.random.default_rng(9).normal(size=bag().shape)
    relation = told(x, y)
    assert relation.kind == "other"
    assert_allclose(relation.numbers["correlation"], np.corrcoef(x.ravel(), y.ravel())[0, 1])
    assert_allclose([relation.largest, relation.numbers["mean"]], [np.abs(x - y).max(), np.abs(x - y).mean()])


# --- numbers that are not finite, and wrong input


def test_numbers_that_are_not_finite_on_one_side() -> None:
    x = spectrogram()
    y = x.copy()
    y[3, 7], y[5, 5] = np.nan, -np.inf
    relation = told(x, y)
    assert (relation.kind, relation.largest) == ("not_finite", 0)
    assert relation.numbers == {"training": 0, "service": 2, "service_first": [3, 7], "service_nan": 1}
    assert kind_of(y, x) == "not_finite"
    assert kind_of(y, np.where(np.isnan(y), np.inf, y)) == "not_finite"
    assert kind_of(y, y[:, :100]) == "not_finite"


def test_what_is_not_finite_on_both_sides_hides_no_relation() -> None:
    x = waveform()
    x[[0, 5]] = np.nan, -np.inf
    assert kind_of(x, x) == "same"
    relation = told(x, 2 * x + 1)
    assert (relation.kind, relation.numbers["not_finite"]) == ("affine", 2)
    assert_allclose(relation.numbers["offset"], 1)
    assert kind_of([np.nan], [np.nan]) == "same"


def test_complex_numbers() -> None:
    x = np.fft.rfft(waveform())
    assert kind_of(x, x) == "same"
    assert_allclose(told(x, 2 * x).numbers["ratio"], 2)
    relation = told(x, np.conj(x))
    assert (relation.kind, relation.numbers["axis"], relation.numbers["ratios"]) == ("per_channel", 1, [1, -1])


def test_every_kind_of_small_array_gets_an_answer() -> None:
    rng = np.random.default_rng(0)
    shapes = [(), (1,), (2,), (5,), (1, 5), (2, 3), (3, 2), (4, 1, 6), (2, 3, 4)]
    for ours, theirs in itertools.product(shapes, repeat=2):
        for make in (rng.normal, lambda size: rng.integers(0, 3, size), lambda size: np.zeros(size)):
            told(make(size=ours), make(size=theirs))


@pytest.mark.parametrize("array", [np.array(["a"]), np.array([None]), np.array(["2026-01-01"], dtype="datetime64[D]")])
def test_an_array_without_numbers_is_refused(array: np.ndarray) -> None:
    with pytest.raises(UsageError, match=r"training has an array of .*, expected numbers"):
        describe(array, np.ones(1))
    with pytest.raises(UsageError, match=r"the service has an array of"):
        describe(np.ones(1), array)


def test_an_empty_array_is_refused() -> None:
    with pytest.raises(UsageError, match=r"the service has an empty array of shape \(0, 3\)"):
        describe(np.ones((2, 3)), np.ones((0, 3)))


@pytest.mark.parametrize("rtol", [-1e-9, 1.0, float("nan")])
def test_an_impossible_tolerance_is_refused(rtol: float) -> None:
    with pytest.raises(UsageError, match="rtol is"):
        describe(np.ones(1), np.ones(1), rtol=rtol)
