"""`hnkit push`: an adapter with its card, as a folder and on the Hugging Face Hub."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from hnkit.cli.folders import refuse_existing
from hnkit.cli.options import Common
from hnkit.errors import InputError
from hnkit.internal.values import printable, setting

EXAMPLE = "hnkit push runs/red --to me/red --license apache-2.0"


@dataclass(frozen=True, kw_only=True)
class Options(Common):
    """Share an adapter: a folder with its card, samples and citation, uploaded where --to names a repository.

    Attributes:
        run: run, exported adapter, or folder of an adapter.
        to: repository on the Hugging Face Hub, NAME or USER/NAME; default: none, only the folder is written.
        license_name: license of the adapter, as the Hub names it; default: none is stated.
        private: make the repository private.
    """

    run: Path | None = setting(None, argument=True, metavar="RUN")
    to: str | None = setting(None, metavar="NAME")
    license_name: str | None = setting(None, flags=("--license",), metavar="NAME")
    private: bool = setting(False)


def run(options: Options) -> int:
    """Write and upload; see `hnkit.training.publish`."""
    from hnkit.output import terminal
    from hnkit.training.publish import publish

    if options.run is None:
        raise InputError("nothing to push: name a run or an adapter, hnkit push RUN --to NAME")
    if not options.run.is_dir():
        raise InputError(f"{options.run} is not a folder: name a run or the folder of an adapter")
    refuse_existing(options.out)
    document = publish(
        options.run, to=options.to, out=options.out, license_name=options.license_name, private=options.private
    )
    if options.as_json:
        terminal.print_json(document)
    else:
        print(printable(f"folder: {document['folder']} ({', '.join(document['files'])})"))
        print(printable(f"uploaded: {document['url']}") if document["url"] else "not uploaded: --to NAME uploads it")
    return 0
