"""Prints the requirements of undertow, with the extras named as arguments, that this environment does not satisfy.

Used where torch is reused and pip may have no network: what is there already must not be asked for again.
"""

import sys
from importlib import metadata

from packaging.requirements import Requirement


def satisfied(requirement: Requirement) -> bool:
    try:
        return requirement.specifier.contains(metadata.version(requirement.name), prereleases=True)
    except metadata.PackageNotFoundError:
        return False


def main(extras: list[str]) -> None:
    for line in metadata.requires("undertow") or []:
        requirement = Requirement(line)
        wanted = requirement.marker is None or any(requirement.marker.evaluate({"extra": e}) for e in ["", *extras])
        if wanted and not satisfied(requirement):
            extras_of_it = f"[{','.join(sorted(requirement.extras))}]" if requirement.extras else ""
            print(f"{requirement.name}{extras_of_it}{requirement.specifier}")


if __name__ == "__main__":
    main(sys.argv[1:])
