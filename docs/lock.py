"""Write requirements.lock: the pins of constraints.txt and the build tools, each with the SHA-256 of its file.

    python docs/lock.py        write it anew, after constraints.txt has changed
    python docs/lock.py --check   say what is not in it, or has another version; no network

pip itself finds the files, so this is run on the platform that the lock is for. `nox -s tests` installs it there.
"""

from __future__ import annotations

import json
import platform
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PINS, LOCK = ROOT / "constraints.txt", ROOT / "requirements.lock"
BUILD = ("pip==26.3", "setuptools==81.0.0", "wheel==0.48.0")
"""What installs the others and builds hnkit itself."""
HEAD = """\
# Every package of the test run and the build tools, with the SHA-256 of its file: {where}.
# torch's is that of its build for CPUs ({torch}). Written by docs/lock.py from constraints.txt, installed by
# `nox -s tests` with --require-hashes where it fits; elsewhere the tests run on the versions of constraints.txt.
"""


def wanted() -> list[str]:
    """The pins, one a line."""
    lines = [line.strip() for line in PINS.read_text(encoding="utf-8").splitlines()]
    return [*(line for line in lines if line and not line.startswith("#")), *BUILD]


def found() -> list[tuple[str, str, str]]:
    """Name, version and SHA-256 of the file that pip would install for each pin."""
    with tempfile.TemporaryDirectory() as folder:
        pins, report = Path(folder) / "pins.txt", Path(folder) / "report.json"
        pins.write_text("\n".join(wanted()) + "\n")
        command = [sys.executable, "-m", "pip", "install", "-q", "--dry-run", "--ignore-installed", "--no-deps"]
        subprocess.run([*command, "--report", str(report), "-r", str(pins)], check=True)
        entries = json.loads(report.read_text())["install"]
    return [(entry["metadata"]["name"], entry["metadata"]["version"], _hash_of(entry)) for entry in entries]


def _hash_of(entry: dict[str, Any]) -> str:
    """The SHA-256 of a file in pip's report, which an index may leave out; nothing is written then."""
    digest = entry["download_info"].get("archive_info", {}).get("hashes", {}).get("sha256")
    if digest is None:
        raise SystemExit(
            f"{entry['metadata']['name']}: {entry['download_info'].get('url')} has no SHA-256: "
            "use an index that gives one"
        )
    return str(digest)


def locked() -> dict[str, str]:
    """Canonical name -> pin, of the lock as it is."""
    pins = re.findall(r"^(\S+)==(\S+) ", LOCK.read_text(encoding="utf-8"), re.MULTILINE)
    return {canonical(name): version for name, version in pins}


def canonical(name: str) -> str:
    """A distribution's name as indexes compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def differences() -> list[str]:
    """In what the lock is not that of constraints.txt."""
    have = locked()
    want = {canonical(name): version for name, _, version in (line.partition("==") for line in wanted())}
    wrong = [f"{name}=={want[name]} is {have.get(name, 'missing')}" for name in want if have.get(name) != want[name]]
    return wrong + [f"{name} is not in constraints.txt" for name in have if name not in want]


def main() -> None:
    if "--check" in sys.argv:
        wrong = differences()
        print("\n".join(wrong) or f"{LOCK.name} has all {len(locked())} pins")
        raise SystemExit(bool(wrong))
    python = f"{platform.python_implementation()} {'.'.join(platform.python_version_tuple()[:2])}"
    where = f"{platform.system()} ({platform.libc_ver()[0] or 'no glibc'}), {python}, {platform.machine()}"
    entries = sorted(found(), key=lambda entry: canonical(entry[0]))
    torch = next(version for name, version, _ in entries if name == "torch")
    lines = [
        # a local version (torch's +cpu) is that of the file; the pin is the public one, which accepts it
        f"{name}=={version.partition('+')[0]} --hash=sha256:{digest}\n"
        for name, version, digest in entries
    ]
    LOCK.write_text(HEAD.format(where=where, torch=torch) + "".join(lines))
    print(f"{len(lines)} packages in {LOCK.name}")


if __name__ == "__main__":
    main()
