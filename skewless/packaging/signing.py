"""An archive's signature: who says that its files belong together, as one version of one model.

The format is OpenSSF Model Signing v1.0: a Sigstore bundle with a DSSE envelope around an in-toto statement, which lists the
SHA-256 of every file. It is made by the package `model-signing`, with a plain key and without a network.

It is verified here, by `cryptography` alone. A worker verifies whenever it starts: importing model-signing takes 0.5 s of a
processor, and verifying 48 MB here 0.1 s, imports included. A server needs none of the packages that model-signing brings. It is
also stricter: no file may lie beside those that are signed, and the archive has to be called what it is. The tests hold the two
against each other.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import os
import re
import shutil
import tempfile
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from skewless.core.files import atomic
from skewless.errors import SignatureError, UsageError
from skewless.torchserve.archive import MANIFEST, MAX_JSON_BYTES, METRICS, SIGNATURE, Archive, digest_of
from skewless.torchserve.store import UNPROVED

# The environment variable with a private key's password: what is on a command line, others can read.
PASSWORD = "SKEWLESS_SIGN_PASSWORD"

HOW_TO_MAKE_A_KEY = (
    "make one with `skewless sign --new-key FILE`, or `openssl ecparam -name prime256v1 -genkey -noout -out FILE`"
)

_PUBLIC_SUFFIXES = (".pub", ".pem")
_PAYLOAD_TYPE = "application/vnd.in-toto+json"
_PREDICATE_TYPE = "https://model_signing/signature/v1.0"
_MOST_NAMED = 3


@dataclass(frozen=True)
class SigningKey:
    """A private key on the curve P-256, in a PEM file. fingerprint: of its public key, as `TrustedKeys` has it."""

    path: Path
    fingerprint: str
    password: bytes | None = field(default=None, repr=False)

    @classmethod
    def read(cls, path: str | Path) -> SigningKey:
        """Raises UsageError for a file that is no such key, or one whose password SKEWLESS_SIGN_PASSWORD does not hold."""
        path = Path(path)
        text = os.environ.get(PASSWORD)
        password = text.encode() if text else None
        data = _read(path, "signing key")
        try:
            key = serialization.load_pem_private_key(data, password)
        except TypeError:
            what = "has a password" if password is None else "has no password"
            how = f"put it into the environment variable {PASSWORD}" if password is None else f"unset {PASSWORD}"
            raise UsageError(f"the signing key {path} {what}; {how}") from None
        except (ValueError, UnsupportedAlgorithm) as error:
            why = "wrong password, or " if password else ""
            raise UsageError(
                f"the signing key {path} cannot be read: {why}no private key in PEM ({error}); {HOW_TO_MAKE_A_KEY}"
            ) from error
        if not (isinstance(key, ec.EllipticCurvePrivateKey) and isinstance(key.curve, ec.SECP256R1)):
            raise UsageError(f"the signing key {path} is {_kind(key)}, expected a key on P-256; {HOW_TO_MAKE_A_KEY}")
        return cls(path, _fingerprint(key.public_key()), password)


@dataclass(frozen=True)
class TrustedKeys:
    """The public keys that archives have to be signed with, by fingerprint. source: where they were read."""

    source: Path
    keys: Mapping[str, ec.EllipticCurvePublicKey]

    @classmethod
    def read(cls, source: str | Path) -> TrustedKeys:
        """Of a PEM file, which may have several, or of every .pub and .pem of a folder. Raises UsageError for anything but
        public keys on P-256, and where there is none."""
        source = Path(source)
        files = [source]
        if source.is_dir():
            files = sorted(path for path in source.iterdir() if path.suffix in _PUBLIC_SUFFIXES and path.is_file())
        keys: dict[str, ec.EllipticCurvePublicKey] = {}
        for file in files:
            data = _read(file, "trusted key")
            if b"PRIVATE KEY" in data:
                raise UsageError(
                    f"the trusted key {file} is a private one, which only whoever signs should have; give its public key: "
                    f"`openssl ec -in {file} -pubout`"
                )
            for block in re.findall(rb"-----BEGIN [^-]+-----.*?-----END [^-]+-----", data, re.DOTALL) or [data]:
                try:
                    key = serialization.load_pem_public_key(block)
                except (ValueError, UnsupportedAlgorithm) as error:
                    raise UsageError(f"the trusted key {file} is no public key in PEM: {error}") from error
                if not (isinstance(key, ec.EllipticCurvePublicKey) and isinstance(key.curve, ec.SECP256R1)):
                    raise UsageError(f"the trusted key {file} is {_kind(key)}, expected a public key on P-256")
                keys[_fingerprint(key)] = key
        if not keys:
            raise UsageError(f"{source} has no trusted key; put public keys there, as files that end in .pub or .pem")
        return cls(source, keys)


@dataclass(frozen=True)
class Signed:
    """What a signature that verifies says. key: the signing key's fingerprint. digest: as `Archive.digest`. files: how many."""

    name: str
    version: str
    key: str
    digest: str
    files: int


def new_key(path: str | Path) -> Path:
    """Write a new private key, with the password that SKEWLESS_SIGN_PASSWORD holds if any, and its public key beside it, whose
    path is returned. Raises UsageError where one of the files exists."""
    path = Path(path)
    public = path.with_name(path.name + ".pub")
    for each in (path, public):
        if each.exists():
            raise UsageError(f"{each} exists; choose another name for the new key")
    key = ec.generate_private_key(ec.SECP256R1())
    password = os.environ.get(PASSWORD)
    encryption: serialization.KeySerializationEncryption = serialization.NoEncryption()
    if password:
        encryption = serialization.BestAvailableEncryption(password.encode())
    private = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, encryption)
    path.parent.mkdir(parents=True, exist_ok=True)
    public.write_bytes(_public_pem(key.public_key()))
    # Nobody else may read it, not for a moment; and never in the place of another.
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(private)
    return public


def ready_to_sign(path: Path) -> SigningKey:
    """The key, once it is known that it can be used: long before there is something to sign. Raises as `SigningKey.read` does,
    and ModuleNotFoundError where model-signing is not installed."""
    key = SigningKey.read(path)
    import model_signing  # noqa: F401

    return key


def sign_folder(folder: Path, key: SigningKey) -> None:
    """Write signature.json over all other files of an unpacked archive."""
    from model_signing import hashing, signing

    hashed = hashing.Config().use_file_serialization()
    hashed.set_ignored_paths(paths=[SIGNATURE], ignore_git_paths=False)
    # Said to be text, but handed on as it is to what expects bytes.
    password: Any = key.password
    signer = signing.Config().use_elliptic_key_signer(private_key=key.path, password=password)
    signer.set_hashing_config(hashed).sign(folder, folder / SIGNATURE)


def sign_archive(path: str | Path, key: SigningKey) -> Signed:
    """Sign an archive, in the place of a signature that it may have; every other file stays as it is.

    Raises UsageError, and then changes nothing, for what is no archive, is called otherwise than it is, or could not be verified.
    """
    path = Path(path).resolve()
    with Archive(path) as archive, tempfile.TemporaryDirectory() as scratch:
        name, version = archive.name_and_version()
        _check_called(path, name, version)
        # The folder's name is the signature's subject.
        folder = Path(scratch, f"{name}-{version}")
        archive.extract(folder)
        sign_folder(folder, key)
        with atomic(path) as unfinished:
            with zipfile.ZipFile(path) as old, zipfile.ZipFile(unfinished, "w") as new:
                for info in old.infolist():
                    if info.filename != SIGNATURE:
                        with old.open(info) as source, new.open(info, "w") as target:
                            shutil.copyfileobj(source, target)
                info = zipfile.ZipInfo(SIGNATURE, date_time=(1980, 1, 1, 0, 0, 0))
                info.external_attr = 0o644 << 16
                info.compress_type = zipfile.ZIP_DEFLATED
                new.writestr(info, (folder / SIGNATURE).read_bytes())
            shutil.copymode(path, unfinished)
            own = {key.fingerprint: _public_of(key)}
            return verify_archive(unfinished, TrustedKeys(key.path, own), called=path.name)


def verify_archive(path: str | Path, trusted: TrustedKeys, called: str | None = None) -> Signed:
    """Raise SignatureError unless an archive is signed with a trusted key, whole, without another file, and called what it is:
    NAME-VERSION.mar, with the name and the version that its manifest and its metrics have.

    called: the file's name, where it has another for the moment.
    """
    path = Path(path)
    with Archive(path) as archive:
        what = called or path.name
        signature = archive.read(SIGNATURE, MAX_JSON_BYTES) if SIGNATURE in archive else None
        # Before anything is made of its content.
        fingerprint, statement = _envelope(what, signature, trusted)
        digests = archive.digests()
        _check_files(what, statement, digests)
        archive.check_layout()
        manifest = archive.json_object(MANIFEST)
        metrics = archive.json_object(METRICS) if METRICS in archive else None
        name, version = _names(what, manifest, metrics)
        _check_called(Path(what), name, version)
        config = manifest["model"].get("configFile")
        _check_started_by_us(what, manifest, archive.yaml(config) if isinstance(config, str) else None)
        return Signed(name, version, fingerprint, digest_of(digests), len(digests))


def verify_folder(folder: str | Path, trusted: TrustedKeys) -> None:
    """Raise SignatureError unless an unpacked archive is signed with a trusted key, whole, and without another file."""
    folder = Path(folder)
    signature = folder / SIGNATURE
    read = signature.is_file() and not signature.is_symlink()
    _, statement = _envelope(str(folder), signature.read_bytes() if read else None, trusted)
    digests = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink() or not (path.is_dir() or path.is_file()):
            raise _refused(str(folder), f"its {name} is a link or no file")
        if path.is_file() and name != SIGNATURE:
            with path.open("rb") as file:
                digests[name] = hashlib.file_digest(file, "sha256").hexdigest()
    _check_files(str(folder), statement, digests)
    manifest, metrics = (json.loads((folder / each).read_bytes()) for each in (MANIFEST, METRICS))
    _names(str(folder), manifest, metrics)


def _envelope(what: str, signature: bytes | None, trusted: TrustedKeys) -> tuple[str, dict[str, Any]]:
    """The signing key's fingerprint, and the statement that it signed. Nothing of the statement is read before it verifies.

    DSSE: https://github.com/secure-systems-lab/dsse/blob/v1.0.2/protocol.md
    """
    if signature is None:
        raise _refused(what, "it is not signed; `skewless sign` does that")
    try:
        bundle = json.loads(signature)
        envelope = bundle["dsseEnvelope"]
        kind = str(envelope["payloadType"])
        payload = base64.b64decode(envelope["payload"], validate=True)
        (entry,) = envelope["signatures"]
        signed = base64.b64decode(entry["sig"], validate=True)
        hint = str(bundle["verificationMaterial"]["publicKey"]["hint"])
    except (ValueError, LookupError, TypeError, RecursionError, binascii.Error) as error:
        raise _refused(
            what, f"its {SIGNATURE} is no signature by a key in the format of model-signing: {error!r}"
        ) from error
    if hint not in trusted.keys:
        raise _refused(what, f"it is signed with the key {hint:.16}, which is none of those in {trusted.source}")
    encoded = b"DSSEv1 %d %b %d %b" % (len(kind.encode()), kind.encode(), len(payload), payload)
    try:
        trusted.keys[hint].verify(signed, encoded, ec.ECDSA(hashes.SHA256()))
    except InvalidSignature:
        raise _refused(what, f"its {SIGNATURE} was altered, or is not by the key {hint:.16} that it names") from None
    statement = json.loads(payload)
    if kind != _PAYLOAD_TYPE or statement.get("predicateType") != _PREDICATE_TYPE:
        raise _refused(what, f"its {SIGNATURE} is {statement.get('predicateType')!r}, expected {_PREDICATE_TYPE}")
    return hint, statement


def _check_files(what: str, statement: Mapping[str, Any], digests: Mapping[str, str]) -> None:
    """digests: SHA-256 by name, of every file but the signature."""
    kind, listed = statement["predicate"]["serialization"], statement["predicate"]["resources"]
    if kind["method"] != "files" or {each["algorithm"] for each in listed} != {"sha256"}:
        raise _refused(
            what, f"its {SIGNATURE} is over {kind['method']} by {kind['hash_type']}, expected files by sha256"
        )
    signed = {each["name"]: each["digest"] for each in listed}
    found = {
        "other content than was signed": [name for name in signed if digests.get(name, signed[name]) != signed[name]],
        "files that were not signed": sorted(set(digests) - set(signed)),
        "lost files that were signed": sorted(set(signed) - set(digests)),
    }
    wrong = [f"{problem}: {_listed(names)}" for problem, names in found.items() if names]
    if wrong:
        raise _refused(what, f"it was altered after it was signed; it has {'; '.join(wrong)}")


def _names(what: str, manifest: Mapping[str, Any], metrics: Mapping[str, Any] | None) -> tuple[str, str]:
    """Name and version of the manifest, if the metrics have the same."""
    model = manifest["model"]
    stated = (model.get("modelName"), model.get("modelVersion"))
    if metrics is None:
        raise _refused(what, f"it has no {METRICS}, which would say what was proved of it")
    proved = (metrics.get("model_name"), metrics.get("model_version"))
    if stated != proved:
        raise _refused(
            what, f"its {MANIFEST} says {' '.join(map(str, stated))}, and its {METRICS} {' '.join(map(str, proved))}"
        )
    return stated


def _check_called(path: Path, name: str, version: str) -> None:
    right = f"{name}-{version}.mar"
    # What retraining has not proved yet is called so.
    if path.name not in (right, f".{name}-{version}{UNPROVED}"):
        raise _refused(path.name, f"it is {name} {version}, and was renamed; its file has to be called {right}")


def _check_started_by_us(what: str, manifest: Mapping[str, Any], config: Any) -> None:
    """Refuse settings by which TorchServe starts workers with another Python, which would not verify what it loads."""
    asked = (
        [f"useVenv in {manifest['model']['configFile']}"] if isinstance(config, dict) and config.get("useVenv") else []
    )
    if isinstance(config, dict) and "parallelType" in config:
        asked.append(f"parallelType in {manifest['model']['configFile']}")
    if manifest.get("runtime", "python") != "python":
        asked.append(f"the runtime {manifest['runtime']!r} in {MANIFEST}")
    if asked:
        raise _refused(
            what, f"it asks for {' and '.join(asked)}, with which its workers would not verify what they load"
        )


def _refused(what: str, why: str) -> SignatureError:
    return SignatureError(f"{what} is refused: {why}")


def _listed(names: list[str]) -> str:
    more = len(names) - _MOST_NAMED
    return ", ".join(names[:_MOST_NAMED]) + (f" and {more} more" if more > 0 else "")


def _read(path: Path, what: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UsageError(f"the {what} {path} cannot be read: {error.strerror}; {HOW_TO_MAKE_A_KEY}") from error


def _kind(key: object) -> str:
    curve = getattr(key, "curve", None)
    return f"on the curve {curve.name}" if curve is not None else f"of the kind {type(key).__name__}"


def _public_of(key: SigningKey) -> ec.EllipticCurvePublicKey:
    private = serialization.load_pem_private_key(key.path.read_bytes(), key.password)
    assert isinstance(private, ec.EllipticCurvePrivateKey)
    return private.public_key()


def _public_pem(key: ec.EllipticCurvePublicKey) -> bytes:
    return key.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)


def _fingerprint(key: ec.EllipticCurvePublicKey) -> str:
    """SHA-256 of the key in PEM, in hexadecimal: by this model-signing names a key in a signature."""
    return hashlib.sha256(_public_pem(key)).hexdigest()
