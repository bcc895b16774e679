# SPDX-License-Identifier: MIT
"""The code of the documentation: what its pages mark by a first line "# run" runs, shortened."""

from __future__ import annotations

import ast
import csv
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from tests.mpi.launch import ROOT, environment

DOCS = ROOT / "docs"
PAGES = sorted(DOCS.glob("*.md"))
BLOCK = re.compile(r"^( *)```python\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)
MARK = "# run\n"

# Runs each file given, in one process, for torch takes long to import. Only total_steps differs from the page.
RUNNER = """
import re, sys
from pathlib import Path

for file in map(Path, sys.argv[1:]):
    code = re.sub(r"total_steps=([0-9.e_]+)", lambda m: f"total_steps={float(m[1]) // 400}", file.read_text("utf-8"))
    print(f"{file.name} runs", flush=True)
    exec(compile(code, file.stem, "exec"), {"__name__": "__main__"})
"""


def marked(page: Path) -> dict[int, str]:
    """Return the marked blocks of a page by the number of their first line, each with that many lines before it."""
    text = page.read_text(encoding="utf-8")
    blocks = {}
    for block in BLOCK.finditer(text):
        line = text.count("\n", 0, block.start(2))
        if block[2].startswith(MARK):
            blocks[line + 1] = "\n" * line + block[2]
    return blocks


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_block_of_python_can_be_parsed(page: Path) -> None:
    for block in BLOCK.finditer(page.read_text(encoding="utf-8")):
        compile(block[2], page.name, "exec")


def test_marked_blocks_run(tmp_path: Path) -> None:
    files = []
    for page in PAGES:
        for line, code in marked(page).items():
            files.append(tmp_path / f"{page.name}:{line}.py")
            files[-1].write_text(code, encoding="utf-8")
    assert len(files) >= 9, "blocks have lost their mark"
    done = subprocess.run(
        [sys.executable, "-c", RUNNER, *map(str, files)],
        cwd=tmp_path,
        env={**environment(), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr}"
    assert (tmp_path / "rows.jsonl").read_text().count("\n") >= 1


def names_in(node: ast.AST) -> set[str]:
    """Return what a module or class defines: functions, classes, fields and attributes."""
    stored = [n for n in ast.walk(node) if isinstance(getattr(n, "ctx", None), ast.Store)]
    defined = {n.name for n in ast.walk(node) if isinstance(n, ast.FunctionDef | ast.ClassDef)}
    return defined | {getattr(n, "id", "") or getattr(n, "attr", "") for n in stored}


def test_what_pages_name_is_there() -> None:
    # Such as `rollout.gae` or `Worker.step`: by them a page says where something is computed, or what code may read.
    modules = {path.stem: ast.parse(path.read_text("utf-8")) for path in (ROOT / "ppo_mpi_base").glob("*.py")}
    owners = {name: names_in(module) for name, module in modules.items()}
    for module in modules.values():
        owners.update({n.name: names_in(n) for n in module.body if isinstance(n, ast.ClassDef)})
    owners.update(batch=owners["Batch"], rollout=owners["rollout"] | owners["Rollout"], worker=owners["Worker"])
    owners["actor_critic"] = owners["ActorCritic"]
    checked = 0
    for page in PAGES:
        for owner, name in re.findall(r"`([A-Za-z_]+)\.([A-Za-z_]+)[^`]*`", page.read_text("utf-8")):
            if owner in owners and name != "py":  # a file
                assert name in owners[owner], f"{page.name}: {owner}.{name} is not there"
                checked += 1
    assert checked > 50


def rounded(score: str) -> str:
    """Return a score as README has it: without decimals from 10 on."""
    return score if not score or abs(float(score)) < 10 else f"{float(score):.0f}"


def test_the_tables_of_readme_are_those_of_the_results() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    with (ROOT / "results" / "learning" / "scores.csv").open() as file:
        for row in csv.DictReader(file):
            seeds = row["seeds"].replace(" ", ", ")
            line = f"| {row['task']} | {row['setting']} | {row['mean']} | {row['std']} | {row['to_reach']} | {seeds} |"
            assert line in readme
    with (ROOT / "results" / "mujoco" / "scores.csv").open() as file:
        for row in csv.DictReader(file):
            own = " | ".join([rounded(row[name]) for name in ("mean", "std", "mean_of_new_seeds")])
            line = f"| {row['task']} | {own} | {row['seeds']} | {row['P']} | {row['SU']} | {row['CR']} |"
            assert line in readme
    with (ROOT / "results" / "mujoco_10M" / "scores.csv").open() as file:
        for row in csv.DictReader(file):
            mean, std = rounded(row["mean"]), rounded(row["std"])
            assert f"| {row['task']} | {mean} | {std} | {row['seeds']} | {row['predecessor']} |" in readme
    with (ROOT / "results" / "against_stable_baselines" / "scores.csv").open() as file:
        rows = list(csv.DictReader(file))
    for ours, theirs in zip(rows[::2], rows[1::2], strict=True):
        cells = (f"{r['mean_return']} ± {r['std']} | {r['median_seconds']} s" for r in (ours, theirs))
        assert f"| {ours['task']} | {' | '.join(cells)} |" in readme


@pytest.mark.parametrize(
    ("page", "tables"),
    [
        ("results", ("learning/scores", "mujoco/scores", "mujoco_10M/scores", "against_stable_baselines/scores")),
        ("results", ("classic_control/scores", "classic_control/tests", "mujoco/tests")),
        ("tried", ("changes/scores",)),
    ],
)
def test_pages_get_every_score(page: str, tables: tuple[str, ...]) -> None:
    hook = runpy.run_path(str(DOCS / "mkdocs_results.py"))
    shown = hook["on_page_markdown"]((DOCS / f"{page}.md").read_text(encoding="utf-8"))
    for table in tables:
        with (ROOT / "results" / f"{table}.csv").open(encoding="utf-8", newline="") as file:
            _, *rows = csv.reader(file)
        assert rows
        for row in rows:
            assert f"| {' | '.join(row)} |" in shown


def test_files_that_the_site_shows_are_there() -> None:
    hook = runpy.run_path(str(DOCS / "mkdocs_results.py"))
    linked = hook["linked"]()
    assert len([path for path in linked if path.endswith(".png")]) >= 6
    assert all((ROOT / path).is_file() for path in linked)
    names = {hook["name"](path) for path in linked}
    for page in DOCS.glob("*.md"):
        shown = hook["on_page_markdown"](page.read_text(encoding="utf-8"))
        assert "](../" not in shown, f"{page.name} links to a file that the site lacks"
        assert names.issuperset(re.findall(r"\]\((\S+\.(?:png|csv|json))\)", shown))


def test_readme_has_a_line_for_each_file() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    files = {path.name for path in (ROOT / "ppo_mpi_base").glob("*.py")} - {"__init__.py", "__main__.py"}
    section = readme.split("## A line per file")[1]
    assert files == set(re.findall(r"`(\w+\.py)`", section))
