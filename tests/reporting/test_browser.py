"""The page in a real browser: quiet, reachable by keyboard, whole on a phone and on a desktop, legible in both themes."""
import json
import shutil
from collections.abc import Iterator

import pytest

import report
from tests.reporting.tiny_runs import write_runs
from tests.running import run

webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed: pip install -r requirements-dev.txt")
BROWSER, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not (BROWSER and DRIVER), reason="chromium or chromedriver is not installed")]

PHONE, DESKTOP = 390, 1440
OPTIONS = ("headless", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-background-networking",
           "disable-component-update", "disable-sync", "disable-dev-shm-usage")

# of each visible piece of text: the text, its rectangles, its colour on what lies behind it, and whether it may scroll
TEXTS = """
const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT), found = [];
while (walker.nextNode()) {
  const node = walker.currentNode, element = node.parentElement;
  if (!node.textContent.trim() || !element.checkVisibility() || element.closest("script, .hidden, .skip")) continue;
  const style = getComputedStyle(element), range = document.createRange();
  if (style.clipPath !== "none") continue;
  range.selectNodeContents(node);
  let behind = element;
  while (behind && getComputedStyle(behind).backgroundColor === "rgba(0, 0, 0, 0)") behind = behind.parentElement;
  found.push({text: node.textContent.trim(), color: style.color, ground: getComputedStyle(behind).backgroundColor,
    scrolls: !!element.closest(".scroll, nav, pre"), sticks: !!element.closest(".bar"),
    boxes: [...range.getClientRects()].map(box => [box.left, box.top + scrollY, box.right, box.bottom + scrollY])});
}
return found;
"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory) -> Iterator:
    output = tmp_path_factory.mktemp("output")
    run(report, *write_runs(output), f"paths.output={output}")
    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    for option in (*OPTIONS, f"user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(f"--{option}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    driver.page = (output / "set" / "report.html").as_uri()
    yield driver
    driver.quit()


def show(browser, width: int = DESKTOP, scheme: str = "light", **media: str) -> None:
    """Load the page anew."""
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", {"width": width, "height": 900, "deviceScaleFactor": 1,
                                                                   "mobile": width == PHONE})
    features = {"prefers-color-scheme": scheme, **{name.replace("_", "-"): value for name, value in media.items()}}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [
        {"name": name, "value": value} for name, value in features.items()]})
    browser.get(browser.page)


def press(browser, *keys: str) -> None:
    """Keys by their names, to whatever has the focus."""
    names = webdriver.Keys
    for key in keys:
        webdriver.ActionChains(browser).send_keys(getattr(names, key)).perform()


def run_js(browser, script: str, *values):
    return browser.execute_script(script, *values)


def luminance(color: str) -> float:
    """Of a CSS colour rgb(r, g, b), as WCAG 2 has it."""
    channels = [float(part) / 255 for part in color[color.index("(") + 1 : -1].split(",")[:3]]
    linear = [value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4 for value in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(a: str, b: str) -> float:
    low, high = sorted((luminance(a), luminance(b)))
    return (high + 0.05) / (low + 0.05)


def test_it_loads_without_errors_or_requests(browser):
    browser.get("about:blank")
    browser.get_log("performance")  # what the browser itself loads at its start
    show(browser)
    assert browser.get_log("browser") == []
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    urls = {message["params"]["request"]["url"] for message in messages if message["method"] == "Network.requestWillBeSent"}
    assert browser.page in urls and all(url == browser.page or url.startswith("data:") for url in urls)
    assert run_js(browser, "return [...document.images].every(image => image.complete && image.naturalWidth > 0)")
    assert run_js(browser, "return document.title") == "set · NegFaceDiff"


def test_a_click_shows_the_same_image_of_every_run(browser):
    show(browser)
    face = "document.querySelectorAll('#faces button.face')[2]"
    run_js(browser, f"{face}.click()")
    assert run_js(browser, "return document.querySelector('dialog').open")
    alts = run_js(browser, "return [...document.querySelectorAll('.large img')].map(image => image.alt)")
    name = run_js(browser, "return document.querySelector('.identity h3').lastChild.textContent")
    assert alts == [f"identity {name}, image 2, {run}" for run in ("w0", "far", "close")]
    sizes = run_js(browser, f"return [document.querySelector('.large img').clientWidth, {face}.clientWidth]")
    assert sizes[0] > 2 * sizes[1]
    press(browser, "ESCAPE")
    assert not run_js(browser, "return document.querySelector('dialog').open")


def test_the_keyboard_goes_everywhere(browser):
    show(browser)
    run_js(browser, "document.querySelector('#faces button.face').focus()")
    press(browser, "ARROW_RIGHT", "ARROW_DOWN")
    here = "return document.activeElement.firstElementChild.alt"
    second = run_js(browser, "return document.querySelectorAll('.identity h3')[1].lastChild.textContent")
    assert run_js(browser, here) == f"identity {second}, image 1, w0"
    assert run_js(browser, "return getComputedStyle(document.activeElement).outlineStyle") == "solid"
    press(browser, "ENTER")
    assert run_js(browser, "return document.querySelector('dialog').open")
    press(browser, "ARROW_RIGHT")
    title = run_js(browser, "return document.querySelector('dialog h2').textContent")
    assert title == f"identity {second}, image 2"
    press(browser, "ESCAPE")
    assert run_js(browser, here) == f"identity {second}, image 1, w0"
    press(browser, "TAB")
    assert not run_js(browser, "return document.activeElement.closest('.identity') !== null")  # one stop for the whole wall


def test_another_strategy_is_shown_beside_w_0(browser):
    show(browser)
    shown = """return [...document.querySelectorAll('.identity')[0].querySelectorAll('.group')]
        .filter(group => group.checkVisibility()).map(group => group.querySelector('.run').textContent)"""
    assert run_js(browser, shown) == ["w0", "close"]
    run_js(browser, "document.querySelector('#show1').focus()")
    press(browser, "SPACE")
    assert run_js(browser, shown) == ["w0", "far"]
    run_js(browser, "document.querySelector('#show-all').click()")
    assert run_js(browser, shown) == ["w0", "far", "close"]


def test_the_chart_tells_values_on_hover_and_by_keys(browser):
    show(browser)
    state = """const chart = document.querySelector('#scores .chart');
        return [chart.querySelector('output').textContent, chart.querySelector('tbody').innerText,
                chart.querySelector('.plot').getAttribute('aria-valuetext')]"""
    first = run_js(browser, state)
    run_js(browser, "document.querySelector('#scores .plot').focus()")
    press(browser, "ARROW_RIGHT")
    second = run_js(browser, state)
    assert float(second[0]) == pytest.approx(float(first[0]) + 0.01) and second[1] != first[1] and second[0] in second[2]
    plot = browser.find_element("css selector", "#scores .plot")
    webdriver.ActionChains(browser).move_to_element_with_offset(plot, -plot.size["width"] // 4, 0).perform()
    assert float(run_js(browser, state)[0]) < float(first[0]) - 0.05


@pytest.mark.parametrize("width", [PHONE, DESKTOP])
def test_nothing_is_wider_than_the_page_and_nothing_overlaps(browser, width):
    show(browser, width)
    run_js(browser, "document.querySelectorAll('details').forEach(one => { one.open = true })")
    assert run_js(browser, "return document.documentElement.scrollWidth") <= width
    texts = run_js(browser, TEXTS)
    assert len(texts) > 200
    for one in texts:
        assert one["scrolls"] or all(-1 <= box[0] and box[2] <= width + 1 for box in one["boxes"]), one["text"]
    boxes = [(one["text"], box) for one in texts if not (one["scrolls"] or one["sticks"]) for box in one["boxes"]]
    boxes += [("a face", box) for box in run_js(browser, """return [...document.querySelectorAll('button.face')]
        .filter(face => face.checkVisibility()).map(face => face.getBoundingClientRect())
        .map(box => [box.left, box.top + scrollY, box.right, box.bottom + scrollY])""")]
    boxes.sort(key=lambda entry: entry[1][1])
    for place, (text, a) in enumerate(boxes):
        for other, b in boxes[place + 1 :]:
            if b[1] >= a[3] - 2:
                break
            assert not (min(a[2], b[2]) - max(a[0], b[0]) > 2 and min(a[3], b[3]) - b[1] > 3), (text, other, a, b)


@pytest.mark.parametrize("width", [PHONE, 1000, DESKTOP])
def test_the_values_beside_a_chart_need_no_scrolling_and_nor_do_metrics_on_a_desktop(browser, width):
    show(browser, width)
    tables = run_js(browser, """return [...document.querySelectorAll('.readout, .metrics')].map(table =>
        [table.className, table.scrollWidth - table.parentElement.clientWidth, table.querySelector('th').clientHeight])""")
    assert {name for name, _, _ in tables} == {"readout", "metrics"}
    for name, beyond, height in tables:
        assert beyond <= 0 or (name == "metrics" and width < DESKTOP)
        assert name == "metrics" or height < 80  # px: at most three lines


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_contrast_is_sufficient(browser, scheme):
    show(browser, scheme=scheme)
    run_js(browser, "document.querySelectorAll('details').forEach(one => { one.open = true })")
    texts = run_js(browser, TEXTS)
    assert {luminance(one["ground"]) > 0.5 for one in texts} == {scheme == "light"}
    worst = min(texts, key=lambda one: contrast(one["color"], one["ground"]))
    assert contrast(worst["color"], worst["ground"]) >= 4.5, worst
    paper = run_js(browser, "return getComputedStyle(document.body).backgroundColor")
    colours = run_js(browser, "return [...document.querySelectorAll('path.line')].map(line => getComputedStyle(line).stroke)")
    palette = run_js(browser, """return [...Array(6).keys()].map(number => {
        const one = document.createElement('i'); one.className = 'swatch c' + number; document.body.append(one);
        return getComputedStyle(one).backgroundColor })""")
    assert len(set(palette)) == 6 and min(contrast(colour, paper) for colour in (*colours, *palette)) >= 4.5


def test_a_screen_reader_finds_its_way(browser):
    show(browser)
    assert run_js(browser, "return document.documentElement.lang") == "en"
    assert [run_js(browser, "return document.querySelectorAll(arguments[0]).length", name)
            for name in ("header", "nav", "main", "footer", "h1")] == [1] * 5
    levels = run_js(browser, "return [...document.querySelectorAll('main :is(h2, h3)')].map(one => +one.tagName[1])")
    assert levels[0] == 2 and max(levels) == 3
    assert run_js(browser, "return [...document.images].every(image => image.alt)")
    assert run_js(browser, """return [...document.querySelectorAll('table')].filter(table =>
        ![...table.querySelectorAll('thead th')].length || [...table.querySelectorAll('th')].some(cell => !cell.scope)
        || !table.querySelector('tbody th')).length""") == 0
    assert run_js(browser, """return [...document.querySelectorAll('[aria-labelledby]')].every(one =>
        document.getElementById(one.getAttribute('aria-labelledby')))""")
    ids = run_js(browser, "return [...document.querySelectorAll('[id]')].map(one => one.id)")
    assert len(ids) == len(set(ids))
    links = run_js(browser, "return [...document.querySelectorAll('nav a')].map(link => link.hash.slice(1))")
    assert set(links) <= set(ids) and len(links) == 8


def test_motion_is_reduced_where_asked(browser):
    show(browser)
    assert run_js(browser, "return getComputedStyle(document.documentElement).scrollBehavior") == "smooth"
    show(browser, prefers_reduced_motion="reduce")
    assert run_js(browser, "return getComputedStyle(document.documentElement).scrollBehavior") == "auto"


def test_the_commands_can_be_copied(browser):
    show(browser)
    run_js(browser, "navigator.clipboard.writeText = async text => { window.copied = text }")
    run_js(browser, "document.querySelector('.copy').focus()")
    press(browser, "ENTER")
    lines = run_js(browser, "return window.copied").splitlines()
    assert lines[0].startswith("python sample.py guidance.w=0 paths.output=") and len(lines) == len(set(lines))


def test_it_is_printed_in_black_on_white(browser):
    show(browser, 718, scheme="dark")  # A4 less the browser's margins
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print", "features": [
        {"name": "prefers-color-scheme", "value": "dark"}]})
    assert run_js(browser, "return getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert not run_js(browser, "return document.querySelector('nav').checkVisibility()")
    assert run_js(browser, "return document.documentElement.scrollWidth") <= 718
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "", "features": []})
