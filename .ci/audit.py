"""Audits requirements.lock: `make audit`.

What can be said without a network is always checked: every requirement pinned to one version, from an index and not
from an address, named once; and the licences of what a run itself needs.
Known vulnerabilities are pip-audit's to find, in PyPI's advisories or else in those of OSV. It fails on any that is not
in IGNORED. Where neither service answers, that is said in capitals, and is no failure: a build must not depend on them.
"""

import importlib.metadata
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
LOCK = ROOT / "requirements.lock"
SECONDS = 240
# advisory: why it cannot be mended and does not matter here
IGNORED: dict[str, str] = {}
FREE = re.compile(
    r"apache|\bbsd\b|\bmit\b|mozilla|mpl-2|python software foundation|psf|isc\b|matplotlib", re.IGNORECASE
)


def of_the_lock(text: str) -> tuple[dict[str, str], list[str]]:
    """Versions by canonical name, and what is wrong with the lines."""
    pinned: dict[str, str] = {}
    wrong: list[str] = []
    for number, line in enumerate(text.splitlines(), 1):
        line = line.partition("#")[0].strip()
        if not line:
            continue
        where = f"{LOCK.name}:{number}: {line}"
        try:
            requirement = Requirement(line)
        except InvalidRequirement:
            wrong.append(f"{where}: no requirement; write name==version")
            continue
        name, given = canonicalize_name(requirement.name), [*requirement.specifier]
        if requirement.url:
            wrong.append(f"{where}: from an address, which an index does not vouch for")
        elif len(given) != 1 or given[0].operator != "==" or "*" in given[0].version:
            wrong.append(f"{where}: not pinned to one version")
        elif name in pinned:
            wrong.append(f"{where}: named twice")
        else:
            pinned[name] = given[0].version
    return pinned, wrong


def of_licences() -> list[str]:
    """Core dependencies under a licence that is not among the free ones known here, or that say none."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wrong = []
    for text in [*project["dependencies"], *project["optional-dependencies"]["train"]]:
        name = Requirement(text).name
        about = importlib.metadata.metadata(name)
        said = [about.get("License-Expression") or "", *(about.get_all("Classifier") or []), about.get("License") or ""]
        said = [line for line in said if line and (not line.startswith("License") or "License ::" in line)]
        said = [line for line in said if "::" not in line or line.startswith("License ::")]
        if not any(FREE.search(line[:200]) for line in said):
            wrong.append(f"{name}: licence {said[:3] or 'not said'}; read it, and name it in FREE if it is a free one")
    return wrong


def advisories(service: str) -> tuple[list[str], list[str]] | None:
    """Known vulnerabilities, and the packages that the service said nothing of; None where it does not answer."""
    command = [
        sys.executable, "-m", "pip_audit", "--requirement", str(LOCK), "--no-deps", "--disable-pip", "--format", "json",
        "--progress-spinner", "off", "--vulnerability-service", service, "--timeout", "5",
    ]  # fmt: skip
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)
        packages = json.loads(done.stdout)["dependencies"]
    except (subprocess.TimeoutExpired, ValueError, KeyError, TypeError):
        return None
    return sift(packages)


def sift(packages: list[dict]) -> tuple[list[str], list[str]] | None:
    """What pip-audit's report says; None where it skipped every package, which it calls a success."""
    skipped = [p["name"] for p in packages if "skip_reason" in p]
    if len(skipped) == len(packages):
        return None
    found = []
    for package in packages:
        for one in package.get("vulns", []):
            if not {one["id"], *one.get("aliases", [])} & set(IGNORED):
                mended = ", ".join(one.get("fix_versions") or []) or "no version yet"
                found.append(f"{package['name']} {package['version']}: {one['id']}, mended in {mended}")
    return found, skipped


def main() -> int:
    pinned, wrong = of_the_lock(LOCK.read_text(encoding="utf-8"))
    wrong += of_licences()
    print(f"audit: {len(pinned)} pinned requirements")
    for service in ("pypi", "osv"):
        answer = advisories(service)
        if answer is not None:
            found, skipped = answer
            wrong += found
            print(f"audit: {len(pinned) - len(skipped)} packages looked up at {service}")
            if skipped:
                print(f"audit: NOT AUDITED, {service} does not know them: {', '.join(skipped)}")
            break
    else:
        print(
            "audit: KNOWN VULNERABILITIES WERE NOT LOOKED UP: neither PyPI's advisories nor OSV's could be reached, or "
            "pip-audit is not installed. Run `make audit` where they can be"
        )
    for line in wrong:
        print(f"audit: {line}", file=sys.stderr)
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
