"""Versions and digests of what figures were computed with."""

from __future__ import annotations

import functools
import hashlib
import platform
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path


def versions() -> dict[str, str]:
    """Versions of what the figures were computed with."""
    return {"python": platform.python_version(), **_of("hnkit", "torch", "numpy", "scipy")}


def installation() -> dict[str, str]:
    """All that has to be alike where processes work together: versions, and the code of hnkit, whatever they say."""
    models = _of("accelerate", "diffusers", "peft", "transformers")
    return {**versions(), **models, "the code of hnkit": code_digest()[:12]}


def _of(*packages: str) -> dict[str, str]:
    found = {}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed as a distribution"
    return found


@functools.cache
def code_digest() -> str:
    """SHA-256 of the sources of hnkit as they are installed, toys and pipelines included, whatever the version says."""
    digest = hashlib.sha256()
    for package in ("hnkit", "hnkit.toy", "hnkit.scaled"):
        spec = find_spec(package)
        for place in sorted(spec.submodule_search_locations or ()) if spec is not None else ():
            root = Path(place)
            for path in sorted(root.rglob("*.py")):
                content = hashlib.sha256(path.read_bytes()).hexdigest()
                digest.update(f"{package}/{path.relative_to(root).as_posix()} {content}\n".encode())
    return digest.hexdigest()
