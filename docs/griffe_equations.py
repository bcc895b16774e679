# SPDX-License-Identifier: MIT
"""Shows equations of docstrings as they stand in the code: Markdown would take underscores and stars for markup."""

import re
from typing import Any

import griffe


class Equations(griffe.Extension):
    """Indents the paragraphs with a LaTeX command, which makes them code, and escapes the stars of shapes."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rewrite one docstring."""
        if obj.docstring is None:
            return
        paragraphs = re.sub(r"(?<!\*)\*(?=[a-z])", r"\\*", obj.docstring.value).split("\n\n")
        for k, paragraph in enumerate(paragraphs):
            if re.search(r"\\[a-z]", paragraph) and not re.match("[A-Z][a-z]+:", paragraph):
                paragraphs[k] = re.sub("^", "    ", paragraph, flags=re.MULTILINE)
        obj.docstring.value = "\n\n".join(paragraphs)
