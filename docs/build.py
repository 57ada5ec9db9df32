"""Build the documentation site from README.md, docs/, proofs/ and the code: guides, reference, evidence.

    python docs/build.py site        write the site to site/; a built site there is replaced, nothing else is

The pages are laid out in a temporary folder, the reference pages are written from the code, and Sphinx (with MyST and
furo) builds them. A link that leads nowhere, a docstring that cannot be read, a page in no section: each is an error.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
import tempfile
from collections.abc import Collection, Iterable
from pathlib import Path

import notebook
import reference

ROOT = Path(__file__).resolve().parents[1]
SECTIONS = {
    "Guides": (
        ("docs/three-minutes.ipynb", "Three minutes"),
        ("docs/gallery.md", "What the reports look like"),
        ("docs/verify-bound.md", "Check a map of your own"),
        ("docs/training.md", "Train"),
        ("docs/frontier.md", "Reward per nat"),
        ("docs/digits.md", "The miniature"),
        ("docs/real-models.md", "Real models"),
        ("docs/families.md", "Any distilled pipeline"),
        ("docs/prompts-and-scorers.md", "Prompts and scorers"),
        ("docs/testing.md", "hnkit.testing"),
        ("docs/faq.md", "Questions"),
        ("docs/glossary.md", "Glossary"),
    ),
    "Reference": (
        ("reference/commands.md", "Commands"),
        ("reference/configuration.md", "Configuration"),
        ("reference/api.md", "Python API"),
        ("docs/estimators.md", "Estimators"),
        ("proofs/README.md", "Proofs"),
    ),
    "Evidence": (
        ("docs/benchmarks-logdet.md", "Benchmarks"),
        ("docs/earning.md", "What a hypernetwork earns"),
        ("docs/numerics.md", "Numerics"),
        ("docs/robustness.md", "Robustness"),
        ("docs/mutation.md", "Mutation testing"),
        ("CHANGELOG.md", "Changelog"),
        ("CONTRIBUTING.md", "Contributing"),
    ),
}
"""What the sidebar shows, in its order."""

WIDE = re.compile(r"!\[([^\]]*)\]\((\S+)-wide\.png\)")
LINK = re.compile(r"\[([^\]]*)\]\((?![a-z]+:|#)([^)#\s]+)(#[^)\s]*)?\)")
FIGURE = re.compile(r"(?<=\d) (?:± (?=\d)|%)")
"""What a line of a page is not broken at: `0.67 ± 0.46`, `12 %`."""
CODE = re.compile(r"(^```.*?^```)", re.DOTALL | re.MULTILINE)


def lay_out(source: Path) -> None:
    """Copy the pages and what they link to into `source` as they lie in the repository, and write the others."""
    listed = [page for section in SECTIONS.values() for page, _ in section]
    proofs = sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob("proofs/*/README.md"))
    unlisted = {path.relative_to(ROOT).as_posix() for kind in ("md", "ipynb") for path in ROOT.glob(f"docs/*.{kind}")}
    unlisted -= set(listed)
    if unlisted:
        raise SystemExit(f"in no section of docs/build.py: {', '.join(sorted(unlisted))}")
    staged = ["README.md", *(page for page in listed if not page.startswith("reference/")), *proofs]
    for page in staged:
        text, pictures = _text(page)
        for name, png in pictures.items():
            place = source / Path(page).parent / name
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(png)
        _write(source / _place(page), _with_links(text, page, source, staged))
    for name, text in (pages := reference.pages()).items():
        _write(source / "reference" / name, text)
    modules = [name for name in pages if name.startswith("hnkit.")]
    _append(source / "index.md", "".join(_tree(title, pages) for title, pages in SECTIONS.items()))
    rooms = _tree("", [(name, "") for name in modules], hidden=False)
    _append(source / "reference" / "api.md", f"## Modules\n\n{rooms}")
    _append(source / "proofs/README.md", _tree("", [(f"{Path(page).parent.name}/README.md", "") for page in proofs]))
    shutil.copy(ROOT / "docs/site/conf.py", source)
    (source / "_static").mkdir()
    shutil.copy(ROOT / "docs/site/hnkit.css", source / "_static")


def _place(page: str) -> str:
    return "index.md" if page == "README.md" else page.replace(".ipynb", ".md")


def _text(page: str) -> tuple[str, dict[str, bytes]]:
    """A page in Markdown, and the pictures that it holds itself, by file name."""
    if page.endswith(".ipynb"):
        import nbformat

        return notebook.to_markdown(nbformat.read(ROOT / page, as_version=4))
    return (ROOT / page).read_text(encoding="utf-8"), {}


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def _append(path: Path, text: str) -> None:
    path.write_text(f"{path.read_text(encoding='utf-8')}\n{text}", encoding="utf-8")


def _tree(title: str, pages: Iterable[tuple[str, str]], hidden: bool = True) -> str:
    """A table of contents in MyST, for the sidebar or on the page."""
    entries = [
        f"{name} <{_place(page).removesuffix('.md')}>" if name else page.removesuffix(".md") for page, name in pages
    ]
    options = [f":caption: {title}"] * bool(title) + [":hidden:"] * hidden + [":maxdepth: 1"]
    return "\n".join(["```{toctree}", *options, *entries, "```", "", ""])


def _of_both_widths(match: re.Match[str]) -> str:
    """A picture of a page at the width of a desk, and in its place on a telephone the one of that width."""
    alternative, name = match.groups()
    return f"![{alternative}]({name}-wide.png){{.on-desk}} ![{alternative}]({name}-narrow.png){{.on-telephone}}"


def _held(match: re.Match[str]) -> str:
    return match[0].replace(" ", "\N{NO-BREAK SPACE}")


def _with_links(text: str, page: str, source: Path, staged: Collection[str]) -> str:
    """The text of a page with its links fit for the site; what they lead to is copied beside."""

    def link(match: re.Match[str]) -> str:
        if (source / Path(page).parent / match[2]).is_file():  # a picture of the page itself, or copied before
            return match[0]
        original = ((ROOT / page).parent / match[2]).resolve()
        if not original.exists():
            raise SystemExit(f"{page} links to {match[2]}, which does not exist")
        if original.is_dir():
            original /= "README.md"
            if not original.exists():
                return match[1]  # a folder of the repository that is no page
        name = original.relative_to(ROOT).as_posix()
        if original.suffix != ".md" and name not in staged:
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(original, source / name)
        elif name not in staged:
            aside = original.read_text(encoding="utf-8")
            _write(source / name, f"---\norphan: true\n---\n{_with_links(aside, name, source, staged)}")
        target = os.path.relpath(_place(name), Path(_place(page)).parent)
        return f"[{match[1]}]({target}{match[3] or ''})"

    parts = CODE.split(text)
    parts[::2] = [FIGURE.sub(_held, LINK.sub(link, WIDE.sub(_of_both_widths, part))) for part in parts[::2]]
    return "".join(parts)


def build(out: Path) -> list[Path]:
    """Write the site to `out`, which must not exist, and return its pages."""
    from sphinx.cmd.build import build_main

    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "source"
        source.mkdir()
        lay_out(source)
        if build_main(["-q", "-W", "--keep-going", "-b", "html", "-d", f"{folder}/trees", str(source), str(out)]):
            raise SystemExit("the site was not built")
    shutil.rmtree(out / "_sources", ignore_errors=True)
    (out / ".buildinfo").unlink(missing_ok=True)
    return sorted(out.rglob("*.html"))


def main() -> int:
    """Build into the folder that the command line names."""
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        print(__doc__, file=sys.stderr)
        return 2
    out = Path(sys.argv[1])
    if out.exists():
        shutil.rmtree(out) if (out / "index.html").is_file() else sys.exit(f"{out} exists and is no built site")
    print(f"{len(build(out))} pages in {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
