"""Both pages in a real headless Chromium: they draw, complain of nothing, load nothing, and axe-core passes them."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sparsellm.report.comparison import write_comparison
from sparsellm.report.document import write_report

playwright = pytest.importorskip("playwright.sync_api", reason="pip install playwright")
axe = pytest.importorskip(
    "axe_playwright_python.sync_playwright",
    reason="pip install axe-playwright-python",
)

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))),
    None,
)
FLAGS = (
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
)  # fmt: skip
PATIENCE = 120_000  # milliseconds, on a busy machine
pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="no Chromium here; apt-get install chromium"
)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as started:
        chromium = started.chromium.launch(executable_path=CHROMIUM, args=list(FLAGS))
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def pages(runs: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pages")
    complete = Path(shutil.copytree(runs / "opt", folder / "opt"))
    # with measurements and continuations, everything is on it
    shutil.copy(runs / "half" / "results.json", complete)
    return {
        "run": write_report(complete, folder / "run.html"),
        "comparison": write_comparison(
            [runs / "half", runs / "nm"], folder / "comparison.html"
        ),
    }


@pytest.mark.parametrize(
    ("name", "theme", "size"),
    [("run", "light", (390, 844)), ("comparison", "dark", (1280, 900))],
)
def test_a_page_draws_and_is_accessible(
    name: str, theme: str, size: tuple[int, int], browser: Any, pages: dict[str, Path]
) -> None:
    width, height = size
    context = browser.new_context(
        viewport={"width": width, "height": height}, color_scheme=theme
    )
    context.set_default_timeout(PATIENCE)
    page = context.new_page()
    said, asked = list[str](), list[str]()
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(pages[name].as_uri())
    page.wait_for_selector(f"html[data-drawn={theme}]")
    charts = page.locator("[data-figure]")
    assert charts.count() > 4
    assert page.locator("[data-figure] .main-svg").count() >= charts.count()
    if name == "comparison":
        ranges = page.evaluate(
            "[['quality-sparsity', 'xaxis'], ['depth-sparsity', 'yaxis']].map(([figure, axis]) =>"
            "document.querySelector(`[data-figure=${figure}]`)._fullLayout[axis].range)"
        )
        # fractions of zeros
        assert all(0 <= low < high <= 1 for low, high in ranges), ranges
    # only tables scroll sideways
    assert page.evaluate("document.documentElement.scrollWidth") == width
    serious = [
        (violation["id"], [node["html"][:120] for node in violation["nodes"]])
        for violation in axe.Axe().run(page).response["violations"]
        if violation["impact"] in ("serious", "critical", "moderate")
    ]
    assert serious == []
    assert said == []
    assert asked == [pages[name].as_uri()]
    context.close()


def test_without_scripts_the_tables_are_there(
    browser: Any, pages: dict[str, Path]
) -> None:
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(pages["run"].as_uri())
    assert page.locator("noscript p").first.is_visible()
    page.locator("summary").first.click()
    assert page.locator("details table").first.is_visible()
    context.close()
