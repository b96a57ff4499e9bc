"""What a report of pip-audit comes to: python .ci/audited.py report.json; exit status as in .ci/audit.

pip-audit itself ends with 0 and "No known vulnerabilities found" where its service knows none of the packages: a mirror
of the package index that has no advisories.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path


def main(path: str) -> int:
    found = json.loads(Path(path).read_text(encoding="utf-8"))["dependencies"]
    skipped = [package["name"] for package in found if "skip_reason" in package]
    affected = [package for package in found if package.get("vulns")]
    for package in affected:
        for advisory in package["vulns"]:
            fixed = ", ".join(advisory["fix_versions"]) or "no version yet"
            print(f"{package['name']} {package['version']}: {advisory['id']}, fixed in {fixed}")
    print(f"{len(found) - len(skipped)} of {len(found)} packages looked up, {len(affected)} with advisories")
    if skipped or not found:
        names = ", ".join(skipped[:5]) + (f" and {len(skipped) - 5} more" if len(skipped) > 5 else "")
        print(
            f".ci/audit: the advisory service does not know {names or 'anything'}; they were not audited",
            file=sys.stderr,
        )
    return 1 if affected else 2 if skipped or not found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
