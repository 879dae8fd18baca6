"""Prints the failed tests of one JUnit file, one a line; exit code 0 when there are some, but few enough to run again.

Arguments: the file, and how many are few. More than that is no accident of a busy machine.
"""

import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path


def failures(junit: Path) -> list[str]:
    """'classname.name' of each test that failed or broke in its set-up."""
    cases = ElementTree.parse(junit).getroot().iter("testcase")
    failed = [case for case in cases if case.find("failure") is not None or case.find("error") is not None]
    return [".".join(filter(None, (case.get("classname"), case.get("name")))) for case in failed]


def main(junit: str, few: str) -> int:
    found = failures(Path(junit)) if Path(junit).is_file() else []
    print("\n".join(found))
    return 0 if 0 < len(found) <= int(few) else 1


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
