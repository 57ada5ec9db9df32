"""What hnkit pulls in: version, pin and licence of every package, from the metadata of what is installed. No network.

    python docs/audit.py              the table, then what deserves a look
    python docs/audit.py --json       the same as one JSON document

Exit code 1: a version differs from its pin in constraints.txt, or a licence is strong copyleft (GPL, AGPL). Other
licences that are not permissive are reported, and packages without a pin or a stated licence too.
"""

from __future__ import annotations

import json
import re
import sys
from dataclasses import asdict, dataclass
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement

PINS = Path(__file__).resolve().parents[1] / "constraints.txt"
EXTRAS = ("scaled", "testing", "certify", "docs")
PERMISSIVE = re.compile(
    r"MIT|BSD|Apache|ISC|PSF|Python Software Foundation|HPND|Historical Permission|CNRI|Unlicense|CC0|Zlib|BSL-1.0"
    r"|Public Domain",
    re.IGNORECASE,
)
ALLOWED = {"docutils": "its library is in the public domain; the GPL is that of an editor mode beside it"}
"""Packages among whose licences a strong one is, and why they are taken all the same."""
STRONG = re.compile(r"(?<![A-Za-z])A?GPL|GNU (Affero )?General Public", re.IGNORECASE)
WEAK = re.compile(r"LGPL|Lesser General Public|MPL|Mozilla", re.IGNORECASE)


@dataclass(frozen=True)
class Package:
    """An installed distribution that hnkit needs, directly or through others."""

    name: str
    version: str
    pin: str | None
    licence: str

    @property
    def kind(self) -> str:
        """`permissive`, `weak copyleft`, `strong copyleft`, `other` or `not stated`."""
        if not self.licence:
            return "not stated"
        if WEAK.search(self.licence):
            return "weak copyleft"
        if STRONG.search(self.licence) and self.name not in ALLOWED:
            return "strong copyleft"
        return "permissive" if PERMISSIVE.search(self.licence) else "other"


def canonical(name: str) -> str:
    """A distribution's name as indexes compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def read_pins(path: Path = PINS) -> dict[str, str]:
    """`name -> version` of a constraints file."""
    pins = (line.split("#")[0].split(";")[0].strip() for line in path.read_text(encoding="utf-8").splitlines())
    return {canonical(name): version for name, _, version in (pin.partition("==") for pin in pins if pin)}


def licence_of(found: Distribution) -> str:
    """The licence that a distribution states: an expression, else classifiers, else the first line of free text."""
    metadata = found.metadata
    if metadata["License-Expression"]:
        return str(metadata["License-Expression"])
    classifiers = [entry.split(" :: ")[-1] for entry in metadata.get_all("Classifier", []) if entry[:7] == "License"]
    named = [entry for entry in classifiers if entry != "OSI Approved"]
    text = str(metadata["License"] or "").strip()
    return " / ".join(named) or (text.splitlines()[0][:60] if text else "")


def needed(root: str = "hnkit", extras: tuple[str, ...] = EXTRAS) -> list[Package]:
    """Every installed distribution that `root` with these extras requires, by name."""
    pins, found, queue, seen = read_pins(), {}, [(root, extras)], set()
    while queue:
        name, wanted = queue.pop()
        if (name, wanted) in seen:
            continue
        seen.add((name, wanted))
        try:
            installed = distribution(name)
        except PackageNotFoundError:  # an extra that is not installed here
            continue
        if name != root:
            found[name] = Package(name, installed.version, pins.get(name), licence_of(installed))
        for line in installed.requires or ():
            requirement = Requirement(line)
            environments = [{"extra": extra} for extra in ("", *wanted)]
            if requirement.marker is None or any(map(requirement.marker.evaluate, environments)):
                queue.append((canonical(requirement.name), tuple(sorted(requirement.extras))))
    return [found[name] for name in sorted(found)]


def problems(packages: list[Package]) -> tuple[list[str], list[str]]:
    """`(what fails the audit, what deserves a look)`, a line each."""
    wrong = [
        f"{p.name} {p.version} is installed, {p.pin} is pinned"
        for p in packages
        if p.pin not in (None, p.version, p.version.partition("+")[0])  # a build for the CPU has a local version
    ]
    wrong += [f"{p.name}: {p.licence} is strong copyleft" for p in packages if p.kind == "strong copyleft"]
    look = [f"{p.name}: licence {p.licence or 'not stated'} ({p.kind})" for p in packages
            if p.kind not in ("permissive", "strong copyleft")]  # fmt: skip
    return wrong, look + [f"{p.name} {p.version}: no pin" for p in packages if p.pin is None]


def main() -> None:
    """Print the audit of this environment."""
    packages = needed()
    wrong, look = problems(packages)
    if "--json" in sys.argv[1:]:
        print(json.dumps({"packages": [asdict(p) | {"kind": p.kind} for p in packages], "wrong": wrong, "look": look}))
    else:
        width = max(len(p.name) for p in packages)
        for p in packages:
            print(f"{p.name:<{width}}  {p.version:<14} {p.kind:<15} {p.licence}")
        print(f"\n{len(packages)} packages, {sum(p.kind == 'permissive' for p in packages)} under permissive licences")
        print("\n".join([*(f"WRONG  {line}" for line in wrong), *(f"look   {line}" for line in look)]))
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
