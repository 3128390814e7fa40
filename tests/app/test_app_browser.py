"""The page in headless Chromium, as a visitor has it: desktop and phone, light and dark, mouse and keyboard."""

import json
import time
from pathlib import Path

import pytest

from tests.app.test_app import known  # noqa: F401
from tests.conftest import ROOT

pytest.importorskip("selenium")
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import Select

from tests.app.visitor import assert_accessible, copy, drawn, drop, find, press_paste, shape, start_browser, tab, wait

PICTURE = "#rn50-picture input[type=file]"
SERIOUS = ("serious", "critical")  # the rest is Gradio's


@pytest.fixture(scope="module")
def browser():
    driver = start_browser()
    yield driver
    driver.quit()


@pytest.fixture
def page(app, browser):
    """A fresh page of desktop size."""
    shape(browser, 1280, 900)
    browser.get(app.url + "/?__theme=light")
    find(browser, PICTURE)
    return browser


def test_a_picture_gets_its_label_and_a_heat_map_for_the_chosen_class(page, known):  # noqa: F811
    path, label, probability = known[0]
    find(page, PICTURE).send_keys(str(path))
    best = find(page, ".rn50-best").text
    assert best.startswith(label)
    assert abs(float(best.split("\n")[-1].removeprefix(label).strip(" %")) - 100 * probability) < 1
    rows = page.find_elements(By.CSS_SELECTOR, ".rn50-row")
    assert len(rows) == 5
    assert rows[0].text.startswith(label)
    shares = [float(row.find_element(By.CSS_SELECTOR, ".rn50-share").text.strip(" %")) for row in rows]
    assert shares == sorted(shares, reverse=True)
    first = drawn(page)
    rows[1].click()
    second = drawn(page)
    assert first[0] != second[0]
    assert first[1] != second[1]
    assert page.find_element(By.CSS_SELECTOR, ".rn50-chosen").text == rows[1].find_element(By.TAG_NAME, "span").text
    # by keyboard, as radio buttons are
    rows[1].find_element(By.TAG_NAME, "input").send_keys(Keys.ARROW_DOWN)
    assert drawn(page)[0] not in (first[0], second[0])
    assert "ms" in page.find_element(By.CSS_SELECTOR, ".rn50-latency").text


def test_slider_and_menu_change_the_heat_map(page, known):  # noqa: F811
    find(page, PICTURE).send_keys(str(known[1][0]))
    drawn(page)
    canvas = page.find_element(By.CSS_SELECTOR, ".rn50-seen canvas")
    before = float(canvas.value_of_css_property("opacity"))
    slider = find(page, "input.rn50-opacity")
    for _ in range(5):
        slider.send_keys(Keys.ARROW_RIGHT)
    assert float(canvas.value_of_css_property("opacity")) == pytest.approx(before + 0.05, abs=0.001)
    Select(find(page, ".rn50-any")).select_by_visible_text("zigzag")
    assert page.find_element(By.CSS_SELECTOR, ".rn50-chosen").text == "zigzag"
    assert drawn(page)[0] == 9


def test_an_example_is_answered(page):
    find(page, ".gallery-item").click()
    assert "%" in find(page, ".rn50-best").text


def test_a_picture_that_is_dropped_is_answered(page, known):  # noqa: F811
    path, label, _ = known[2]
    drop(page, "#rn50-picture button", path)
    assert find(page, ".rn50-best").text.startswith(label)


def test_a_picture_that_is_pasted_is_answered_in_the_tab_that_is_open(page, app, known):  # noqa: F811
    path, label, _ = known[3]
    copy(page, app.url, path)
    press_paste(page)
    assert find(page, ".rn50-best").text.startswith(label)
    # and another in its place
    path, label, _ = next(entry for entry in known if entry[1] != label)
    copy(page, app.url, path)
    press_paste(page)
    wait(page, lambda: find(page, ".rn50-best").text.startswith(label))
    tab(page, "Batch")
    press_paste(page)
    assert find(page, ".rn50-card li").text.startswith(label)


def test_the_button_of_the_clipboard_takes_a_picture_too(page, app, known):  # noqa: F811
    path, label, _ = known[4]
    copy(page, app.url, path)
    find(page, "#rn50-picture button[aria-label='Paste from clipboard']").click()
    assert find(page, ".rn50-best").text.startswith(label)


def test_what_is_no_picture_gets_a_sentence_and_the_next_picture_an_answer(page, known, tmp_path):  # noqa: F811
    (tmp_path / "text.jpg").write_text("this is no picture\n")
    find(page, PICTURE).send_keys(str(tmp_path / "text.jpg"))
    alert = find(page, ".rn50-alert[role=alert]")
    assert alert.text == "The file is text, not a picture."
    assert not page.find_elements(By.CSS_SELECTOR, ".rn50-result")
    page.find_element(By.CSS_SELECTOR, "#rn50-picture button[aria-label='Remove Image']").click()
    wait(page, lambda: page.find_elements(By.CSS_SELECTOR, ".rn50-empty"))
    find(page, PICTURE).send_keys(str(known[0][0]))
    assert find(page, ".rn50-best").text.startswith(known[0][1])


def test_batch_shows_a_card_for_each_picture(page, known, tmp_path):  # noqa: F811
    (tmp_path / "broken.jpg").write_bytes(known[0][0].read_bytes()[:900])
    # of one name in several folders: their own
    tab(page, "Batch")
    files = [str(path) for path, *_ in known[:3]]
    find(page, "#rn50-pictures input[type=file]").send_keys("\n".join([*files, str(tmp_path / "broken.jpg")]))
    wait(page, lambda: len(page.find_elements(By.CSS_SELECTOR, ".rn50-card")) == 4)
    cards = page.find_elements(By.CSS_SELECTOR, ".rn50-card")
    for card, (path, label, _) in zip(cards, known[:3], strict=False):
        assert card.find_element(By.TAG_NAME, "li").text.startswith(label)
        assert path.name in card.text
        image = card.find_element(By.TAG_NAME, "img")
        assert page.execute_script("return arguments[0].naturalWidth", image) > 10
    assert cards[3].find_element(By.CSS_SELECTOR, "[role=alert]").text


def test_about_has_accuracy_cost_curve_and_card_and_api_has_examples(page):
    tab(page, "About")
    text = wait(page, lambda: page.find_element(By.CSS_SELECTOR, ".rn50-tiles").text)
    assert "top-1 (95 %:" in text
    assert "of training" in text
    assert "seconds of training on" in page.find_element(By.CSS_SELECTOR, "[role=tabpanel]:not([style*=none])").text
    tab(page, "API")
    assert "client.predict(handle_file(" in wait(page, lambda: page.find_element(By.ID, "rn50-api").text)


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_accessibility_and_phone(app, browser, known, theme):  # noqa: F811
    """axe-core finds nothing serious, and on a phone nothing is wider than the screen."""
    shape(browser, 390, 844, mobile=True)
    browser.get(f"{app.url}/?__theme={theme}")
    find(browser, PICTURE).send_keys(str(known[0][0]))
    drawn(browser)
    time.sleep(0.5)  # colours fade in, and half of a fade has too little contrast
    assert browser.execute_script("return document.documentElement.scrollWidth") <= 390
    seen = browser.find_element(By.CSS_SELECTOR, ".rn50-seen").rect
    assert seen["x"] >= 0
    assert seen["x"] + seen["width"] <= 390
    assert_accessible(browser, "Classify on a phone", SERIOUS)
    shape(browser, 1280, 900)
    for name in ("Batch", "About", "API"):
        tab(browser, name)
        time.sleep(0.5)
        assert_accessible(browser, name, SERIOUS)


def test_the_page_asks_nobody_else_for_anything(page, app):
    """All of the requests since the first test, of whatever kind, so that the page works offline and tells no one."""
    messages = [json.loads(entry["message"])["message"] for entry in page.get_log("performance")]
    asked = [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
    asked += [m["params"]["url"] for m in messages if m["method"] == "Network.webSocketCreated"]
    assert len([url for url in asked if url.startswith(app.url)]) > 50
    foreign = {url for url in asked if not url.startswith((app.url + "/", "data:", "blob:"))}
    assert foreign == set()


def test_screenshots_in_the_docs_are_small():
    for name in ("space_desktop.jpg", "space_phone.jpg"):
        path = Path(ROOT / "docs" / name)
        assert 10_000 < path.stat().st_size < 200_000
