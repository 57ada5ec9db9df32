"""Train the linear-Gaussian toy with every loss and gather the reports in docs/results/item-e.json.

python docs/item_e.py
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from hnkit.config import resolve_config
from hnkit.internal.files import write_json
from hnkit.training.run import train

RESULTS = Path(__file__).resolve().parent / "results"
LOSSES = ("l2", "second-order", "arnoldi", "exact")


def main() -> None:
    """Run and write."""
    runs = []
    with tempfile.TemporaryDirectory() as folder:
        for kl in LOSSES:
            out = Path(folder) / kl
            config = resolve_config(backend="toy", preset="item-e", overrides=[f"train.kl={kl}"])
            train(config, out=out)
            report = json.loads((out / "report.json").read_text())
            runs.append({key: report[key] for key in ("step", "measurement", "closed_form", "config")})
    RESULTS.mkdir(exist_ok=True)
    write_json(RESULTS / "item-e.json", {"command": "python docs/item_e.py", "runs": runs})


if __name__ == "__main__":
    main()
