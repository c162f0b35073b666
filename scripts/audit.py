"""Known vulnerabilities of the packages that are installed beside this Python, by pip-audit and PyPI's advisories.

`python scripts/audit.py`. pip-audit is looked for on PATH, so that it can be installed apart from what it looks at:
`pipx install pip-audit==2.10.1`. What could not be looked up is listed: nothing counts as safe because nobody could be asked.
Exit codes: 0 when nothing is known but what ACCEPTED explains, 1 when something is, 2 when nothing could be looked up.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path
from typing import Any

# Advisories that do not matter here, by id or alias, each with the reason.
ACCEPTED: dict[str, str] = {}


def main() -> int:
    beside = os.pathsep.join([os.environ.get("PATH", os.defpath), str(Path(sys.executable).parent)])
    program = shutil.which("pip-audit", path=beside)
    if program is None:
        print("nothing was checked: there is no pip-audit; `pipx install pip-audit==2.10.1`", file=sys.stderr)
        return 2
    command = [program, "--path", sysconfig.get_path("purelib"), "--skip-editable", "--format", "json"]
    done = subprocess.run([*command, "--progress-spinner", "off"], capture_output=True, text=True, check=False)
    try:
        packages = json.loads(done.stdout)["dependencies"]
    except (ValueError, LookupError):
        words = [line for line in done.stderr.splitlines() if line.strip()]
        print(f"nothing was checked: {words[-1] if words else 'pip-audit gave no answer'}", file=sys.stderr)
        return 2
    known = [(package, advisory) for package in packages for advisory in package.get("vulns", [])]
    for package, advisory in known:
        print(
            f"{package['name']} {package['version']}: {advisory['id']}, {_fixed(advisory)}: {_why(advisory) or 'NEW'}"
        )
    skipped = [package["name"] for package in packages if "skip_reason" in package]
    if skipped:
        print(f"not checked, {len(skipped)} packages that nobody could be asked about: {', '.join(skipped)}")
    if java := _java():
        print(f"not checked, TorchServe's Java libraries, such as {java}")
    checked, new = len(packages) - len(skipped), [each for _, each in known if not _why(each)]
    print(f"{checked} packages checked, {len(known)} advisories, {len(new)} of them without an explanation")
    if not checked:
        print("nothing was checked: run this where PyPI's advisories can be reached", file=sys.stderr)
        return 2
    return 1 if new else 0


def _why(advisory: dict[str, Any]) -> str:
    """Why an advisory does not matter here; empty where nobody has said so."""
    names = [advisory["id"], *advisory.get("aliases", [])]
    return next((ACCEPTED[name] for name in names if name in ACCEPTED), "")


def _fixed(advisory: dict[str, Any]) -> str:
    return f"fixed in {', '.join(advisory.get('fix_versions', [])) or 'no version'}"


def _java() -> str:
    """What answers TorchServe's HTTP, inside its jar, which no list of Python packages has; empty without TorchServe."""
    package = importlib.util.find_spec("ts")
    if package is None or not package.submodule_search_locations:
        return ""
    with zipfile.ZipFile(Path(package.submodule_search_locations[0], "frontend", "model-server.jar")) as jar:
        stated = jar.read("META-INF/io.netty.versions.properties").decode("utf-8")
    versions = sorted(set(re.findall(r"^netty-codec-http\.version=(.+?)\s*$", stated, re.MULTILINE)))
    return f"netty {', '.join(versions) or 'of an unknown version'}"


if __name__ == "__main__":
    sys.exit(main())
