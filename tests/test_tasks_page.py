"""docs/tasks.md says what the lock file and the committed results say."""

import runpy
from pathlib import Path


def test_the_page_is_what_its_sources_give() -> None:
    root = Path(__file__).parents[1]
    page = runpy.run_path(str(root / "benchmarks" / "page.py"))
    assert page["PAGE"].read_text() == page["render"](), "run python benchmarks/page.py"
