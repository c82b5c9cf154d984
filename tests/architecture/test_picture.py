"""docs/architecture.svg shows the imports as they are."""

import runpy

from tests.architecture.sources import ROOT


def test_the_picture_is_drawn_from_the_present_imports() -> None:
    drawn = runpy.run_path(str(ROOT / "docs" / "draw_architecture.py"))["draw"]()

    picture = (ROOT / "docs" / "architecture.svg").read_text(encoding="utf-8")
    assert picture == drawn, "run: python docs/draw_architecture.py"
