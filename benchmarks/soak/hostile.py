"""What a hostile crowd sends: kinds of requests, and a plan that makes request number N of a seed, always the same one."""

from __future__ import annotations

import base64
import gzip
import itertools
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from random import Random

from benchmarks.soak.bombs import BOMBS, HEAVY, NEVER, bomb
from benchmarks.soak.messages import GOOD, GRPC, HTTP, Message, grpc_data
from benchmarks.soak.mutations import MUTATIONS, make_files, mutate

BOUNDARY = b"soak-7f3a9c"
MUTATED, BOMB, HEAVY_GROUP = "mutated files", "bombs", "heavy files"
FORMS, JSON, HEADERS, GRPC_GROUP, SLOW, ABORTED = (
    "forms",
    "JSON",
    "headers",
    "gRPC",
    "slow callers",
    "callers that leave",
)

# Of 100 requests in a crowd without a count of its own.
SHARES = {
    MUTATED: 60,
    BOMB: 12,
    FORMS: 8,
    JSON: 7,
    HEADERS: 4,
    GRPC_GROUP: 4,
    SLOW: 2,
    ABORTED: 2,
    HEAVY_GROUP: 1,
}

ASTRAY = 0.02  # of the files: sent to an archive that reads others

Files = Mapping[str, Mapping[str, Sequence[bytes]]]
Pair = tuple[bytes, bytes]  # a header's name and value


@dataclass(frozen=True)
class Target:
    """A served archive. reads: "audio" or "image". file: a valid one. max_bytes: the largest that it accepts."""

    name: str
    version: str
    reads: str
    file: bytes
    max_bytes: int


def post(
    target: Target, body: bytes, *headers: Pair, length: int | None = None, path: str | None = None, owed: bool = True
) -> Message:
    """A request over HTTP as a whole. length: what to claim in place of the body's own; -1 claims none."""
    where = f"/predictions/{target.name}/{target.version}" if path is None else path
    lines = [f"POST {where} HTTP/1.1".encode(), b"Host: 127.0.0.1", b"Connection: close"]
    lines += [name + b": " + value for name, value in headers]
    if length != -1:
        lines.append(b"Content-Length: " + str(len(body) if length is None else length).encode())
    return Message("", "", target.name, HTTP, b"\r\n".join([*lines, b"", b""]) + body, owed=owed)


OCTETS: Pair = (b"Content-Type", b"application/octet-stream")
AS_JSON: Pair = (b"Content-Type", b"application/json")
AS_FORM: Pair = (b"Content-Type", b"multipart/form-data; boundary=" + BOUNDARY)


def raw(target: Target, data: bytes, *headers: Pair) -> Message:
    """A file as the body."""
    return post(target, data, OCTETS, *headers)


def part(name: bytes, data: bytes, extra: bytes = b'; filename="f"') -> bytes:
    """A form's part with its boundary before it."""
    return (
        b"--" + BOUNDARY + b'\r\nContent-Disposition: form-data; name="' + name + b'"' + extra + b"\r\n"
        b"Content-Type: application/octet-stream\r\n\r\n" + data + b"\r\n"
    )


def form(target: Target, *parts: bytes, end: bytes = b"--" + BOUNDARY + b"--\r\n") -> Message:
    return post(target, b"".join(parts) + end, AS_FORM)


def as_json(target: Target, text: bytes | str) -> Message:
    return post(target, text.encode() if isinstance(text, str) else text, AS_JSON)


def grpc_inputs(target: Target, inputs: Mapping[str, bytes]) -> Message:
    return Message("", "", target.name, GRPC, grpc_data(target.name, target.version, inputs))


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def upload(target: Target, data: bytes, rng: Random) -> Message:
    """A file by one of the ways in which files come."""
    draw = rng.random()
    if draw < 0.5:
        return raw(target, data)
    if draw < 0.65:
        return form(target, part(b"data", data))
    if draw < 0.75:
        return as_json(target, json.dumps({"data": _base64(data)}))
    if draw < 0.85:
        return grpc_inputs(target, {"data": data})
    # Beside a good one, and twice.
    return form(target, part(b"files." + GOOD.encode(), target.file), *(part(b"files.%d" % n, data) for n in range(2)))


# --- what is wrong with a request, not with its file -------------------------------------------------------------------

Build = Callable[[Target, Random], Message]


def _repeated_field(target: Target, rng: Random) -> Message:
    return form(target, *(part(b"data", target.file) for _ in range(rng.choice((2, 50)))))


def _many_fields(target: Target, rng: Random) -> Message:
    return form(target, *(part(b"files.%d" % n, b"x") for n in range(rng.choice((65, 1000, 20_000)))))


def _wrong_length(target: Target, rng: Random) -> Message:
    whole = len(target.file)
    # More than comes, so that the server waits until the caller leaves; less, so that the rest is no request; no number.
    length = rng.choice((whole + 1000, whole // 2, 0, 2**31, 2**63))
    message = post(target, target.file, OCTETS, length=length, owed=False)
    return replace(message, stop_after=len(message.data), seconds=1.0)


def _two_lengths(target: Target, rng: Random) -> Message:
    return post(target, target.file, OCTETS, (b"Content-Length", b"7"), owed=False)


def _odd_name(target: Target, rng: Random) -> Message:
    names = (
        b"a\x00b",
        b"\xff\xfe",
        b"\x1b[31m",
        b"n" * 5000,
        b"..%2f..%2fetc",
        b"",
        b'"',
        b"files.",
        b"files.\xe2\x80\xae",
    )
    return form(target, part(rng.choice(names), target.file), part(b"files." + rng.choice(names), target.file))


def _odd_filename(target: Target, rng: Random) -> Message:
    name = rng.choice((b"../../x", b"\x00", b"\xff" * 100, b"a" * 8000, b'"', b"\xe2\x80\xae.wav"))
    return form(target, part(b"data", target.file, b'; filename="' + name + b'"'))


def _unended_form(target: Target, rng: Random) -> Message:
    return form(target, part(b"data", target.file), end=rng.choice((b"", b"--" + BOUNDARY, b"--other--\r\n")))


def _headless_part(target: Target, rng: Random) -> Message:
    return form(target, b"--" + BOUNDARY + b"\r\n\r\n" + target.file + b"\r\n")


def _long_part_header(target: Target, rng: Random) -> Message:
    return form(
        target, part(b"data", target.file, b'; filename="f"\r\nX-Long: ' + b"a" * rng.choice((10_000, 1_000_000)))
    )


def _nested_form(target: Target, rng: Random) -> Message:
    inner = b'--x\r\nContent-Disposition: form-data; name="data"\r\n\r\n' + target.file[:500] + b"\r\n--x--\r\n"
    head = (
        b"--"
        + BOUNDARY
        + b'\r\nContent-Disposition: form-data; name="data"\r\nContent-Type: multipart/mixed; boundary=x\r\n\r\n'
    )
    return post(target, head + inner + b"\r\n--" + BOUNDARY + b"--\r\n", AS_FORM)


def _no_boundary(target: Target, rng: Random) -> Message:
    kind = rng.choice(
        (b"multipart/form-data", b"multipart/form-data; boundary=", b"multipart/form-data; boundary=" + b"b" * 5000)
    )
    return post(target, part(b"data", target.file), (b"Content-Type", kind))


def _form_of_bytes(target: Target, rng: Random) -> Message:
    # TorchServe reads a body without a content type as such a form.
    body = target.file if rng.random() < 0.5 else b"data=%zz&" + b"a=b&" * rng.choice((1, 10_000))
    headers = [(b"Content-Type", b"application/x-www-form-urlencoded")] if rng.random() < 0.5 else []
    return post(target, body, *headers)


def _chunked(target: Target, rng: Random) -> Message:
    pieces = [target.file[n : n + 1000] for n in range(0, len(target.file), 1000)]
    body = b"".join(b"%x\r\n" % len(piece) + piece + b"\r\n" for piece in pieces) + b"0\r\n\r\n"
    return post(target, body, OCTETS, (b"Transfer-Encoding", b"chunked"), length=-1)


def _bad_chunks(target: Target, rng: Random) -> Message:
    body = rng.choice((b"ffffffffffffffff\r\nabc\r\n0\r\n\r\n", b"-5\r\nabc\r\n0\r\n\r\n", b"zz\r\nabc\r\n0\r\n\r\n"))
    return post(target, body, OCTETS, (b"Transfer-Encoding", b"chunked"), length=-1, owed=False)


def _length_and_chunks(target: Target, rng: Random) -> Message:
    return post(target, b"5\r\nabcde\r\n0\r\n\r\n", OCTETS, (b"Transfer-Encoding", b"chunked"), length=3, owed=False)


def _packed(target: Target, rng: Random) -> Message:
    body = gzip.compress(bytes(100_000_000) if rng.random() < 0.2 else target.file, mtime=0)
    return post(target, body, OCTETS, (b"Content-Encoding", b"gzip"))


def _empty(target: Target, rng: Random) -> Message:
    return rng.choice((raw(target, b""), form(target), form(target, part(b"data", b"")), as_json(target, b"")))


def _too_large(target: Target, rng: Random) -> Message:
    return raw(target, target.file + bytes(target.max_bytes + 1 - len(target.file)))


def _beyond_the_server(target: Target, rng: Random) -> Message:
    # TorchServe closes the connection after its 413, which a caller that is still sending may not get to read.
    return replace(raw(target, bytes(70 * 2**20)), owed=False)


FORM_KINDS: Mapping[str, Build] = {
    "one field again and again": _repeated_field,
    "too many fields": _many_fields,
    "a wrong length": _wrong_length,
    "two lengths": _two_lengths,
    "odd field names": _odd_name,
    "odd file names": _odd_filename,
    "a form without its end": _unended_form,
    "a part without headers": _headless_part,
    "a part with a long header": _long_part_header,
    "a form in a form": _nested_form,
    "no boundary": _no_boundary,
    "bytes as an urlencoded form": _form_of_bytes,
    "chunks": _chunked,
    "broken chunks": _bad_chunks,
    "a length and chunks": _length_and_chunks,
    "gzip": _packed,
    "nothing": _empty,
}


def _json_kind(text: Callable[[Target, Random], str | bytes]) -> Build:
    return lambda target, rng: as_json(target, text(target, rng))


def _value(target: Target, rng: Random) -> str:
    values = ("null", "true", "1", "1e999", "-1", "[]", "{}", "NaN", "Infinity", '""', '"="', '"\\u0000"', '"\\ud800"')
    return '{"data": ' + rng.choice(values) + "}"


def _threshold(target: Target, rng: Random) -> str:
    values = (
        "NaN",
        "Infinity",
        "-1",
        "2",
        "1e999",
        "null",
        "true",
        "[0.5]",
        '"0.5"',
        '"' + "9" * 5000 + '"',
        "9" * 5000,
    )
    return '{"data": "' + _base64(target.file) + '", "threshold": ' + rng.choice(values) + "}"


def _garbage(target: Target, rng: Random) -> str:
    text = list(_base64(target.file))
    for _ in range(rng.choice((1, 20))):
        text[rng.randrange(len(text))] = rng.choice("=-_ \u00e9%\\n!")
    return json.dumps({"data": "".join(text)})


def _names(target: Target, rng: Random) -> str:
    names = ("a\0b", "n" * 201, "\ud800", "", "\u202e", "../x", "a" * 200)
    return json.dumps({"files": {rng.choice(names): _base64(target.file), "other": _base64(target.file[:100])}})


def _not_utf8(target: Target, rng: Random) -> bytes:
    whole = json.dumps({"data": _base64(target.file)})
    return rng.choice((whole.encode("utf-16"), whole.encode("utf-32"), b"\xff" + whole.encode(), b"{\xff}"))


JSON_KINDS: Mapping[str, Build] = {
    "nested arrays": _json_kind(lambda t, r: b"[" * r.choice((900, 5000, 1_000_000))),
    "nested objects": _json_kind(lambda t, r: b'{"data":' * r.choice((900, 5000, 1_000_000))),
    "100,000 keys": _json_kind(lambda t, r: json.dumps(dict.fromkeys(map(str, range(100_000)), 1))),
    "1,000 files": _json_kind(lambda t, r: json.dumps({"files": dict.fromkeys(map(str, range(1000)), "AAAA")})),
    "one key twice": _json_kind(lambda t, r: '{"data": "AAAA", "data": "AAAA"}'),
    "a number of a million digits": _json_kind(lambda t, r: '{"data": "AAAA", "threshold": ' + "7" * 1_000_000 + "}"),
    "a value that is no file": _json_kind(_value),
    "an odd threshold": _json_kind(_threshold),
    "damaged base64": _json_kind(_garbage),
    "odd names": _json_kind(_names),
    "no UTF-8": _json_kind(_not_utf8),
    "cut short": _json_kind(lambda t, r: json.dumps({"data": _base64(t.file)})[: r.randrange(1, 2000)]),
    "a long string": _json_kind(lambda t, r: json.dumps({"data": "A" * 8_000_000})),
    "whitespace": _json_kind(lambda t, r: b" " * 10_000_000 + b"{}"),
}


def _x_threshold(target: Target, rng: Random) -> Message:
    values = (
        b"nan",
        b"inf",
        b"2",
        b"-0.1",
        b"",
        b"1e999",
        b"0x1",
        b"0.5, 0.6",
        b"\xff\xfe",
        b"\xc3\xa9",
        b"9" * 7000,
        b"0.5\x01",
    )
    return raw(target, target.file, (b"X-Threshold", rng.choice(values)))


def _two_thresholds(target: Target, rng: Random) -> Message:
    return raw(target, target.file, (b"X-Threshold", b"0.1"), (b"X-Threshold", b"0.9"))


def _many_headers(target: Target, rng: Random) -> Message:
    # Netty takes 8,192 bytes of headers in all.
    return raw(target, target.file, *((b"X-%d" % n, b"y") for n in range(rng.choice((100, 400, 5000)))))


def _long_header(target: Target, rng: Random) -> Message:
    return raw(target, target.file, (b"X-Long", b"a" * rng.choice((7000, 9000, 100_000))))


def _odd_header(target: Target, rng: Random) -> Message:
    headers = (
        (b"describe", b"True"),
        (b"Content-Type", b"\xff\xfe"),
        (b"Content-Type", b"text/plain; charset=utf-7"),
        (b"Expect", b"100-continue"),
        (b"Expect", b"something else"),
        (b"X-Threshold\x00", b"0.5"),
        (b"X-\xe9", b"\xe9"),
        (b"Content-Disposition", b'form-data; name="x"'),
        (b"ts_stream_next", b"true"),
        (b"Upgrade", b"h2c"),
    )
    name, value = rng.choice(headers)
    return replace(raw(target, target.file, (name, value)), owed=name not in (b"Expect", b"X-Threshold\x00", b"X-\xe9"))


def _odd_path(target: Target, rng: Random) -> Message:
    paths = (
        f"/predictions/{target.name}/0.0",
        "/predictions/%00",
        "/predictions/..%2f..%2fetc",
        "/predictions/" + "a" * 3000,
        "/predictions/",
        f"/predictions/{target.name}?data=" + "a" * 2000,
        f"/predictions/{target.name}/{target.version}/explain/" + "x" * 100,
        f"/predictions/{target.name}?" + "&".join(f"a{n}=b" for n in range(500)),
    )
    return post(target, target.file, OCTETS, path=rng.choice(paths))


HEADER_KINDS: Mapping[str, Build] = {
    "an odd threshold": _x_threshold,
    "two thresholds": _two_thresholds,
    "many headers": _many_headers,
    "a long header": _long_header,
    "an odd header": _odd_header,
    "an odd path": _odd_path,
}


def _no_input(target: Target, rng: Random) -> Message:
    return grpc_inputs(target, rng.choice(({}, {"": b""}, {"data": b""}, {"threshold": b"0.5"})))


def _many_inputs(target: Target, rng: Random) -> Message:
    count = rng.choice((65, 2000, 50_000))
    return grpc_inputs(target, {f"files.{n}": b"x" for n in range(count)})


def _odd_inputs(target: Target, rng: Random) -> Message:
    name = rng.choice(("files.\0", "files." + "n" * 100_000, "\u202e", "files.", "body", "describe"))
    return grpc_inputs(target, {"data": target.file, name: target.file[:100]})


def _grpc_threshold(target: Target, rng: Random) -> Message:
    value = rng.choice((b"nan", b"inf", b"2", b"", b"\xff", b"9" * 100_000, b"0.5\x00"))
    return grpc_inputs(target, {"data": target.file, "threshold": value})


def _unknown_model(target: Target, rng: Random) -> Message:
    name, version = rng.choice(((target.name, "0.0"), ("nobody", ""), ("", ""), ("a" * 10_000, ""), ("../x", "..")))
    return Message("", "", target.name, GRPC, grpc_data(name, version, {"data": target.file}))


def _no_message(target: Target, rng: Random) -> Message:
    whole = grpc_data(target.name, target.version, {"data": target.file})
    data = rng.choice((b"\xff" * 100, rng.randbytes(500), whole[: len(whole) // 2], whole + b"\x07"))
    # gRPC itself ends such a call before TorchServe sees it.
    return Message("", "", target.name, GRPC, data, owed=False)


def _large_message(target: Target, rng: Random) -> Message:
    return grpc_inputs(target, {"data": target.file + bytes(target.max_bytes + 1 - len(target.file))})


def _message_beyond_the_server(target: Target, rng: Random) -> Message:
    return replace(grpc_inputs(target, {"data": bytes(70 * 2**20)}), owed=False)


GRPC_KINDS: Mapping[str, Build] = {
    "no input": _no_input,
    "many inputs": _many_inputs,
    "odd inputs": _odd_inputs,
    "an odd threshold": _grpc_threshold,
    "another model": _unknown_model,
    "no message": _no_message,
}

# Rare, for a request of 50 MB delays its neighbours by being read alone.
LARGE_KINDS: Mapping[str, Build] = {
    "a file too large": _too_large,
    "a body that TorchServe refuses": _beyond_the_server,
    "a gRPC file too large": _large_message,
    "a gRPC message that TorchServe refuses": _message_beyond_the_server,
}


def _slow(target: Target, rng: Random) -> Message:
    message = rng.choice((raw(target, target.file), form(target, part(b"data", target.file))))
    return replace(message, seconds=rng.uniform(1.0, 6.0))


def _slow_head(target: Target, rng: Random) -> Message:
    headers = [(b"X-%d" % n, b"y" * 100) for n in range(50)]
    return replace(raw(target, target.file[:2000], *headers), seconds=rng.uniform(1.0, 4.0))


def _leaves(target: Target, rng: Random) -> Message:
    message = upload(target, target.file, rng)
    return replace(message, stop_after=rng.randrange(1, len(message.data)))


def _does_not_wait(target: Target, rng: Random) -> Message:
    message = upload(target, target.file, rng)
    return replace(message, stop_after=len(message.data))


def _slow_and_leaves(target: Target, rng: Random) -> Message:
    return replace(_slow(target, rng), stop_after=len(target.file) // 2)


# --- files -------------------------------------------------------------------------------------------------------------


def _mutated(files: Files, reads: str, format_: str, mutation: str, target: Target, rng: Random) -> Message:
    own = files[reads][format_]
    # Spliced with one of its own format or of any other.
    others = own if rng.random() < 0.5 else rng.choice(list(files[reads].values()))
    return upload(target, mutate(mutation, format_, rng.choice(own), rng.choice(others), rng), rng)


def _bomb(reads: str, name: str, target: Target, rng: Random) -> Message:
    return replace(upload(target, bomb(reads, name), rng), refused=name in NEVER)


def _crowd_of_bombs(reads: str, target: Target, rng: Random) -> Message:
    """As many as one request may have, or as fit."""
    name = rng.choice(list(BOMBS[reads]))
    data = bomb(reads, name)
    count = max(1, min(64, 60_000_000 // len(data)))
    return replace(form(target, *(part(b"files.%d" % n, data) for n in range(count))), refused=name in NEVER)


@dataclass(frozen=True)
class Kind:
    """A kind of request. reads: what an archive has to read for it to be sent there; None for any."""

    group: str
    build: Build
    reads: str | None = None


def kinds(files: Files, reads: Sequence[str]) -> dict[str, Kind]:
    """Every kind that archives which read this can be sent, by a name of its own."""
    found: dict[str, Kind] = {}
    for each in reads:
        for format_, mutation in itertools.product(files[each], MUTATIONS):
            found[f"{format_}: {mutation}"] = Kind(MUTATED, partial(_mutated, files, each, format_, mutation), each)
        for name in BOMBS[each]:
            found[f"bomb: {name}"] = Kind(BOMB, partial(_bomb, each, name), each)
        found[f"bomb: many at once ({each})"] = Kind(BOMB, partial(_crowd_of_bombs, each), each)
        for name in HEAVY[each]:
            found[f"heavy: {name}"] = Kind(HEAVY_GROUP, partial(_bomb, each, name), each)
    plain = (
        (FORMS, "form", FORM_KINDS),
        (JSON, "JSON", JSON_KINDS),
        (HEADERS, "header", HEADER_KINDS),
        (GRPC_GROUP, "gRPC", GRPC_KINDS),
        (HEAVY_GROUP, "large", LARGE_KINDS),
        (SLOW, "slow", {"body": _slow, "headers": _slow_head}),
        (ABORTED, "leaves", {"half-way": _leaves, "before the answer": _does_not_wait, "slowly": _slow_and_leaves}),
    )
    for group, word, builds in plain:
        found |= {f"{word}: {name}": Kind(group, build) for name, build in builds.items()}
    return found


@dataclass(frozen=True)
class Plan:
    """Request number N of a crowd: the same for the same seed, targets and versions of the codecs.

    order: the kinds of the requests to come, one after the other, each with how many of it there were before in the making of
        the order, by which archives take turns; empty for a crowd without end, which draws both.
    """

    targets: Sequence[Target]
    seed: int
    kinds: Mapping[str, Kind]
    order: Sequence[tuple[str, int]] = ()

    @classmethod
    def make(cls, targets: Sequence[Target], seed: int, requests: int | None = None, bombs: int | None = None) -> Plan:
        """Make the files, bombs among them, and the order.

        requests: mutated files in all, each mutation of each format in turn, with the other groups in their usual
        proportion; None for a crowd without end. bombs: of each bomb, in place of that proportion; needs `requests`.
        """
        reads = sorted({target.reads for target in targets})
        found = kinds(make_files(), reads)
        for each in reads:
            for name in (*BOMBS[each], *HEAVY[each]):
                bomb(each, name)
        if requests is None:
            return cls(targets, seed, found)
        turns: Counter[str] = Counter()
        order = []
        for name in _counted(found, requests, bombs):
            order.append((name, turns[name]))
            turns[name] += 1
        Random(f"{seed} order").shuffle(order)
        return cls(targets, seed, found, order)

    def __len__(self) -> int:
        """How many requests there are; 0 where there is no end."""
        return len(self.order)

    def message(self, number: int) -> Message:
        """Raises IndexError past the last one."""
        rng = Random(f"{self.seed} {number}")
        name, turn = self.order[number] if self.order else (self._draw(rng), rng.randrange(1 << 30))
        kind = self.kinds[name]
        # A few go where nobody reads such files.
        astray = rng.random() < ASTRAY
        fitting = [target for target in self.targets if astray or kind.reads in (None, target.reads)]
        target = fitting[turn % len(fitting)]
        return replace(kind.build(target, rng), kind=name, group=kind.group)

    def _draw(self, rng: Random) -> str:
        (group,) = rng.choices(list(SHARES), list(SHARES.values()))
        return rng.choice([name for name, kind in self.kinds.items() if kind.group == group])


def _counted(found: Mapping[str, Kind], requests: int, bombs: int | None) -> Iterator[str]:
    for group, share in SHARES.items():
        names = [name for name, kind in found.items() if kind.group == group]
        if group == BOMB and bombs is not None:
            yield from names * bombs
        else:
            yield from itertools.islice(itertools.cycle(names), round(requests * share / SHARES[MUTATED]))
