"""What a server received, to a Request or to an error that says what to send instead."""

import base64
import json

import pytest

from handler.forms import request_of
from skewless.core.request import PAYLOAD_FIELDS, BatchRequest, Limits, Request, RequestError

AUDIO = b"RIFF....WAVE"
IMAGE = b"\x89PNG\r\n\x1a\n" + bytes(range(248, 256))
LIMITS = Limits(max_bytes=100)


def parse_request(fields: dict, headers: dict, limits: Limits) -> Request | BatchRequest:
    """The request as the handler makes it of TorchServe's fields; raises what it would answer."""
    request = request_of(fields, headers, limits)
    if isinstance(request, RequestError):
        raise request
    return request


def refusal(fields: dict, headers: dict | None = None, limits: Limits = LIMITS) -> RequestError:
    with pytest.raises(RequestError) as caught:
        parse_request(fields, headers or {}, limits)
    assert str(caught.value) == caught.value.message
    return caught.value


@pytest.mark.parametrize("field", ["body", "data", "audio", "image", "file"])
@pytest.mark.parametrize("kind", [bytes, bytearray])
def test_the_file_is_taken_from_any_of_five_fields(field, kind):
    request = parse_request({field: kind(AUDIO)}, {}, LIMITS)
    assert request == Request(AUDIO, None)
    assert type(request.payload) is bytes


@pytest.mark.parametrize("fields", [{}, {"threshold": b"0.5"}, {"Data": AUDIO}, {"wav": AUDIO}])
def test_no_file_is_refused_with_a_way_to_send_one(fields):
    error = refusal(fields)
    assert error.status == 400
    assert "application/octet-stream" in error.message
    assert "data=@FILE" in error.message


def test_a_file_in_an_unknown_field_is_answered_with_the_names_received():
    message = refusal({"fil": AUDIO, "threshold": b"0.5"}).message
    assert message.endswith("The fields received are 'fil', 'threshold'.")
    assert "received" not in refusal({}).message


def test_names_received_are_quoted_in_part():
    message = refusal({f"{i}\0" + "x" * 1000: AUDIO for i in range(10_000)}).message
    assert "'0\\x00" + "x" * 38 + "', '1" in message
    assert message.endswith("and 9,992 more.")
    assert len(message) < 900


def test_fields_that_are_nobodys_are_ignored_beside_a_file():
    assert parse_request({"data": AUDIO, "comment": b"hello"}, {}, LIMITS) == Request(AUDIO, None)


@pytest.mark.parametrize("pair", [("body", "data"), ("audio", "file"), ("data", "audio"), ("image", "file")])
def test_several_files_are_refused_by_name(pair):
    error = refusal(dict.fromkeys(pair, AUDIO))
    assert error.status == 400
    assert f"several files ({', '.join(pair)})" in error.message


def test_several_files_are_refused_even_where_one_is_empty():
    assert refusal({"data": AUDIO, "file": b""}).status == 400


@pytest.mark.parametrize("value", ["RIFF....WAVE", "", '{"image": "QUJD"}', None, 7], ids=repr)
def test_text_is_no_file(value):
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
    assert "no file" in refusal({"threshold": "abc"}).message


# --- JSON -------------------------------------------------------------------------------------------------------------


def encoded(data: bytes) -> str:
    return base64.b64encode(data).decode()


@pytest.mark.parametrize("key", PAYLOAD_FIELDS)
@pytest.mark.parametrize("field", ["body", "data"])
def test_json_carries_a_file_in_base64(key, field):
    document = {key: encoded(IMAGE)}
    written = json.dumps(document)
    for value in (written.encode(), bytearray(written.encode()), document):
        assert parse_request({field: value}, {}, LIMITS) == Request(IMAGE, None)


@pytest.mark.parametrize("start", [b" ", b"\r\n\t ", b"\xef\xbb\xbf", b"\xef\xbb\xbf\n"])
def test_json_may_start_with_space_and_a_byte_order_mark(start):
    value = start + json.dumps({"image": encoded(IMAGE)}).encode() + b"\n"
    assert parse_request({"body": value}, {}, LIMITS) == Request(IMAGE)


def test_base64_may_have_line_breaks_escaped_slashes_and_a_data_url():
    text = encoded(IMAGE)
    assert "/" in text and "+" in text
    for written in (
        json.dumps({"image": f" {text[:8]}\r\n{text[8:]}\n"}),
        '{"image": "' + text[:8] + "\n\t" + text[8:] + '"}',
        '{"image": "' + text.replace("/", "\\/") + '"}',
        json.dumps({"image": "data:image/png;base64," + text}),
        json.dumps({"image": " DATA:image/png;charset=x;BASE64,\n" + text}),
        json.dumps({"image": "data:;base64," + text}),
    ):
        assert parse_request({"body": written.encode()}, {}, LIMITS) == Request(IMAGE), written


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("QUJD-_==", "'-' at position 4"),
        ("data:image/png;base64,QUJD_UJD", "'_' at position 4"),
        ("QUJD!", "'!' at position 4"),
        # What a + becomes when a form is read, four times over: the rest would pass.
        ("QUJD" + " " * 4 + "QUJD", "' ' at position 4"),
        ("QUJD\u00a0", "'\\xa0' at position 4"),
        ("QUJD\ud800", "'\\ud800' at position 4"),
        ("\0", "'\\x00' at position 0"),
        ("Q", "(Invalid base64"),
        ("QQ", "(Incorrect padding)"),
        ("QUI", "(Incorrect padding)"),
        ("QQ==QQ==", "(Excess data after padding)"),
        ("QQ===", "(Excess data after padding)"),
        ("====", "(Leading padding not allowed)"),
        ("data:image/png;base64", "':' at position 4"),
        ("data:image/png," + "QUJD", "data URL without ';base64'"),
        ("data:;base64," * 2, "':' at position 4"),
    ],
)
def test_what_is_not_base64_is_refused_by_key_and_reason(text, reason):
    error = refusal({"body": json.dumps({"image": text}).encode()})
    assert error.status == 400
    assert "the key 'image'" in error.message
    assert reason in error.message
    assert "A-Z, a-z, 0-9, +, /, padded with =" in error.message


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        (1, "a number"),
        (0, "a number"),
        (True, "true or false"),
        (None, "null"),
        (["QUJD"], "an array"),
        ({}, "an object"),
    ],
)
def test_a_key_that_holds_no_string_is_refused(value, kind):
    for sent in ({"image": value}, json.dumps({"image": value}).encode()):
        error = refusal({"body": sent})
        assert error.status == 400
        assert f"the key 'image' is {kind}, expected a string" in error.message


@pytest.mark.parametrize("text", ["", " \n", "data:image/png;base64,"])
def test_an_empty_file_in_json_is_refused(text):
    error = refusal({"body": json.dumps({"image": text}).encode()})
    assert (error.status, "0 bytes" in error.message) == (400, True)


@pytest.mark.parametrize(
    ("sent", "words"),
    [
        ("{", "starts like JSON but is not"),
        ('{"image": "QUJD"', "starts like JSON but is not"),
        ('{"image": "QUJD"} {"image": "QUJD"}', "Extra data"),
        ("{\\rtf1 text}", "starts like JSON but is not"),
        ("[", "starts like JSON but is not"),
        ("[]", "a JSON array"),
        ('["QUJD"]', "a JSON array"),
        ("{}", "carries no file"),
        ('{"threshold": 0.5}', "carries no file"),
        ('{"Image": "QUJD"}', "unknown key 'Image'"),
        ('{"image": "QUJD", "treshold": 0.5}', "unknown key 'treshold'"),
        ('{"files.a": "QUJD"}', "unknown key 'files.a'"),
        ('{"files": {}}', "'files' is empty"),
        ('{"files": []}', "'files' is an array"),
        ('{"files": ["QUJD"]}', "'files' is an array"),
        ('{"files": "QUJD"}', "'files' is a string"),
        ('{"files": null}', "'files' is null"),
    ],
)
def test_json_without_a_file_is_refused_with_what_is_expected(sent, words):
    error = refusal({"body": sent.encode()})
    assert error.status == 400
    assert words in error.message
    assert '{"image": "<base64>"}' in error.message


def test_json_must_be_utf_8():
    for sent in (b'{"image": "\xff"}', json.dumps({"image": "QUJD"}).encode("utf-16-be")[1:], b"{\x00"):
        error = refusal({"body": sent})
        assert (error.status, "starts like JSON" in error.message) == (400, True)


def test_parsed_json_that_is_no_request_is_refused():
    for value in ({}, [], ["QUJD"], {"files": {}}, {"threshold": 0.5}, {"epochs": 50}):
        assert refusal({"body": value}).status == 400


def test_several_files_in_one_json_object_are_refused():
    error = refusal({"body": b'{"image": "QUJD", "audio": "QUJD"}'})
    assert error.status == 400
    assert "several files (audio, image)" in error.message


@pytest.mark.parametrize(
    "sent",
    [
        '{"image": "QUJD", "image": "QUJE"}',
        '{"threshold": 0.1, "image": "QUJD", "threshold": 0.1}',
        '{"files": {"a": "QUJD"}, "files": {"b": "QUJD"}}',
        '{"files": {"a": "QUJD", "\\u0061": "QUJE"}}',
    ],
)
def test_a_key_twice_is_refused(sent):
    error = refusal({"body": sent.encode()})
    assert error.status == 400
    assert "twice" in error.message


def test_the_size_limit_is_that_of_the_decoded_file():
    for size, spaces in ((100, 0), (100, 1000)):
        document = {"image": encoded(bytes(size)) + "\n" * spaces}
        assert parse_request({"body": json.dumps(document).encode()}, {}, LIMITS).payload == bytes(size)
    for size in (101, 102, 103):
        error = refusal({"body": json.dumps({"image": encoded(bytes(size))}).encode()})
        assert error.status == 413
        assert f"{size} bytes, at most 100" in error.message


def test_a_file_that_is_too_large_is_not_decoded(monkeypatch):
    monkeypatch.setattr(base64, "b64decode", lambda *arguments, **how: pytest.fail("decoded"))
    assert refusal({"body": b'{"image": "' + b"A" * 10_000_000 + b'"}'}).status == 413


@pytest.mark.parametrize(
    "sent",
    [
        b"[" * 1_000_000,
        b'{"image": ' * 1_000_000,
        b'{"image": [' + b"[]," * 1_000_000 + b"[]]}",
        b'{"image": [' + b"0," * 1_000_000 + b"0]}",
    ],
    ids=["arrays", "objects", "empty arrays", "numbers"],
)
def test_json_of_very_many_values_is_refused_unparsed(sent, monkeypatch):
    monkeypatch.setattr(json, "loads", lambda *arguments, **how: pytest.fail("parsed"))
    error = refusal({"body": sent})
    assert error.status == 400
    assert "commas and brackets" in error.message


@pytest.mark.parametrize("start", [b"[", b'{"image": ', b'{"image": ['])
def test_deep_json_is_refused(start):
    error = refusal({"body": start * 5000})
    assert error.status == 400
    assert "nested too deeply" in error.message


def test_a_number_of_many_digits_is_refused():
    """Python refuses to make an int of so many."""
    for key in ("threshold", "image"):
        error = refusal({"body": b'{"image": "QUJD", "%s": %s}' % (key.encode(), b"1" * 1_000_000)})
        assert error.status == 400
        assert len(error.message) < 300


@pytest.mark.parametrize(("given", "expected"), [("0.5", 0.5), ("0", 0.0), ("1", 1.0), ("1e-1", 0.1), ('"0.5"', 0.5)])
def test_json_may_set_the_threshold(given, expected):
    sent = f'{{"image": "QUJD", "threshold": {given}}}'.encode()
    assert parse_request({"body": sent}, {}, LIMITS) == Request(b"ABC", expected)


@pytest.mark.parametrize("given", ["1.5", "-1", "NaN", "Infinity", "null", "true", '""', "[0.5]", '{"value": 0.5}'])
def test_a_wrong_threshold_in_json_is_refused(given):
    error = refusal({"body": f'{{"image": "QUJD", "threshold": {given}}}'.encode()})
    assert error.status == 400
    assert "[0, 1]" in error.message


def test_json_field_and_header_may_agree_but_not_differ():
    sent = b'{"image": "QUJD", "threshold": 0.3}'
    assert parse_request({"data": sent, "threshold": b"0.30"}, {"X-Threshold": "3e-1"}, LIMITS).threshold == 0.3
    error = refusal({"body": sent}, {"X-Threshold": "0.4"})
    assert error.status == 400
    assert error.message == "the JSON's threshold says 0.3 and X-Threshold says 0.4; send one of them"
    error = refusal({"data": sent, "threshold": b"0.4"}, {"X-Threshold": "0.4"})
    assert error.message.startswith("the threshold field says 0.4 and the JSON's threshold says 0.3 and X-Threshold")


# --- several files ----------------------------------------------------------------------------------------------------


def outcomes(request: BatchRequest) -> dict[str, bytes | int]:
    """Each file's bytes, or the status of its error."""
    return {name: got.status if isinstance(got, RequestError) else got for name, got in request.files.items()}


def test_fields_with_names_are_a_batch():
    request = parse_request({"files.a.wav": AUDIO, "files.b": bytearray(b"x"), "threshold": b"0.5"}, {}, LIMITS)
    assert request == BatchRequest({"a.wav": AUDIO, "b": b"x"}, 0.5)
    assert [type(content) for content in request.files.values()] == [bytes, bytes]
    assert list(request.files) == ["a.wav", "b"]


def test_one_named_file_is_a_batch_of_one():
    assert parse_request({"files.1": AUDIO}, {}, LIMITS) == BatchRequest({"1": AUDIO}, None)


def test_json_carries_a_batch():
    document = {"files": {"b.png": encoded(IMAGE), "1": encoded(AUDIO)}, "threshold": 0.25}
    for value in (document, json.dumps(document).encode()):
        request = parse_request({"body": value}, {}, LIMITS)
        assert request == BatchRequest({"b.png": IMAGE, "1": AUDIO}, 0.25)
        assert list(request.files) == ["b.png", "1"]


def test_a_file_of_a_batch_fails_alone():
    fields = {"files.good": AUDIO, "files.empty": b"", "files.large": bytes(101), "files.text": "RIFF"}
    request = parse_request(fields, {}, LIMITS)
    assert outcomes(request) == {"good": AUDIO, "empty": 400, "large": 413, "text": 415}
    assert "'files.text'" in request.files["text"].message


def test_a_file_of_a_json_batch_fails_alone():
    contents = {"good": encoded(AUDIO), "empty": "", "large": encoded(bytes(101)), "number": 7, "url-safe": "QUJD-_=="}
    request = parse_request({"body": json.dumps({"files": contents}).encode()}, {}, LIMITS)
    assert outcomes(request) == {"good": AUDIO, "empty": 400, "large": 413, "number": 400, "url-safe": 400}
    assert "the key 'files.number' is a number" in request.files["number"].message


def test_json_inside_a_batch_is_a_file_like_any_other():
    """One level is enough: what a file contains is for the decoder to judge."""
    sent = b'{"image": "QUJD"}'
    assert parse_request({"files.a": sent}, {}, LIMITS) == BatchRequest({"a": sent})


@pytest.mark.parametrize("field", ["files", "files[]"])
@pytest.mark.parametrize("beside", [{}, {"data": AUDIO}, {"files.1": AUDIO}])
def test_a_field_that_may_have_lost_files_is_refused(field, beside):
    error = refusal({field: AUDIO, **beside})
    assert error.status == 400
    assert "files.1=@FILE -F files.2=@FILE" in error.message


@pytest.mark.parametrize("field", PAYLOAD_FIELDS)
def test_one_file_beside_a_batch_is_refused(field):
    error = refusal({field: AUDIO, "files.1": AUDIO})
    assert error.status == 400
    assert f"'{field}'" in error.message


def test_one_file_beside_a_batch_in_json_is_refused():
    assert "'image'" in refusal({"body": b'{"image": "QUJD", "files": {"a": "QUJD"}}'}).message
    assert "'data'" in refusal({"data": b'{"files": {"a": "QUJD"}}', "files.b": AUDIO}).message


def test_the_number_of_files_is_limited():
    for count, limits in ((64, Limits()), (3, Limits(max_files=3))):
        names = [str(i) for i in range(count + 1)]
        for fields in (
            lambda names: {f"files.{name}": AUDIO for name in names},
            lambda names: {"body": json.dumps({"files": dict.fromkeys(names, "QUJD")}).encode()},
        ):
            assert list(parse_request(fields(names[:-1]), {}, limits).files) == names[:-1]
            error = refusal(fields(names), limits=limits)
            assert error.status == 400
            assert f"{count + 1} files, at most {count}" in error.message


def test_ten_thousand_files_are_counted_not_read():
    names = [str(i) for i in range(10_000)]
    for fields in (
        {f"files.{name}": AUDIO for name in names},
        {"body": {"files": dict.fromkeys(names, "not base64")}},
        {"body": json.dumps({"files": dict.fromkeys(names, "not base64")}).encode()},
    ):
        assert "10,000 files, at most 64" in refusal(fields).message


@pytest.mark.parametrize(
    "name",
    ["x", "1", "a b", "ü" * 200, "x" * 200, "files.", "../../etc/passwd", "a\u202fb.png", "data", "{,[", "\U0001f600"],
)
def test_a_file_may_have_any_readable_name(name):
    assert parse_request({f"files.{name}": AUDIO}, {}, LIMITS).files == {name: AUDIO}
    sent = json.dumps({"files": {name: encoded(AUDIO)}}).encode()
    assert parse_request({"body": sent}, {}, LIMITS).files == {name: AUDIO}


@pytest.mark.parametrize(
    "name", ["", "x" * 201, "x" * 1_000_000, "a\0b", "\n", "\x7f", "\x85", "\ud800"], ids=lambda n: n[:9]
)
def test_a_wrong_name_is_refused(name):
    for fields in (
        {f"files.{name}": AUDIO, "files.good": AUDIO},
        {"body": json.dumps({"files": {"good": encoded(AUDIO), name: encoded(AUDIO)}}).encode()},
    ):
        error = refusal(fields)
        assert error.status == 400
        assert f"({len(name):,} characters)" in error.message
        assert error.message.isprintable()
        assert len(error.message) < 250


def test_a_full_batch_of_names_that_look_like_structure_is_accepted():
    names = ["," * 198 + f"{i:02}" for i in range(64)]
    contents = dict.fromkeys(names, "data:image/png;base64," + encoded(IMAGE))
    request = parse_request({"body": json.dumps({"files": contents, "threshold": 0.5}).encode()}, {}, LIMITS)
    assert request.files == dict.fromkeys(names, IMAGE)


# --- fields that TorchServe lost --------------------------------------------------------------------------------------

FORM = {"Content-Type": "multipart/form-data; boundary=x"}


@pytest.mark.parametrize("fields", [{"data": bytes(100)}, {"files.1": bytes(60), "files.2": bytes(40)}])
@pytest.mark.parametrize("name", ["Content-Length", "content-length"])
def test_a_form_of_which_a_part_is_missing_is_refused(fields, name):
    error = refusal(fields, FORM | {name: "20000"})
    assert error.status == 400
    assert "20,000 bytes only 100 arrived" in error.message
    assert "files.1=@FILE" in error.message


def test_a_form_may_spend_4_kib_on_each_field_beside_its_value():
    spent = 100 + 2 * 4096
    assert parse_request({"data": bytes(100)}, FORM | {"Content-Length": str(spent)}, LIMITS).payload == bytes(100)
    assert refusal({"data": bytes(100)}, FORM | {"Content-Length": str(spent + 1)}).status == 400


@pytest.mark.parametrize(
    "headers",
    [
        {"Content-Type": "application/octet-stream", "Content-Length": "20000"},
        {"Content-Length": "20000"},
        FORM,
        FORM | {"Content-Length": ""},
        FORM | {"Content-Length": "-1"},
        FORM | {"Content-Length": "9" * 10_000},
    ],
    ids=["body", "no type", "no length", "empty length", "negative", "digits"],
)
def test_only_a_forms_length_is_compared(headers):
    assert parse_request({"data": AUDIO}, headers, LIMITS).payload == AUDIO
