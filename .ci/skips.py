"""Fails when a test was skipped, or expected to fail, for a reason that allowed_skips.txt does not list.

Arguments: JUnit files. A skipped test is a promise that nobody checked; CI has everything but a GPU.
"""

import re
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path


def skips(junit: Path) -> list[str]:
    """'test id: reason' for each skipped test of one JUnit file."""
    found = []
    for case in ElementTree.parse(junit).getroot().iter("testcase"):
        for skip in case.iter("skipped"):
            name = ".".join(filter(None, (case.get("classname"), case.get("name"))))
            found.append(f"{name}: {skip.get('message', '')}")
    return found


def refused(found: list[str], patterns: list[str]) -> list[str]:
    return [skip for skip in found if not any(re.search(pattern, skip) for pattern in patterns)]


def main(files: list[str]) -> int:
    lines = (Path(__file__).parent / "allowed_skips.txt").read_text().splitlines()
    patterns = [line for line in map(str.strip, lines) if line and not line.startswith("#")]
    found = sorted({skip for file in files for skip in skips(Path(file))})
    bad = refused(found, patterns)
    print(f"skipped: {len(found)} tests, of which {len(bad)} for a reason outside .ci/allowed_skips.txt")
    for skip in bad:
        print(f"  {skip}")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
