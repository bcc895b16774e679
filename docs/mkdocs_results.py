# SPDX-License-Identifier: MIT
"""Puts the tables and the curves of results/ into the site, so that no page holds a copy of a figure."""

import csv
import re
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent.parent / "results"
PICTURES = {
    "learning.png": "learning/curves.png",
    "mujoco.png": "mujoco/curves.png",
    "mujoco_10M.png": "mujoco_10M/curves.png",
    "classic_control.png": "classic_control/curves.png",
    "against_stable_baselines_by_steps.png": "against_stable_baselines/by_steps.png",
    "against_stable_baselines_by_time.png": "against_stable_baselines/by_time.png",
}
PLACE = re.compile(r"<!-- (\S+\.csv) -->")


def on_files(files: Any, config: Any) -> Any:
    """Add the pictures of the learning curves to the files of the site, under their names in `PICTURES`."""
    from mkdocs.structure.files import File  # here, so that the table can be tested without mkdocs

    for name, path in PICTURES.items():
        files.append(File.generated(config, name, abs_src_path=str(RESULTS / path)))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Put a table of scores where a page asks for it, and leave out the marks of code that a test runs."""
    return PLACE.sub(lambda place: table(RESULTS / place[1]), markdown.replace("```python\n# run\n", "```python\n"))


def table(path: Path) -> str:
    """Return a CSV file as a table of Markdown."""
    with path.open(encoding="utf-8", newline="") as file:
        header, *rows = list(csv.reader(file))
    names = [name.replace("_", " ") for name in header]
    lines = [names, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
