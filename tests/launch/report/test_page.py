"""The page in a real browser: it sorts, filters, tells where a number comes from, and fits a phone, light and dark."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from evmamba.errors import printable
from evmamba.launch.report.build import report_from, write_report

from ..showcase import MODELS, write_showcase
from .test_escaping import NAMES, hostile

selenium = pytest.importorskip("selenium", reason="selenium drives the browser: pip install -e .[dev]")
from selenium import webdriver  # noqa: E402
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402
from selenium.webdriver.remote.webelement import WebElement  # noqa: E402

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(
    not (CHROMIUM and DRIVER), reason="no chromium with chromedriver here (apt: chromium-driver)"
)
DESKTOP, PHONE = (1400, 1000), (390, 844)


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    write_showcase(folder / "results")
    write_report(report_from([folder / "results"]), folder)
    return folder / "report.html"


@pytest.fixture(scope="module")
def browser() -> Iterator[webdriver.Chrome]:
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM or ""
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    # Offline: whatever the page asked for would fail and be logged.
    driver.execute_cdp_cmd("Network.enable", {})
    offline = {"offline": True, "latency": 0, "downloadThroughput": 0, "uploadThroughput": 0}
    driver.execute_cdp_cmd("Network.emulateNetworkConditions", offline)
    yield driver
    driver.quit()


@pytest.fixture
def opened(browser: webdriver.Chrome, page: Path) -> webdriver.Chrome:
    look(browser, page)
    return browser


def look(browser: webdriver.Chrome, page: Path, size: tuple[int, int] = DESKTOP, scheme: str = "light") -> None:
    """Open the page anew in a window of a size [pixels] with a colour scheme."""
    feature = {"name": "prefers-color-scheme", "value": scheme}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})
    window = {"width": size[0], "height": size[1], "deviceScaleFactor": 1, "mobile": size == PHONE}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", window)
    browser.get(page.as_uri())


def shown_models(browser: webdriver.Chrome) -> list[str]:
    rows = browser.find_elements(By.CSS_SELECTOR, "#main-table tr.measured th.model")
    return [row.text for row in rows if row.is_displayed()]


def header(browser: webdriver.Chrome, text: str) -> WebElement:
    found = browser.find_elements(By.CSS_SELECTOR, "#main-table button.sort")
    return next(button for button in found if button.text == text)


def numbers(browser: webdriver.Chrome, column: str) -> list[float | None]:
    """A column's values from top to bottom."""
    place = header(browser, column).find_element(By.XPATH, "..").get_property("cellIndex")
    script = (
        "return [...document.querySelectorAll('#main-table tr.measured')].map(r => r.cells[arguments[0]].dataset.value)"
    )
    return [None if value is None else float(value) for value in browser.execute_script(script, place)]


@pytest.mark.parametrize("size", [DESKTOP, PHONE], ids=["desktop", "phone"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_opens_offline_without_errors_and_never_wider_than_the_window(
    browser: webdriver.Chrome, page: Path, size: tuple[int, int], scheme: str
):
    look(browser, page, size, scheme)
    for details in browser.find_elements(By.TAG_NAME, "details"):
        browser.execute_script("arguments[0].open = true", details)
    assert browser.get_log("browser") == []
    assert browser.execute_script("return document.documentElement.scrollWidth") <= size[0]
    # The models' names stay beside the numbers when these are scrolled.
    table = browser.find_element(By.CSS_SELECTOR, "#main-table .scroll")
    browser.execute_script("arguments[0].scrollLeft = 400", table)
    name = browser.find_element(By.CSS_SELECTOR, "#main-table tbody th.model")
    assert 0 <= name.rect["x"] < 100
    assert len(shown_models(browser)) == len(MODELS)


def test_text_is_readable_on_its_background_in_both_schemes(browser: webdriver.Chrome, page: Path):
    for scheme in ("light", "dark"):
        look(browser, page, scheme=scheme)
        script = "return getComputedStyle(document.querySelector(arguments[0]))[arguments[1]]"
        ground = luminance(browser.execute_script(script, "body", "backgroundColor"))
        assert (ground > 0.5) == (scheme == "light")
        for selector in ("body", ".caption", "td.published a", "td.best a", "figure svg text"):
            color = "fill" if selector.endswith("text") else "color"
            text = luminance(browser.execute_script(script, selector, color))
            lighter, darker = max(text, ground), min(text, ground)
            assert (lighter + 0.05) / (darker + 0.05) >= 4.5, (scheme, selector)  # WCAG 2, level AA


def luminance(color: str) -> float:
    """WCAG's relative luminance of ``rgb(r, g, b)``."""
    channels = [float(part) / 255 for part in color[color.index("(") + 1 : -1].split(",")[:3]]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_a_column_sorts_both_ways_the_better_end_first_and_gaps_last(opened: webdriver.Chrome):
    header(opened, "params (M)").click()
    parameters = numbers(opened, "params (M)")
    assert parameters == sorted(parameters)
    header(opened, "params (M)").click()
    assert numbers(opened, "params (M)") == parameters[::-1]
    header(opened, "box AP").click()
    *found, last = numbers(opened, "box AP")
    assert found == sorted(found, reverse=True)
    assert last is None  # the failed one
    names = opened.execute_script(
        "return [...document.querySelectorAll('#main-table tr.published')].map(r => r.previousElementSibling.className)"
    )
    assert set(names) == {"measured"}  # published rows stay below their own


def test_names_filter_rows_and_boxes_hide_columns(opened: webdriver.Chrome):
    box = opened.find_element(By.ID, "filter")
    box.send_keys("vmamba, resnet")
    assert shown_models(opened) == [
        "EfficientVMamba-T",
        "EfficientVMamba-S",
        "resnet18",
        "EfficientVMamba-B",
    ]
    assert opened.find_element(By.ID, "count").text == f"4 of {len(MODELS)} models"
    box.send_keys(Keys.CONTROL + "a", Keys.DELETE)
    assert len(shown_models(opened)) == len(MODELS)

    assert header(opened, "top-1 (%)").is_displayed()
    chip = next(c for c in opened.find_elements(By.CSS_SELECTOR, ".chips label") if c.text == "classification")
    chip.click()
    hidden = opened.execute_script(
        "return [...document.querySelectorAll('#main-table th')].filter(t => t.hidden).map(t => t.textContent.trim())"
    )
    assert hidden == ["classification", "top-1 (%)", "top-5 (%)"]

    chip = next(c for c in opened.find_elements(By.CSS_SELECTOR, ".chips label") if c.text == "published rows")
    chip.click()
    assert not any(row.is_displayed() for row in opened.find_elements(By.CSS_SELECTOR, "#main-table tr.published"))


def test_a_click_on_a_number_tells_where_it_comes_from(opened: webdriver.Chrome):
    dialog = opened.find_element(By.ID, "origin")
    assert not dialog.is_displayed()
    cell = next(a for a in opened.find_elements(By.CSS_SELECTOR, "td.measured a.cell") if "±" in a.text)
    opened.execute_script("arguments[0].scrollIntoView({block: 'center', inline: 'center'})", cell)
    cell.click()
    assert dialog.is_displayed()
    text = dialog.text
    for seed in (0, 1, 2):
        assert f"EfficientVMamba-T · classification · linear · seed {seed}" in text
    for fact in ("0123456789abcdef0123456789abcdef01234567", "NVIDIA H200", "2edb9c46b9db7425", "torch 2.14.1"):
        assert fact in text
    for name in ("commit", "configuration", "versions", "device", "data", "start", "duration", "protocol", "files"):
        assert any(dt.text == name for dt in dialog.find_elements(By.TAG_NAME, "dt")), name
    dialog.send_keys(Keys.ESCAPE)
    assert not dialog.is_displayed()

    published = opened.find_element(By.CSS_SELECTOR, "td.published a.cell")
    opened.execute_script("arguments[0].click()", published)
    assert "arXiv 2403.09977v1, table 2" in dialog.text


def test_what_failed_tells_why_on_a_click(opened: webdriver.Chrome):
    failed = opened.find_element(By.CSS_SELECTOR, "td.failed a.cell")
    opened.execute_script("arguments[0].click()", failed)
    assert "CUDA out of memory" in opened.find_element(By.ID, "origin").text


def test_every_section_of_a_study_is_there(opened: webdriver.Chrome):
    headings = [heading.text for heading in opened.find_elements(By.CSS_SELECTOR, "main > h2")]
    assert headings == [
        "Quality over cost",
        "Ablations",
        "Cost and accuracy over the input's size",
        "Cost over the batch",
        "Per class",
        "Training",
        "Confusions",
        "Predictions",
        "Published",
        "Runs",
    ]
    loaded = opened.execute_script("return [...document.images].every(i => { i.loading = 'eager'; return i.src; })")
    assert loaded
    assert opened.find_elements(By.XPATH, "//h3[contains(., 'worst cases')]")


def test_names_that_are_code_stay_text(browser: webdriver.Chrome, tmp_path: Path):
    write_report(hostile(tmp_path / "results"), tmp_path)
    look(browser, tmp_path / "report.html")
    assert browser.title == "evmamba report"
    assert browser.get_log("browser") == []
    handlers = (
        "return [...document.querySelectorAll('*')].filter(e => e.getAttributeNames().some(n => n.startsWith('on')))"
    )
    assert browser.execute_script(handlers) == []
    assert len(browser.find_elements(By.TAG_NAME, "script")) == 1
    text = browser.execute_script("return document.documentElement.textContent")
    for name in NAMES:
        assert printable(name) in text, name
    for cell in browser.find_elements(By.CSS_SELECTOR, "td.measured a.cell, td.failed a.cell")[::8]:
        browser.execute_script("arguments[0].click()", cell)
        browser.execute_script("document.getElementById('origin').close()")
    assert browser.title == "evmamba report"
