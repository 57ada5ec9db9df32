"""`hnkit backends`: what is installed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from hnkit.errors import InputError
from hnkit.internal.values import reason_of, setting

EXAMPLE = "hnkit backends --json"


@dataclass(frozen=True, kw_only=True)
class Options:
    """What is installed, what it needs, and whether its weights are present.

    Attributes:
        as_json: print one JSON document on stdout and nothing else there.
    """

    as_json: bool = setting(False, flags=("--json",))


def run(options: Options) -> int:
    """Print every backend with its state, and the names of the rewards."""
    from rich.console import Group
    from rich.padding import Padding
    from rich.text import Text

    from hnkit.backend import installed_names
    from hnkit.output import terminal

    found = [described_backend(name) for name in installed_names("hnkit.backends")]
    rewards = installed_names("hnkit.rewards")
    if options.as_json:
        terminal.print_json({"backends": found, "rewards": rewards})
        return 0
    screen = terminal.console()
    for entry in found:
        screen.print(Text(str(entry["name"]), "bold"))
        lines = [Text(str(line)) for line in (entry["summary"], entry["status"]) if line]
        if entry["presets"]:
            lines.append(Text(f"presets: {', '.join(entry['presets'])}", style="dim"))
        screen.print(Padding(Group(*lines), (0, 0, 0, 4)))
    screen.print("", terminal.Words(f"rewards: {', '.join(rewards) or 'none'}"), sep="\n")
    screen.print(terminal.Words(_NEXT))
    return 0


_NEXT = (
    "A model that is not here is also fetched by a run with --set backend.local_files_only=false, or named as a folder "
    "by --model-id FOLDER. Options of a backend: the configuration reference of the documentation (built in a clone by "
    "nox -s docs), or the config.toml of a run. The miniature is ready: "
    "hnkit train --backend digits"
)


def described_backend(name: str) -> dict[str, Any]:
    """Name, summary, state and presets of a backend; one that is broken says why, and hides no other."""
    from hnkit.backend import backend_factory

    try:
        factory = backend_factory(name)
        return {"name": name, "summary": str(factory.summary), "status": str(factory.status()),
                "presets": sorted(factory.presets)}  # fmt: skip
    except InputError as reason:
        status = str(reason)
    except (Exception, SystemExit) as error:  # noqa: BLE001 - another distribution's code may raise anything
        status = f"broken ({type(error).__name__}: {reason_of(error)}): mend or uninstall it"
    return {"name": name, "summary": "", "status": status, "presets": []}
