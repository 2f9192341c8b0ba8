"""The pages in a real Chromium: `pytest -m browser`."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from records import eval_record, train_record
from run_dirs import write_run

import distrain

pytestmark = pytest.mark.browser


class Page(NamedTuple):
    """A page that is open."""

    driver: Any
    path: Path

    def ask(self, script: str) -> Any:
        """Return what an expression of JavaScript gives in the page."""
        return self.driver.execute_script(f"return {script}")

    def resize(self, width: int, scheme: str) -> None:
        """Set the width of the window in CSS pixels, and the theme: light or dark."""
        feature = {"name": "prefers-color-scheme", "value": scheme}
        self.driver.execute_cdp_cmd(
            "Emulation.setEmulatedMedia", {"features": [feature]}
        )
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)

    def list_requests(self) -> list[str]:
        """Return the URLs that the page has asked for, data URLs left out."""
        messages = [
            json.loads(entry["message"])["message"]
            for entry in self.driver.get_log("performance")
        ]
        urls = [
            message["params"]["request"]["url"]
            for message in messages
            if message["method"] == "Network.requestWillBeSent"
        ]
        return [url for url in urls if not url.startswith("data:")]


@pytest.fixture(scope="module")
def driver(tmp_path_factory) -> Iterator[Any]:
    from selenium import webdriver
    from selenium.webdriver.chrome.options import Options
    from selenium.webdriver.chrome.service import Service

    options = Options()
    options.binary_location = "/usr/bin/chromium"
    profile = tmp_path_factory.mktemp("profile")
    for argument in (
        "--headless=new",
        # CI runs as root.
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        f"--user-data-dir={profile}",
    ):
        options.add_argument(argument)
    options.set_capability(
        "goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"}
    )
    driver = webdriver.Chrome(options, Service("/usr/bin/chromedriver"))
    yield driver
    driver.quit()


def open_page(driver: Any, path: Path) -> Page:
    """Open a page from disk, with no log of what was before it."""
    for log in ("browser", "performance"):
        driver.get_log(log)
    driver.get(f"file://{path}")
    return Page(driver, path)


@pytest.fixture(scope="module")
def files(trained, tmp_path_factory) -> dict[str, Path]:
    """A report of a trained run, one of a run that had everything happen, a comparison."""
    folder = tmp_path_factory.mktemp("pages")
    steps = range(1, 3001)
    first = [train_record(step=s, loss=1 + 1 / s, bad_samples=s // 900) for s in steps]
    second = [train_record(step=3001, loss=float("nan")), eval_record(step=3001)]
    eventful = write_run(
        folder / "<i>eventful", [first, second], starts=[0, 2000], workers=2
    )
    distrain.report(trained.run, to=folder / "trained.html")
    distrain.report(eventful, to=folder / "eventful.html")
    distrain.compare([trained.run, eventful], to=folder / "compared.html")
    return {
        name: folder / f"{name}.html" for name in ("trained", "eventful", "compared")
    }


@pytest.fixture(params=["trained", "eventful", "compared"])
def page(request, driver, files) -> Page:
    return open_page(driver, files[request.param])


def test_it_opens_from_disk_without_an_error_or_a_request(page):
    assert page.driver.get_log("browser") == []
    assert page.list_requests() == [f"file://{page.path}"]
    assert page.ask("document.querySelectorAll('h1').length") == 1


def test_every_chart_has_drawn_something(page):
    """A curve or a mark within the axes, which is neither empty nor invisible."""
    drawn = page.ask(
        """[...document.querySelectorAll('figure svg')].map(svg => {
            const shapes = [...svg.querySelectorAll(
                '[id*="line2d"] > path, [id*="line2d"] g > use, [id*="Collection"] path,'
                + 'path[style*="--c"], image')]
                .filter(e => e.closest('[id*="axis"]') === null
                             && e.closest('[id*="legend"]') === null
                             && e.closest('defs') === null);
            return [svg.id || svg.getAttribute('aria-label'),
                    svg.getBoundingClientRect().height,
                    shapes.filter(e => {
                        const box = e.getBoundingClientRect();
                        return box.width + box.height > 1
                            && (getComputedStyle(e).stroke !== 'none'
                                || getComputedStyle(e).fill !== 'none');
                    }).length];
        })"""
    )
    assert len(drawn) >= 6
    for name, height, num_shapes in drawn:
        assert height > 100, name
        assert num_shapes > 0, name


def test_axes_and_legends_have_words_and_units(page):
    texts = page.ask(
        """[...document.querySelectorAll('figure svg')].map(svg =>
            [...svg.querySelectorAll('text')].map(t => t.textContent))"""
    )
    units = {
        "mean loss per image",
        "top-1 (% of images)",
        "top-5 (% of images)",
        "learning rate",
        "images per second",
        "share of the time (%)",
        "top-1 (% of the class's images)",
        "predicted class",
    }
    if page.path.name == "trained.html":
        assert any("seconds of rank 0, all lanes" in words for words in texts)
    for words in texts:
        # The bars have names, and no legend.
        if "seconds of rank 0, all lanes" in words:
            assert {"phase", "forward", "backward"} <= set(words)
            continue
        assert units & set(words), words
        assert {"step", "class", "phase"} & set(words)
        if "step" not in words:
            continue
        legend = {
            "training",
            "validation",
            "learning rate",
            "rank 0",
            "run",
            "<i>eventful",
        }
        assert legend & set(words), words


def test_what_a_screen_reader_says(page):
    names = page.ask(
        """[...document.querySelectorAll('figure svg, figure img')].map(e =>
            e.tagName === 'IMG' ? e.alt
            : e.getAttribute('role') === 'img' && e.getAttribute('aria-label'))"""
    )
    assert names
    assert all(names)
    unnamed = page.ask(
        """[...document.querySelectorAll('section')].filter(s =>
            !document.getElementById(s.getAttribute('aria-labelledby'))).length"""
    )
    assert unnamed == 0
    assert page.ask("document.documentElement.lang") == "en"
    assert page.ask("document.querySelectorAll('th:not([scope])').length") == 0


def test_the_keyboard_reaches_links_tables_and_details(page):
    from selenium.webdriver.common.keys import Keys

    reached = set()
    num_targets = page.ask(
        "document.querySelectorAll('a, summary, [tabindex=\"0\"]').length"
    )
    for _ in range(num_targets):
        page.driver.switch_to.active_element.send_keys(Keys.TAB)
        reached.add(page.ask("document.activeElement.tagName"))
    assert {"A", "DIV"} <= reached


@pytest.mark.parametrize("width", [1280, 390])
def test_it_fits_and_is_dark_where_the_system_is(page, width):
    colors = {}
    for scheme in ("light", "dark"):
        page.resize(width, scheme)
        assert page.ask("document.documentElement.scrollWidth") <= width
        colors[scheme] = page.ask(
            """['body', 'figure svg text', 'figure svg [id*="line2d"] > path'].map(q => {
                const style = getComputedStyle(document.querySelector(q));
                return style.backgroundColor + style.fill + style.stroke;
            })"""
        )
    for light, dark in zip(colors["light"], colors["dark"], strict=True):
        assert light != dark


def test_names_of_a_run_are_text(driver, files):
    page = open_page(driver, files["eventful"])
    assert (
        page.ask("document.querySelector('h1').textContent") == "Report of <i>eventful"
    )
    assert page.ask("document.querySelectorAll('i, script').length") == 0


def test_folded_tables_are_printed(driver, files):
    page = open_page(driver, files["trained"])
    page.resize(1280, "dark")
    is_visible = "document.querySelector('details table').checkVisibility()"
    assert not page.ask(is_visible)
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    try:
        assert page.ask(is_visible)
    finally:
        driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": ""})
