"""Known problems of other ports (docs/parity.md): each names a public report and a test that exists."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
ROW = re.compile(r"\| .+ \| \[[^]]+\]\(https://github\.com/[\w.-]+/[\w.-]+/(?:issues|pull)/\d+\) \| `(.+)`: `(.+)` \|")


def test_each_known_problem_has_a_report_and_a_test():
    section = (
        (ROOT / "docs/parity.md").read_text("utf-8").split("## Known problems of other ports")[1].split("\n## ")[0]
    )
    rows = [line for line in section.splitlines() if line.startswith("| ")][2:]
    assert len(rows) > 20
    for row in rows:
        file, name = ROW.fullmatch(row).groups()
        assert f"def {name}(" in (ROOT / file).read_text("utf-8"), row
