# SPDX-License-Identifier: MIT
"""Makes docstrings fit for Markdown and for the tables of fields: equations, the stars of shapes, "a, b: both"."""

import re
from typing import Any

import griffe

FIELDS = re.compile(r"^( +)(\w+(?:, \w+)+): (.*(?:\n\1 +.*)*)", re.MULTILINE)


class Docstrings(griffe.Extension):
    """Shows equations as they stand in the code, by indenting them; escapes stars; gives each field its own line."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rewrite one docstring."""
        if obj.docstring is None:
            return
        text = FIELDS.sub(lambda of: "\n".join(f"{of[1]}{n}: {of[3]}" for n in of[2].split(", ")), obj.docstring.value)
        paragraphs = re.sub(r"(?<!\*)\*(?=[a-z])", r"\\*", text).split("\n\n")
        for k, paragraph in enumerate(paragraphs):
            if re.search(r"\\[a-z]", paragraph) and not re.match("[A-Z][a-z]+:", paragraph):
                paragraphs[k] = re.sub("^", "    ", paragraph, flags=re.MULTILINE)
        obj.docstring.value = "\n\n".join(paragraphs)
