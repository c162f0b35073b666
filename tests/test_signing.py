"""Signed archives: what a signature covers, who is believed, and that a server takes nothing else; what an archive says of itself."""

from __future__ import annotations

import base64
import json
import os
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import psutil
import pytest
import torch
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator
from huggingface_hub import ModelCard
from model_signing import verifying

from skewless.cli.retraining import _key
from skewless.errors import LoadError, SignatureError, UsageError
from skewless.evaluation.evaluate import evaluate
from skewless.packaging import signing
from skewless.packaging.bill_of_materials import bill_of_materials
from skewless.packaging.build import build_archive
from skewless.packaging.model_card import model_card
from skewless.packaging.signing import SigningKey, TrustedKeys
from skewless.torchserve import launch
from skewless.torchserve.archive import SIGNATURE, Archive
from skewless.torchserve.client import Client
from skewless.torchserve.server import LOAD_ERRORS, Server
from skewless.training.checkpoint import load_checkpoint
from skewless.training.manifest import read_manifest
from tests.conftest import call_skewless, run_skewless, until
from tests.tiny_model import TinyModel, recording, tiny_model

__all__ = ["tiny_model"]

FILES = {
    "MAR-INF/MANIFEST.json": json.dumps(
        {
            "runtime": "python",
            "model": {
                "modelName": "echo",
                "modelVersion": "1.0",
                "handler": "entry.py",
                "configFile": "model-config.yaml",
            },
        }
    ),
    "entry.py": "def handle(data, context): return data\n",
    "metrics.json": json.dumps({"model_name": "echo", "model_version": "1.0", "evaluation": {"auc": 0.9}}),
    "model-config.yaml": "minWorkers: 1\n",
    "references/stages.json": '{"decode": 0.5}',
    "weights.safetensors": "\x00weights" * 1000,
}


def pack(path: Path, files: Mapping[str, str | bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def unpacked(path: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the key pairs `ours` and `foreign`."""
    folder = tmp_path_factory.mktemp("keys")
    for name in ("ours", "foreign"):
        signing.new_key(folder / name)
    return folder


@pytest.fixture
def trusted(keys: Path) -> TrustedKeys:
    return TrustedKeys.read(keys / "ours.pub")


@pytest.fixture
def signed(tmp_path: Path, keys: Path) -> Path:
    path = pack(tmp_path / "echo-1.0.mar", FILES)
    signing.sign_archive(path, SigningKey.read(keys / "ours"))
    return path


# --- what a signature covers ------------------------------------------------------------------------------------------


def test_a_signature_changes_nothing_else(tmp_path: Path, keys: Path, trusted: TrustedKeys):
    path = pack(tmp_path / "echo-1.0.mar", FILES)
    os.chmod(path, 0o640)
    before = unpacked(path)
    with Archive(path) as archive:
        digest = archive.digest()
    for key in ("foreign", "ours"):
        signing.sign_archive(path, SigningKey.read(keys / key))
        after = unpacked(path)
        assert after.pop(SIGNATURE) and after == before
    found = signing.verify_archive(path, trusted)
    assert (found.name, found.version, found.digest, found.files) == ("echo", "1.0", digest, len(FILES))
    assert [found.key] == list(trusted.keys)
    assert path.stat().st_mode & 0o777 == 0o640
    assert [each.name for each in tmp_path.iterdir()] == ["echo-1.0.mar"]


def test_no_file_is_left_out(tmp_path: Path, keys: Path, trusted: TrustedKeys):
    """As model-signing leaves git's out unless told otherwise."""
    path = pack(tmp_path / "echo-1.0.mar", {**FILES, ".gitattributes": "*.safetensors binary"})
    assert signing.sign_archive(path, SigningKey.read(keys / "ours")).files == len(FILES) + 1
    pack(path, unpacked(path) | {".gitattributes": b"*.py binary"})
    with pytest.raises(SignatureError, match=r"other content than was signed: \.gitattributes"):
        signing.verify_archive(path, trusted)


def changed(name: str) -> Callable[[dict[str, bytes]], None]:
    def change(files: dict[str, bytes]) -> None:
        files[name] = files[name].replace(b"e", b"E", 1)

    return change


ALTERED: dict[str, tuple[Callable[[dict[str, bytes]], object], str]] = {
    "weights": (changed("weights.safetensors"), "other content than was signed: weights.safetensors"),
    "metrics": (changed("metrics.json"), "other content than was signed: metrics.json"),
    "a self-test record": (changed("references/stages.json"), "other content than was signed: references/stages.json"),
    "the handler": (changed("entry.py"), "other content than was signed: entry.py"),
    "settings": (changed("model-config.yaml"), "other content than was signed: model-config.yaml"),
    "the manifest": (changed("MAR-INF/MANIFEST.json"), "other content than was signed: MAR-INF/MANIFEST.json"),
    "a file more": (
        lambda files: files.update({"sitecustomize.py": b""}),
        "files that were not signed: sitecustomize.py",
    ),
    "a hidden file more": (
        lambda files: files.update({".git/hook.py": b""}),
        r"files that were not signed: \.git/hook.py",
    ),
    "a file less": (lambda files: files.pop("entry.py"), "lost files that were signed: entry.py"),
    "no signature": (lambda files: files.pop(SIGNATURE), "it is not signed; `skewless sign` does that"),
    "no bundle": (lambda files: files.update({SIGNATURE: b'{"a": []}'}), "is no signature by a key in the format of"),
    "no JSON": (lambda files: files.update({SIGNATURE: b"\xff"}), "is no signature by a key in the format of"),
}


@pytest.mark.parametrize("case", ALTERED)
def test_what_was_altered_is_named(case: str, signed: Path, trusted: TrustedKeys):
    change, message = ALTERED[case]
    files = unpacked(signed)
    change(files)
    pack(signed, files)
    with pytest.raises(SignatureError, match=message):
        signing.verify_archive(signed, trusted)
    folder = signed.parent / "unpacked"
    with zipfile.ZipFile(signed) as archive:
        archive.extractall(folder)
    with pytest.raises(SignatureError, match=message):
        signing.verify_folder(folder, trusted)


def test_the_unpacked_folder_verifies_and_has_no_links(signed: Path, trusted: TrustedKeys, tmp_path: Path):
    folder = tmp_path / "unpacked"
    with zipfile.ZipFile(signed) as archive:
        archive.extractall(folder)
    signing.verify_folder(folder, trusted)
    # The same bytes, which somebody may change elsewhere.
    (folder / "entry.py").rename(tmp_path / "elsewhere.py")
    (folder / "entry.py").symlink_to(tmp_path / "elsewhere.py")
    with pytest.raises(SignatureError, match=r"its entry\.py is a link or no file"):
        signing.verify_folder(folder, trusted)


@pytest.mark.parametrize("name", ["echo-2.0.mar", "other-1.0.mar", "echo.mar", ".echo-1.0.mar"])
def test_a_renamed_archive_is_refused(name: str, signed: Path, trusted: TrustedKeys, keys: Path):
    renamed = signed.rename(signed.with_name(name))
    with pytest.raises(
        SignatureError, match=r"it is echo 1\.0, and was renamed; its file has to be called echo-1\.0\.mar"
    ):
        signing.verify_archive(renamed, trusted)
    before = renamed.read_bytes()
    with pytest.raises(SignatureError, match="was renamed"):
        signing.sign_archive(renamed, SigningKey.read(keys / "ours"))
    assert [(each.name, each.read_bytes()) for each in renamed.parent.iterdir()] == [(name, before)]


def test_an_archive_that_is_not_proved_yet_may_be_called_so(signed: Path, trusted: TrustedKeys):
    assert signing.verify_archive(signed.rename(signed.with_name(".echo-1.0.unproved.mar")), trusted).version == "1.0"


def test_a_foreign_signature_is_refused(tmp_path: Path, keys: Path, trusted: TrustedKeys):
    path = pack(tmp_path / "echo-1.0.mar", FILES)
    key = SigningKey.read(keys / "foreign")
    signing.sign_archive(path, key)
    with pytest.raises(SignatureError, match=f"signed with the key {key.fingerprint:.16}, which is none of those in"):
        signing.verify_archive(path, trusted)


@pytest.mark.parametrize("what", ["the statement", "the key's name", "the signature"])
def test_an_altered_signature_is_refused(what: str, signed: Path, trusted: TrustedKeys, keys: Path):
    files = unpacked(signed)
    files["entry.py"] = b"def handle(data, context): steal(data)\n"
    pack(signed, files)
    signing.sign_archive(signed, SigningKey.read(keys / ("foreign" if what == "the key's name" else "ours")))
    bundle = json.loads(unpacked(signed)[SIGNATURE])
    envelope = bundle["dsseEnvelope"]
    if what == "the statement":
        statement = json.loads(base64.b64decode(envelope["payload"]))
        statement["predicate"]["resources"][0]["digest"] = "0" * 64
        envelope["payload"] = base64.b64encode(json.dumps(statement).encode()).decode()
    elif what == "the key's name":
        bundle["verificationMaterial"]["publicKey"]["hint"] = next(iter(trusted.keys))
    else:
        envelope["signatures"][0]["sig"] = base64.b64encode(b"no signature").decode()
    pack(signed, {**files, SIGNATURE: json.dumps(bundle)})
    with pytest.raises(SignatureError, match="was altered, or is not by the key"):
        signing.verify_archive(signed, trusted)


def test_the_signature_of_another_version_is_refused(signed: Path, keys: Path, trusted: TrustedKeys):
    """Both are signed by us: the older one must not be served as the newer one."""
    newer = {name: text.replace('"1.0"', '"2.0"') for name, text in FILES.items()}
    other = pack(signed.with_name("echo-2.0.mar"), newer)
    signing.sign_archive(other, SigningKey.read(keys / "ours"))
    pack(other, {**newer, SIGNATURE: unpacked(signed)[SIGNATURE]})
    with pytest.raises(SignatureError, match=r"other content than was signed: MAR-INF/MANIFEST\.json, metrics\.json"):
        signing.verify_archive(other, trusted)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "metrics.json",
            '{"model_name": "echo", "model_version": "0.9"}',
            r"says echo 1\.0, and its metrics\.json echo 0\.9",
        ),
        ("metrics.json", None, r"it has no metrics\.json, which would say what was proved"),
        (
            "model-config.yaml",
            "useVenv: true\n",
            "asks for useVenv in model-config.yaml, with which its workers would not",
        ),
        ("model-config.yaml", "parallelType: pp\n", "asks for parallelType in model-config.yaml, with which"),
        (
            "MAR-INF/MANIFEST.json",
            FILES["MAR-INF/MANIFEST.json"].replace("python", "python3"),
            "asks for the runtime 'python3'",
        ),
    ],
)
def test_what_must_not_be_signed_is_left_as_it_was(
    name: str, content: str | None, message: str, tmp_path: Path, keys: Path
):
    files = {each: text for each, text in {**FILES, name: content}.items() if text is not None}
    path = pack(tmp_path / "echo-1.0.mar", files)
    before = path.read_bytes()
    with pytest.raises(SignatureError, match=message):
        signing.sign_archive(path, SigningKey.read(keys / "ours"))
    assert [each.read_bytes() for each in tmp_path.iterdir()] == [before]


def hide(path: Path, inside: bool) -> None:
    """Put a file into a zip that is in no list: those who read it from its start find it, those who begin at its end do not."""
    name, content = b"sitecustomize.py", b"evil"
    hidden = (
        struct.pack("<4s5H3L2H", b"PK\3\4", 20, 0, 0, 0, 33, 0, len(content), len(content), len(name), 0)
        + name
        + content
    )
    data = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        at, end = (archive.infolist()[-1].header_offset if inside else archive.start_dir), archive.start_dir
        listed = bytearray(data[end:])
    if inside:
        # The last file moves back, and its entry in the list with it.
        entry = bytes(listed).rindex(b"PK\1\2")
        struct.pack_into("<L", listed, entry + 42, at + len(hidden))
    struct.pack_into("<L", listed, bytes(listed).rindex(b"PK\5\6") + 16, end + len(hidden))
    path.write_bytes(data[:at] + hidden + data[at:end] + bytes(listed))


@pytest.mark.parametrize("inside", [False, True])
def test_a_file_that_only_others_would_find_is_refused(inside: bool, signed: Path, trusted: TrustedKeys):
    """TorchServe reads a zip from its start."""
    hide(signed, inside)
    assert "sitecustomize.py" not in unpacked(signed)
    with pytest.raises(UsageError, match="that its list of files does not have"):
        signing.verify_archive(signed, trusted)


# --- against model-signing --------------------------------------------------------------------------------------------


def model_signing(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "model_signing", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)


def test_model_signing_verifies_what_we_sign(signed: Path, keys: Path, tmp_path: Path):
    folder = tmp_path / "echo-1.0"
    with zipfile.ZipFile(signed) as archive:
        archive.extractall(folder)
    public = keys / "ours.pub"
    verifying.Config().use_elliptic_key_verifier(public_key=public).verify(folder, folder / SIGNATURE)
    verify = ("verify", "key", folder, "--signature", folder / SIGNATURE, "--public_key", public)
    done = model_signing(*verify)
    assert done.returncode == 0, done.stdout + done.stderr
    (folder / "entry.py").write_text("steal()")
    assert model_signing(*verify).returncode != 0


@pytest.mark.parametrize("ignored", [False, True])
def test_we_verify_what_model_signing_signs(ignored: bool, keys: Path, trusted: TrustedKeys, tmp_path: Path):
    """But for what it was told to leave out: nothing lies in an archive that nobody signed."""
    folder = tmp_path / "echo"
    with zipfile.ZipFile(pack(tmp_path / "echo-1.0.mar", FILES)) as archive:
        archive.extractall(folder)
    left_out = ("--ignore-paths", folder / "entry.py") if ignored else ()
    done = model_signing(
        "sign", "key", folder, "--signature", tmp_path / SIGNATURE, "--private_key", keys / "ours", *left_out
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (tmp_path / SIGNATURE).rename(folder / SIGNATURE)
    if ignored:
        with pytest.raises(SignatureError, match=r"files that were not signed: entry\.py"):
            signing.verify_folder(folder, trusted)
    else:
        signing.verify_folder(folder, trusted)


# --- keys -------------------------------------------------------------------------------------------------------------


def written(path: Path, key: object, password: bytes | None = None) -> Path:
    encryption = serialization.BestAvailableEncryption(password) if password else serialization.NoEncryption()
    path.write_bytes(key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, encryption))
    public = key.public_key()
    path.with_name(path.name + ".pub").write_bytes(
        public.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    )
    return path


def test_a_new_key_is_for_its_owner_alone(tmp_path: Path):
    done = call_skewless("sign", "--new-key", tmp_path / "key", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert (tmp_path / "key").stat().st_mode & 0o777 == 0o600
    assert list(TrustedKeys.read(tmp_path / "key.pub").keys) == [found["fingerprint"]]
    before = (tmp_path / "key").read_bytes()
    again = call_skewless("sign", "--new-key", tmp_path / "key")
    assert again.returncode == 2 and "exists; choose another name" in again.stderr
    assert (tmp_path / "key").read_bytes() == before


def test_keys_that_cannot_sign(tmp_path: Path, keys: Path):
    written(tmp_path / "p384", ec.generate_private_key(ec.SECP384R1()))
    written(tmp_path / "rsa", rsa.generate_private_key(65537, 2048))
    (tmp_path / "text").write_text("no key")
    for path, message in {
        tmp_path / "missing": "cannot be read: No such file or directory; make one with `skewless sign --new-key FILE`",
        tmp_path: "cannot be read: Is a directory",
        tmp_path / "text": "no private key in PEM",
        keys / "ours.pub": "no private key in PEM",
        tmp_path / "p384": "is on the curve secp384r1, expected a key on P-256",
        tmp_path / "rsa": "expected a key on P-256; make one with",
    }.items():
        done = call_skewless("sign", pack(tmp_path / "echo-1.0.mar", FILES), "--key", path)
        assert done.returncode == 2, done.stderr
        assert message in done.stderr and str(path) in done.stderr
    assert SIGNATURE not in unpacked(tmp_path / "echo-1.0.mar")


def test_a_password_comes_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    key = written(tmp_path / "key", ec.generate_private_key(ec.SECP256R1()), b"open sesame")
    path = pack(tmp_path / "echo-1.0.mar", FILES)
    for password, message in {
        "": "has a password; put it into the environment variable SKEWLESS_SIGN_PASSWORD",
        "open": "cannot be read: wrong password",
    }.items():
        monkeypatch.setenv(signing.PASSWORD, password)
        done = call_skewless("sign", path, "--key", key)
        assert (done.returncode, message in done.stderr) == (2, True), done.stderr
    monkeypatch.setenv(signing.PASSWORD, "open sesame")
    assert call_skewless("sign", path, "--key", key).returncode == 0
    assert call_skewless("verify", path, "--trusted", tmp_path / "key.pub").returncode == 0
    assert "sesame" not in repr(SigningKey.read(key))
    signing.new_key(tmp_path / "second")
    assert b"ENCRYPTED" in (tmp_path / "second").read_bytes()
    monkeypatch.delenv(signing.PASSWORD)
    signing.new_key(tmp_path / "third")
    monkeypatch.setenv(signing.PASSWORD, "open sesame")
    with pytest.raises(UsageError, match="has no password; unset SKEWLESS_SIGN_PASSWORD"):
        SigningKey.read(tmp_path / "third")


def test_keys_that_cannot_be_trusted(tmp_path: Path, keys: Path, signed: Path):
    written(tmp_path / "p384", ec.generate_private_key(ec.SECP384R1()))
    (tmp_path / "text.pub").write_text("no key")
    (tmp_path / "empty").mkdir()
    for source, message in {
        tmp_path / "missing": "cannot be read: No such file or directory",
        tmp_path / "empty": "has no trusted key; put public keys there, as files that end in .pub or .pem",
        tmp_path / "text.pub": "is no public key in PEM",
        tmp_path / "p384.pub": "is on the curve secp384r1, expected a public key on P-256",
        keys / "ours": "is a private one, which only whoever signs should have",
    }.items():
        for command in (
            ("verify", signed, "--trusted"),
            ("serve", "start", "--state-dir", tmp_path / "s", "--trusted-keys"),
        ):
            store = ("--model-store", tmp_path) if command[0] == "serve" else ()
            done = call_skewless(*command, source, *store)
            assert done.returncode == 2, done.stderr
            assert message in done.stderr and str(source) in done.stderr
    assert not (tmp_path / "s").exists()


def test_several_keys_are_a_folder_or_a_file(tmp_path: Path, keys: Path, signed: Path):
    """What is trusted changes by a file: the next key beside the last one, then without it."""
    folder = tmp_path / "trusted"
    folder.mkdir()
    (folder / "foreign.pem").write_bytes((keys / "foreign.pub").read_bytes())
    (folder / "notes.txt").write_text("no key, and not read")
    with pytest.raises(SignatureError, match="none of those in"):
        signing.verify_archive(signed, TrustedKeys.read(folder))
    (folder / "ours.pub").write_bytes((keys / "ours.pub").read_bytes())
    assert signing.verify_archive(signed, TrustedKeys.read(folder)).name == "echo"
    both = tmp_path / "both.pem"
    both.write_bytes((keys / "foreign.pub").read_bytes() + (keys / "ours.pub").read_bytes())
    assert signing.verify_archive(signed, TrustedKeys.read(both)).name == "echo"
    assert len(TrustedKeys.read(both).keys) == len(TrustedKeys.read(folder).keys) == 2


# --- the command ------------------------------------------------------------------------------------------------------


def test_verify_says_yes_or_why_not(signed: Path, keys: Path, monkeypatch: pytest.MonkeyPatch):
    yes = call_skewless("verify", signed, "--trusted", keys / "ours.pub")
    assert (yes.returncode, f"{signed}: echo 1.0, {len(FILES)} files, as signed" in yes.stdout) == (0, True)
    monkeypatch.setenv(launch.TRUSTED_KEYS, str(keys / "foreign.pub"))
    no = call_skewless("verify", signed, "--json")
    found = json.loads(no.stdout)
    assert (no.returncode, found["verified"]) == (1, False)
    assert "which is none of those in" in found["reason"]
    assert call_skewless("verify", signed.with_name("missing.mar")).returncode == 2
    monkeypatch.delenv(launch.TRUSTED_KEYS)
    assert call_skewless("verify", signed).returncode == 2


def test_sign_takes_an_archive_and_a_key_or_makes_one(signed: Path, keys: Path, tmp_path: Path):
    for arguments in ([], [signed], ["--key", keys / "ours"], [signed, "--new-key", tmp_path / "new"]):
        done = call_skewless("sign", *arguments)
        assert (done.returncode, "give an archive and --key, or --new-key alone" in done.stderr) == (2, True)
    assert not (tmp_path / "new").exists()


def test_an_interrupted_signing_leaves_the_archive(tmp_path: Path, keys: Path, monkeypatch: pytest.MonkeyPatch):
    path = pack(tmp_path / "echo-1.0.mar", FILES)
    before = path.read_bytes()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(signing.shutil, "copyfileobj", full)
    done = call_skewless("sign", path, "--key", keys / "ours")
    assert (done.returncode, "No space left on device" in done.stderr) == (2, True)
    assert [each.read_bytes() for each in tmp_path.iterdir()] == [before]


def test_a_key_is_looked_at_before_the_build(tmp_path: Path):
    """Though nothing else of what is asked for is there."""
    nothing = tmp_path / "nothing"
    where = ("--checkpoint", nothing, "--evaluation", nothing, "--version", "1.0", "--out", tmp_path / "store")
    done = call_skewless("build", nothing, *where, "--sign", tmp_path / "key")
    assert (done.returncode, f"the signing key {tmp_path / 'key'} cannot be read" in done.stderr) == (2, True)
    assert not list(tmp_path.iterdir())


# --- a built archive --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def evaluated(tiny_model: TinyModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("evaluation")
    definition, checkpoint = tiny_model.definition, load_checkpoint(tiny_model.checkpoint)
    rows = read_manifest(tiny_model.manifest, tiny_model.manifest.parent, definition.classes)
    evaluate(definition, checkpoint, tiny_model.checkpoint, rows, "test", out, torch.device("cpu"))
    return out


def build(tiny_model: TinyModel, evaluated: Path, store: Path, key: Path | None = None) -> Path:
    signing_key = key and SigningKey.read(key)
    return build_archive(tiny_model.archive, tiny_model.checkpoint, evaluated, "1.0", store, key=signing_key).path


@pytest.fixture(scope="module")
def store(tiny_model: TinyModel, evaluated: Path, keys: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With tiny-1.0.mar, signed with `ours`."""
    store = tmp_path_factory.mktemp("store")
    build(tiny_model, evaluated, store, keys / "ours")
    return store


def test_a_build_may_sign(store: Path, tiny_model: TinyModel, evaluated: Path, tmp_path: Path, keys: Path):
    """Another build of the same leaves the archive as it is, signed; with a key it is signed anew."""
    archive = tmp_path / "tiny-1.0.mar"
    archive.write_bytes((store / "tiny-1.0.mar").read_bytes())
    found = signing.verify_archive(archive, TrustedKeys.read(keys / "ours.pub"))
    assert (found.name, found.version) == ("tiny", "1.0")
    before = archive.read_bytes()
    assert build(tiny_model, evaluated, tmp_path).read_bytes() == before
    assert build(tiny_model, evaluated, tmp_path, keys / "foreign").read_bytes() != before
    assert signing.verify_archive(archive, TrustedKeys.read(keys / "foreign.pub")).digest == found.digest


def test_the_bill_of_materials_is_valid_and_true(store: Path):
    files = unpacked(store / "tiny-1.0.mar")
    text = files["bom.cdx.json"].decode()
    problem = JsonStrictValidator(SchemaVersion.V1_6).validate_str(text)
    assert problem is None, problem
    document, metrics = json.loads(text), json.loads(files["metrics.json"])
    model = document["metadata"]["component"]
    assert (model["type"], model["name"], model["version"]) == ("machine-learning-model", "tiny", "1.0")
    measured = {
        each["type"]: float(each["value"]) for each in model["modelCard"]["quantitativeAnalysis"]["performanceMetrics"]
    }
    assert measured["roc_auc"] == metrics["evaluation"]["auc"]
    components = {each["bom-ref"]: each for each in document["components"]}
    assert components["dataset"]["hashes"][0]["content"] == metrics["dataset_sha256"]
    (weights,) = components["file:weights.safetensors"]["hashes"]
    assert weights == {"alg": "SHA-256", "content": signing.hashlib.sha256(files["weights.safetensors"]).hexdigest()}
    versions = metrics["library_versions"]
    assert {each["name"]: each["version"] for each in components.values() if "version" in each} == versions
    assert components[f"pkg:pypi/torch@{versions['torch']}"]["type"] == "library"
    assert document["dependencies"] == [{"ref": "model", "dependsOn": list(components)}]


def test_a_bill_of_materials_is_of_its_content(store: Path):
    metrics = json.loads(unpacked(store / "tiny-1.0.mar")["metrics.json"])
    serials = {
        json.loads(bill_of_materials({**metrics, "model_version": version}, "audio"))["serialNumber"]
        for version in ("1.0", "1.1", "1.0")
    }
    assert len(serials) == 2
    versions = {"python": "3.11.7", "torch": "2.11.0+cpu", "Some_Thing": "1!2.0"}
    other = {**metrics, "library_versions": versions, "runtime": {**metrics["runtime"], "library_versions": versions}}
    text = bill_of_materials(other, "image")
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(text) is None
    purls = [each.get("purl") for each in json.loads(text)["components"]]
    assert {"pkg:pypi/torch@2.11.0%2Bcpu", "pkg:pypi/some-thing@1%212.0"} <= set(purls)


def test_the_hub_reads_the_model_card(store: Path):
    files = unpacked(store / "tiny-1.0.mar")
    metrics = json.loads(files["metrics.json"])
    text = files["MODEL_CARD.md"].decode()
    card = ModelCard(text)
    chosen = metrics["evaluation"]["at_best_threshold"]
    results = {each.metric_type: each for each in card.data.eval_results}
    assert {name: each.metric_value for name, each in results.items()} == {
        "roc_auc": metrics["evaluation"]["auc"],
        "average_precision": metrics["evaluation"]["average_precision"],
        "brier_score": metrics["evaluation"]["brier"],
        **{name: chosen[name] for name in ("accuracy", "precision", "recall", "f1")},
    }
    assert {each.dataset_revision for each in results.values()} == {metrics["dataset_sha256"]}
    assert {(each.task_type, each.dataset_split) for each in results.values()} == {("audio-classification", "test")}
    assert card.data.model_name == "tiny 1.0"
    assert f"at a threshold of {metrics['threshold']:g}" in card.text and "*tone* and *noise*" in card.text
    assert "medicine" not in card.text


def test_a_card_of_several_classes(store: Path):
    metrics = json.loads(unpacked(store / "tiny-1.0.mar")["metrics.json"])
    two = metrics["evaluation"]
    several = {key: value for key, value in two.items() if not key.startswith("at_")} | {
        "classes": ["animal", "avatar", "human"],
        "accuracy": 0.75,
        "macro_f1": 0.5,
        "training_reproduced": None,
    }
    card = ModelCard(model_card({**metrics, "evaluation": several}, "image"))
    results = {each.metric_type: each.metric_value for each in card.data.eval_results}
    assert (results["accuracy"], results["f1"]) == (0.75, 0.5)
    assert "*animal*, *avatar* and *human*" in card.text and "in pictures" in card.text
    assert "nothing proves that the evaluation computes" in card.text


# --- a server ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def running(store: Path, keys: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server that trusts `ours`, started as from a shell whose Python writes compiled code down."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("PYTHONDONTWRITEBYTECODE", raising=False)
        started = Server.start(store, tmp_path_factory.mktemp("server"), ports="free", trusted_keys=keys / "ours.pub")
    try:
        yield started
    finally:
        started.stop()


def worker(server: Server, version: str = "1.0") -> psutil.Process | None:
    """The version's one worker, once it is ready."""
    (found,) = server.manage("GET", f"/models/tiny/{version}").json()[0]["workers"]
    return psutil.Process(found["pid"]) if found["status"] == "READY" and psutil.pid_exists(found["pid"]) else None


@pytest.mark.chain
def test_another_shell_refuses_what_the_server_does_not_trust(running: Server, keys: Path, tmp_path: Path):
    """Which knows nothing of the keys but by the server's state directory."""
    archive = running.model_store / "tiny-1.0.mar"
    content = archive.read_bytes()
    renamed = archive.with_name("tiny-1.1.mar")
    files = unpacked(archive)
    altered = {**files, "metrics.json": files["metrics.json"].replace(b'"auc": 1.0', b'"auc": 0.9')}
    assert altered != files
    refusals = {
        "it is not signed": lambda: pack(archive, {k: v for k, v in files.items() if k != SIGNATURE}),
        "other content than was signed: metrics.json": lambda: pack(archive, altered),
        "it is tiny 1.0, and was renamed": lambda: renamed.write_bytes(content),
        "which is none of those in": lambda: signing.sign_archive(archive, SigningKey.read(keys / "foreign")),
    }
    assert launch.TRUSTED_KEYS not in os.environ
    try:
        for message, change in refusals.items():
            change()
            chosen = renamed if renamed.exists() else archive
            done = call_skewless("register", chosen, "--state-dir", running.state_dir)
            assert (done.returncode, message in done.stderr) == (2, True), done.stderr
            assert running.models() == []
            renamed.unlink(missing_ok=True)
            archive.write_bytes(content)
    finally:
        archive.write_bytes(content)


@pytest.fixture
def unregistered(running: Server) -> Iterator[Server]:
    """The server, with nothing registered afterwards."""
    yield running
    for row in running.models():
        running.unregister(row["name"], row["version"])


@pytest.mark.chain
def test_a_worker_loads_what_was_signed_and_nothing_else(unregistered: Server, tmp_path: Path):
    running = unregistered
    running.register(running.model_store / "tiny-1.0.mar")
    first = worker(running)
    folder = Path(first.cwd())
    with Client(running) as client:
        assert client.predict_rest("tiny", recording(1, seed=1)).status == 200
    # A worker that ends is started anew, and finds nothing that it has left behind itself.
    first.kill()
    second = until(lambda: (found := worker(running)) and found.pid != first.pid and found, "the worker starts again")
    # Python imports this before anything else, from wherever its path says.
    touched = tmp_path / "touched"
    (folder / "sitecustomize.py").write_text(f"open({str(touched)!r}, 'w')\n")
    second.kill()
    reason = running.state_dir / LOAD_ERRORS / "tiny-1.0.json"
    until(reason.exists, "the worker says why it does not load")
    assert "SignatureError: " in reason.read_text()
    assert "files that were not signed: sitecustomize.py" in reason.read_text()
    assert not touched.exists() and worker(running) is None
    # As it was, it is loaded again.
    (folder / "sitecustomize.py").unlink()
    until(lambda: worker(running), "the worker starts again")


@pytest.mark.chain
def test_what_was_altered_after_the_check_does_not_load(running: Server, monkeypatch: pytest.MonkeyPatch):
    """As when somebody changes the file between the check and TorchServe's own reading of it."""
    archive = running.model_store / "tiny-1.0.mar"
    content = archive.read_bytes()
    monkeypatch.setattr(signing, "verify_archive", lambda *_: None)
    files = unpacked(archive)
    try:
        pack(archive, {**files, "weights.safetensors": files["weights.safetensors"][:-1] + b"\x7f"})
        with pytest.raises(LoadError, match=r"SignatureError: .* other content than was signed: weights\.safetensors"):
            running.register(archive)
    finally:
        archive.write_bytes(content)
    assert running.models() == []


@pytest.mark.chain
def test_a_server_without_keys_takes_any_archive_unless_the_shell_has_keys(store: Path, keys: Path, tmp_path: Path):
    plain = tmp_path / "store"
    plain.mkdir()
    files = {name: content for name, content in unpacked(store / "tiny-1.0.mar").items() if name != SIGNATURE}
    archive = pack(plain / "tiny-1.0.mar", files)
    server = Server.start(plain, tmp_path / "server", ports="free")
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv(launch.TRUSTED_KEYS, str(keys / "ours.pub"))
            done = call_skewless("register", archive, "--state-dir", server.state_dir)
            assert (done.returncode, "it is not signed" in done.stderr) == (2, True), done.stderr
        server.register(archive)
        assert worker(server).cmdline()[0] == sys.executable
        assert worker(server).cmdline()[1].endswith("model_service_worker.py")
    finally:
        server.stop()


def test_a_retraining_needs_a_key_that_the_server_trusts(keys: Path, tmp_path: Path):
    """Which is known before hours of training."""
    address = dict.fromkeys(("inference_url", "management_url", "metrics_url", "grpc_address"), "")
    trusting = Server(tmp_path, tmp_path, 1, **address, trusted_keys=keys / "ours.pub")
    with pytest.raises(
        UsageError, match=r"the server takes archives only that are signed with a key of .*; give --sign KEY"
    ):
        _key(trusting, None)
    with pytest.raises(UsageError, match="foreign is none of those that the server trusts"):
        _key(trusting, keys / "foreign")
    assert _key(trusting, keys / "ours") == SigningKey.read(keys / "ours")
    assert _key(Server(tmp_path, tmp_path, 1, **address), None) is None


def test_a_state_of_before_the_keys_is_read(tmp_path: Path):
    state = {"model_store": "/store", "pid": 1, "grpc_address": "a"}
    state |= {f"{name}_url": "http://a" for name in ("inference", "management", "metrics")}
    (tmp_path / "state.json").write_text(json.dumps(state))
    assert Server._read(tmp_path).trusted_keys is None


def test_the_keys_are_in_the_environment_of_a_container(keys: Path, tmp_path: Path):
    """`serve run`, which leaves out what it refuses."""
    pack(tmp_path / "echo-1.0.mar", FILES)
    where = ("--model-store", tmp_path, "--state-dir", tmp_path / "state", "--ports", "free")
    done = run_skewless("serve", "run", *where, check=False, environment={launch.TRUSTED_KEYS: str(keys / "ours.pub")})
    assert done.returncode == 1
    assert "echo-1.0.mar is left out: echo-1.0.mar is refused: it is not signed" in done.stderr
