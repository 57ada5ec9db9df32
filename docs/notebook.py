"""The notebook of the documentation: run it and store what it shows, and write it as a page.

python docs/notebook.py          run docs/three-minutes.ipynb and store its outputs
"""

from __future__ import annotations

import base64
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import nbformat

NOTEBOOK = Path(__file__).resolve().parent / "three-minutes.ipynb"


def executed(path: Path = NOTEBOOK) -> Any:
    """The notebook with the outputs of a run by this interpreter; an error in a cell is raised."""
    from jupyter_client.manager import AsyncKernelManager
    from nbclient import NotebookClient

    notebook = nbformat.read(path, as_version=4)
    manager = AsyncKernelManager()
    manager.kernel_spec.argv[0] = sys.executable  # whatever kernels are installed
    NotebookClient(notebook, km=manager, timeout=280, resources={"metadata": {"path": str(path.parent)}}).execute()
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)  # times of day
        if cell.cell_type == "code":  # warnings name files of the machine that ran it
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
    return notebook


def texts(notebook: Any) -> list[str]:
    """What each cell of code prints."""
    return ["".join(_printed(cell.outputs)) for cell in notebook.cells if cell.cell_type == "code"]


def _printed(outputs: Iterable[Any]) -> list[str]:
    return [output.text for output in outputs if output.output_type == "stream" and output.name == "stdout"]


def to_markdown(notebook: Any) -> tuple[str, dict[str, bytes]]:
    """The notebook as a page, and its pictures by file name."""
    parts: list[str] = []
    pictures: dict[str, bytes] = {}
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            parts.append(cell.source)
            continue
        parts.append(f"```python\n{cell.source}\n```")
        if printed := "".join(_printed(cell.outputs)):
            parts.append(f"```text\n{printed}```")
        for output in cell.outputs:
            if png := output.get("data", {}).get("image/png"):
                name = f"three-minutes-{len(pictures)}.png"
                pictures[name] = base64.b64decode(png)
                parts.append(f"![What the cell above shows]({name})")
    return "\n\n".join([*parts, ""]), pictures


def main() -> int:
    """Run the notebook and store its outputs."""
    notebook = executed()
    nbformat.write(notebook, NOTEBOOK)
    print(f"{len(notebook.cells)} cells in {NOTEBOOK.name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
