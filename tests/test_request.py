"""What a server received, to a Request or to an error that says what to send instead."""

import pytest

from handler.request import Limits, Request, RequestError, parse_request

AUDIO = b"RIFF....WAVE"
LIMITS = Limits(max_bytes=100)


def refusal(fields: dict, headers: dict | None = None, limits: Limits = LIMITS) -> RequestError:
    with pytest.raises(RequestError) as caught:
        parse_request(fields, headers or {}, limits)
    assert str(caught.value) == caught.value.message
    return caught.value


@pytest.mark.parametrize("field", ["body", "data", "audio", "file"])
@pytest.mark.parametrize("kind", [bytes, bytearray])
def test_the_file_is_taken_from_any_of_four_fields(field, kind):
    request = parse_request({field: kind(AUDIO)}, {}, LIMITS)
    assert request == Request(AUDIO, None)
    assert type(request.payload) is bytes


@pytest.mark.parametrize("fields", [{}, {"threshold": b"0.5"}, {"Data": AUDIO}, {"wav": AUDIO}])
def test_no_file_is_refused_with_a_way_to_send_one(fields):
    error = refusal(fields)
    assert error.status == 400
    assert "application/octet-stream" in error.message
    assert "data=@FILE" in error.message


@pytest.mark.parametrize("pair", [("body", "data"), ("audio", "file"), ("data", "audio")])
def test_several_files_are_refused_by_name(pair):
    error = refusal(dict.fromkeys(pair, AUDIO))
    assert error.status == 400
    assert f"several files ({', '.join(pair)})" in error.message


def test_several_files_are_refused_even_where_one_is_empty():
    assert refusal({"data": AUDIO, "file": b""}).status == 400


@pytest.mark.parametrize(
    "value", ["RIFF....WAVE", "", {"audio": "UklGRg=="}, {}, ["a"], None, 7], ids=lambda v: repr(v)[:12]
)
def test_text_and_json_are_no_audio(value):
    error = refusal({"data": value})
    assert error.status == 415
    assert "'data'" in error.message
    assert "application/octet-stream" in error.message


@pytest.mark.parametrize("empty", [b"", bytearray()])
def test_an_empty_file_is_refused(empty):
    error = refusal({"body": empty})
    assert error.status == 400
    assert "0 bytes" in error.message


def test_the_size_limit_is_inclusive():
    assert parse_request({"body": bytes(100)}, {}, LIMITS).payload == bytes(100)
    error = refusal({"body": bytes(101)})
    assert error.status == 413
    assert "101 bytes" in error.message
    assert "at most 100" in error.message


def test_the_size_limit_is_the_archives():
    big = bytes(1_000_001)
    assert refusal({"body": big}, limits=Limits(max_bytes=1_000_000)).status == 413
    assert parse_request({"body": big}, {}, Limits(max_bytes=1_000_001)).payload == big


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("0.5", 0.5),
        (b"0.25", 0.25),
        (bytearray(b"0.75"), 0.75),
        (0.125, 0.125),
        (1, 1.0),
        ("0", 0.0),
        ("1", 1.0),
        ("1.0", 1.0),
        ("5e-1", 0.5),
        (" 0.5\r\n", 0.5),
        (".5", 0.5),
    ],
)
def test_a_threshold_is_a_number_from_0_to_1(given, expected):
    """The ends belong to it; a form field may be text, bytes or a JSON number."""
    assert parse_request({"data": AUDIO, "threshold": given}, {}, LIMITS) == Request(AUDIO, expected)


WRONG = ["abc", "nan", "NaN", "inf", "-inf", "1.5", "-0.1", "1.0000001", "", " ", "0,5", "50%", "0x1", "0.5 0.6"]


@pytest.mark.parametrize("given", [*WRONG, b"abc", b"", b"\xff\xfe", None, True, [0.5], {"value": 0.5}], ids=repr)
def test_a_wrong_threshold_field_is_refused_by_value(given):
    error = refusal({"data": AUDIO, "threshold": given})
    assert error.status == 400
    assert "[0, 1]" in error.message
    if given and isinstance(given, str):
        assert repr(given) in error.message


@pytest.mark.parametrize("given", WRONG, ids=repr)
def test_a_wrong_threshold_header_is_refused(given):
    error = refusal({"data": AUDIO}, {"X-Threshold": given})
    assert error.status == 400
    assert "[0, 1]" in error.message


def test_a_long_wrong_threshold_is_quoted_in_part():
    error = refusal({"data": AUDIO, "threshold": "x" * 10_000})
    assert "x" * 40 in error.message
    assert len(error.message) < 200


@pytest.mark.parametrize("name", ["X-Threshold", "x-threshold", "X-THRESHOLD"])
def test_the_header_is_found_in_any_case(name):
    assert parse_request({"body": AUDIO}, {name: "0.3", "Accept": "*/*"}, LIMITS).threshold == 0.3


@pytest.mark.parametrize("header", ["Threshold", "X-Thresholds", "Authorization"])
def test_other_headers_are_not_thresholds(header):
    assert parse_request({"body": AUDIO}, {header: "0.3"}, LIMITS).threshold is None


@pytest.mark.parametrize("field", ["0.3", b"0.30", "3e-1"])
def test_field_and_header_may_agree(field):
    assert parse_request({"data": AUDIO, "threshold": field}, {"X-Threshold": "0.3"}, LIMITS).threshold == 0.3


def test_field_and_header_may_not_differ():
    error = refusal({"data": AUDIO, "threshold": b"0.3"}, {"X-Threshold": "0.4"})
    assert error.status == 400
    assert "0.3" in error.message
    assert "0.4" in error.message


def test_a_wrong_header_is_not_covered_by_a_right_field():
    assert refusal({"data": AUDIO, "threshold": "0.3"}, {"X-Threshold": "abc"}).status == 400
    assert refusal({"data": AUDIO, "threshold": "abc"}, {"X-Threshold": "0.3"}).status == 400


def test_the_file_is_looked_at_before_the_threshold():
    """Someone who sends neither needs to hear of the file."""
    assert "no audio" in refusal({"threshold": "abc"}).message
