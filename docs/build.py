"""Build the documentation: every Markdown page of docs/, README.md and proofs/ as a small static site.

python docs/build.py site        write the pages to site/, which must not exist
"""

from __future__ import annotations

import html
import re
import shutil
import sys
from functools import partial
from pathlib import Path

import markdown

ROOT = Path(__file__).resolve().parents[1]
PAGES = (
    ("README.md", "Overview"),
    ("docs/verify-bound.md", "Checking a map"),
    ("docs/training.md", "Training"),
    ("docs/digits.md", "The miniature"),
    ("docs/real-models.md", "Real models"),
    ("docs/prompts-and-scorers.md", "Prompts and scorers"),
    ("docs/testing.md", "hnkit.testing"),
    ("docs/estimators.md", "Estimators"),
    ("docs/benchmarks-logdet.md", "Benchmarks"),
    ("docs/numerics.md", "Numerics"),
    ("docs/robustness.md", "Robustness"),
    ("docs/mutation.md", "Mutation"),
    ("proofs/README.md", "Proofs"),
)
STYLE = """
:root { color-scheme: light dark; }
body { margin: 0 auto; max-width: 58rem; padding: 1.5rem; font: 16px/1.6 system-ui, sans-serif; }
nav { display: flex; flex-wrap: wrap; gap: .4rem 1.1rem; padding-bottom: 1rem; border-bottom: 1px solid #8884; }
table { border-collapse: collapse; font-size: .85rem; display: block; overflow-x: auto; }
th, td { border-bottom: 1px solid #8884; padding: .35rem .6rem; text-align: left; }
pre { overflow-x: auto; padding: .8rem; background: #8881; border-radius: 6px; }
code { font-size: .88em; }
img { max-width: 100%; background: white; }
"""
LINK = re.compile(r'(href|src)="([^"#:]+)(#[^"]*)?"')


def _target(source: str) -> str:
    """Where a page of the repository lands in the site."""
    if source == "README.md":
        return "index.html"
    if source == "proofs/README.md":
        return "proofs/index.html"
    return source.removeprefix("docs/").removesuffix("README.md").removesuffix(".md").rstrip("/") + ".html"


def build(out: Path) -> list[Path]:
    """Write the site and return its pages; a link to a missing file of the repository is an error."""
    out.mkdir(parents=True)
    proofs = sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob("proofs/*/README.md"))
    titles = dict(PAGES) | {page: page.split("/")[1] for page in proofs}
    written = []
    for source in [*(page for page, _ in PAGES), *proofs]:
        text = (ROOT / source).read_text(encoding="utf-8")
        target = out / _target(source)
        body = markdown.markdown(text, extensions=["tables", "fenced_code", "toc"])
        body = LINK.sub(partial(_link, source=source, target=target, out=out), body)
        up = "../" * (len(target.relative_to(out).parts) - 1)
        nav = "".join(f'<a href="{up}{_target(page)}">{html.escape(title)}</a>' for page, title in PAGES)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(
            f'<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
            f"<title>hnkit: {html.escape(titles[source])}</title><style>{STYLE}</style><nav>{nav}</nav>{body}</html>\n",
            encoding="utf-8",
        )
        written.append(target)
    return written


def _link(match: re.Match[str], source: str, target: Path, out: Path) -> str:
    """Point a link at the built page or at a copy of the file it names."""
    kind, path, anchor = match[1], html.unescape(match[2]), match[3] or ""
    original = ((ROOT / source).parent / path).resolve()
    if not original.exists():
        raise SystemExit(f"{source} links to {path}, which does not exist")
    name = original.relative_to(ROOT).as_posix()
    up = "../" * (len(target.relative_to(out).parts) - 1)
    if name.endswith(".md") and (name in dict(PAGES) or name.startswith("proofs/")):
        return f'{kind}="{up}{_target(name)}{anchor}"'
    if original.is_file():
        copy = out / "files" / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(original, copy)
        return f'{kind}="{up}files/{name}{anchor}"'
    return f'{kind}="{up}index.html"'


def main() -> int:
    """Build into the folder that the command line names."""
    if len(sys.argv) != 2:
        print(__doc__, file=sys.stderr)
        return 2
    out = Path(sys.argv[1])
    if out.exists():
        shutil.rmtree(out) if (out / "index.html").is_file() else sys.exit(f"{out} exists and is no built site")
    print(f"{len(build(out))} pages in {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
