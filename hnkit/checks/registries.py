"""Every statement that can be checked, and the proof it rests on."""

from __future__ import annotations

from hnkit.checks.injected import INJECTED_CHECKS
from hnkit.checks.maps import MAP_CHECKS
from hnkit.checks.matrices import CERTIFIED_CHECKS
from hnkit.checks.problems import TOY_CHECKS

REGISTRIES = (MAP_CHECKS, INJECTED_CHECKS, TOY_CHECKS, CERTIFIED_CHECKS)
"""Of maps, of maps with injected noise, of closed-form problems, and of matrices in ball arithmetic."""


def checks_by_proof() -> dict[str, list[str]]:
    """Folder in `proofs/` and the checks of `verify-bound` whose statements are derived there."""
    found: dict[str, list[str]] = {}
    for registry in REGISTRIES:
        for name, statement in registry.statements.items():
            found.setdefault(statement.proof, []).append(name)
    return found
