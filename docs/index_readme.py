"""README.md as a package index shows it: without the repository, where relative links and pictures lead nowhere."""

from __future__ import annotations

import re

PICTURE = re.compile(r"^!\[[^\]]*\]\((?!https?:)[^)]*\)\n\n?", re.MULTILINE)
LINK = re.compile(r"\[([^\]]*)\]\((?!https?:|#)([^)]*)\)")


def for_an_index(text: str) -> str:
    """The text without pictures of the repository; what a link to one of its files named stands in parentheses.

    Args:
        text: README.md.
    """
    return LINK.sub(lambda link: f"{link[1]} (`{link[2]}`)", PICTURE.sub("", text))
