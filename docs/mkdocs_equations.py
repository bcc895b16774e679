# SPDX-License-Identifier: MIT
"""Turns the equations of pages into MathML, which browsers draw by themselves: no script, and none from elsewhere."""

import html
import re
from typing import Any

from math_core import LatexToMathML

EQUATION = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)


def on_page_content(content: str, **_: Any) -> str:
    r"""Convert what pymdownx.arithmatex has marked: \(...\) in a line, \[...\] as a block."""
    convert = LatexToMathML().convert_with_local_state
    return EQUATION.sub(lambda found: convert(html.unescape(found[2]), displaystyle=found[1] == "div"), content)
