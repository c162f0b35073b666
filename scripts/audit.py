"""Known vulnerabilities of the packages that are installed beside this Python, by pip-audit and PyPI's advisories.

`python scripts/audit.py` prints a table. What could not be looked up is listed too: nothing counts as safe because nobody
was asked. Exit codes: 0 when nothing is known but what ACCEPTED explains, 1 when something is, 2 when nobody could be asked.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

# Advisories that do not matter here, each with the reason; docs/security.md says more.
ACCEPTED: dict[str, str] = {}


def main() -> int:
    command = [sys.executable, "-m", "pip_audit", "--format", "json", "--local", "--skip-editable"]
    done = subprocess.run([*command, "--progress-spinner", "off", "--timeout", "30"], capture_output=True, text=True)
    try:
        packages = json.loads(done.stdout)["dependencies"]
    except (ValueError, LookupError):
        print(f"nothing was checked: pip-audit got no answer.\n{_last_line(done.stderr)}", file=sys.stderr)
        return 2
    known = [(package, each) for package in packages for each in package.get("vulns", [])]
    new = [(package, each) for package, each in known if not accepted(each)]
    for package, each in known:
        why = accepted(each) or "NEW"
        print(f"{package['name']} {package['version']}: {each['id']}, fixed in {fixed(each)}: {why}")
    unchecked = [f"{package['name']} ({package['skip_reason']})" for package in packages if "skip_reason" in package]
    if unchecked:
        print(f"not checked, {len(unchecked)} packages: {'; '.join(unchecked)}")
    if java := java_libraries():
        print(f"not checked, TorchServe's {len(java)} Java libraries: {', '.join(java)}")
    checked = len(packages) - len(unchecked)
    print(f"{checked} packages checked, {len(known)} advisories, {len(new)} of them without an explanation")
    return 1 if new else 0


def accepted(advisory: dict[str, Any]) -> str:
    """Why an advisory does not matter here; empty where nobody has said so."""
    names = [advisory["id"], *advisory.get("aliases", [])]
    return next((ACCEPTED[name] for name in names if name in ACCEPTED), "")


def fixed(advisory: dict[str, Any]) -> str:
    return ", ".join(advisory.get("fix_versions", [])) or "no version"


def java_libraries() -> list[str]:
    """Names and versions of the libraries inside TorchServe's jar, which no list of Python packages has."""
    package = importlib.util.find_spec("ts")
    if package is None or not package.submodule_search_locations:
        return []
    found = set()
    with zipfile.ZipFile(Path(package.submodule_search_locations[0], "frontend", "model-server.jar")) as jar:
        for name in jar.namelist():
            if name.endswith("/pom.properties"):
                lines = jar.read(name).decode("utf-8").splitlines()
                pairs = dict(line.split("=", 1) for line in lines if "=" in line and line[0] != "#")
                found.add(f"{pairs['artifactId']} {pairs['version']}")
    return sorted(found)


def _last_line(text: str) -> str:
    lines = [line for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "it printed nothing"


if __name__ == "__main__":
    sys.exit(main())
