"""Write `hnkit/__init__.pyi`, which tells type checkers and editors the names that `hnkit` imports on first use.

Run it after a change of the table in `hnkit/__init__.py`: `python docs/stub.py`. A test compares the two.
"""

from __future__ import annotations

from pathlib import Path

import hnkit

STUB = Path(hnkit.__file__).with_name("__init__.pyi")


def stub() -> str:
    """The text of the stub: every name of the table, imported from its module under the same name."""
    lines = ["# Written by docs/stub.py from the table in __init__.py.", ""]
    for module, names in sorted(hnkit._API.items()):
        lines += [f"from hnkit.{module} import {name} as {name}" for name in sorted(names)]
    return "\n".join([*lines, "", "__version__: str", ""])


if __name__ == "__main__":
    STUB.write_text(stub(), encoding="utf-8")
