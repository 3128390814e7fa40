"""The page in headless Chromium, as a visitor has it: desktop and phone, light and dark, mouse and keyboard."""

import json
import shutil
import time
from pathlib import Path

import pytest

from tests.app.test_app import inference, known  # noqa: F401
from tests.conftest import ROOT

pytest.importorskip("selenium")
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

from tests.app.visitor import (
    assert_accessible,
    choose_other,
    copy,
    drawn,
    drop,
    find,
    press_paste,
    shape,
    start_browser,
    tab,
    table,
    wait,
)

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
    assert "The network saw the square" in find(page, ".rn50-square:has(canvas)").text
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


def test_slider_and_other_classes_change_the_heat_map(page, known, exported):  # noqa: F811
    find(page, PICTURE).send_keys(str(known[1][0]))
    drawn(page)
    canvas = page.find_element(By.CSS_SELECTOR, ".rn50-seen canvas")
    before = float(canvas.value_of_css_property("opacity"))
    slider = find(page, "input.rn50-opacity")
    for _ in range(5):
        slider.send_keys(Keys.ARROW_RIGHT)
    assert float(canvas.value_of_css_property("opacity")) == pytest.approx(before + 0.05, abs=0.001)
    model = inference.Classifier(exported[0])
    sixth = model.predict(known[1][0].read_bytes()).top(6)[5]
    choose_other(page, model.names[sixth])
    assert page.find_element(By.CSS_SELECTOR, ".rn50-chosen").text == model.names[sixth]
    assert drawn(page)[0] == sixth


def test_the_classes_are_named_before_a_picture_is_chosen_and_an_example_by_its_file(page):
    assert "It knows 10 classes: bricks, cells, " in find(page, "#rn50-shown").text
    example = find(page, ".gallery-item[aria-label]")
    assert example.get_attribute("aria-label") == "0000"
    example.click()
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


def test_what_is_no_picture_gets_a_sentence_and_the_next_picture_an_answer(page, known, tmp_path):  # noqa: F811
    (tmp_path / "text.jpg").write_text("this is no picture\n")
    find(page, PICTURE).send_keys(str(tmp_path / "text.jpg"))
    alert = find(page, ".rn50-alert[role=alert]")
    assert alert.text == "The file is text, not a picture."
    assert not any(image.is_displayed() for image in page.find_elements(By.CSS_SELECTOR, "#rn50-picture img"))
    assert not page.find_elements(By.CSS_SELECTOR, ".rn50-result")
    page.find_element(By.CSS_SELECTOR, "#rn50-picture button[aria-label='Remove Image']").click()
    wait(page, lambda: page.find_elements(By.CSS_SELECTOR, ".rn50-empty"))
    (tmp_path / "big.jpg").write_bytes(bytes(inference.MAX_BYTES + 1))
    find(page, PICTURE).send_keys(str(tmp_path / "big.jpg"))
    wait(page, lambda: find(page, "[data-testid=toast-text]").text == 'Larger than 20 MB: "big.jpg"')
    find(page, PICTURE).send_keys(str(known[0][0]))
    assert find(page, ".rn50-best").text.startswith(known[0][1])


def test_a_batch_keeps_what_is_answered_while_pictures_come_and_go(page, app, known, tmp_path):  # noqa: F811
    """After its uploads are deleted, too, as they are within half a minute."""
    names = [f"kept {k}.jpg" for k in range(4)]
    for name, (path, *_) in zip(names, known, strict=False):
        shutil.copy2(path, tmp_path / name)
    (tmp_path / "broken.jpg").write_bytes(known[0][0].read_bytes()[:900])

    def add(*files):
        find(page, "#rn50-pictures input[type=file]").send_keys("\n".join(str(tmp_path / file) for file in files))

    def cards(count):
        """The first lines of that many cards that are answered: a name, and the best class or what is wrong."""
        done = ".rn50-card:has(li, [role=alert])"
        wait(page, lambda: len(page.find_elements(By.CSS_SELECTOR, done)) == count)
        found = page.find_elements(By.CSS_SELECTOR, ".rn50-card")
        assert len(found) == count
        return [card.text.split("\n")[:2] for card in found]

    tab(page, "Batch")
    add(*names[:3], "broken.jpg")
    before = cards(4)
    assert before[:3] == [[name, label] for name, (_, label, _) in zip(names[:3], known, strict=False)]
    assert before[3] == ["broken.jpg", "The picture is cut off: part of the file is missing."]
    image = find(page, ".rn50-card img")
    assert page.execute_script("return arguments[0].naturalWidth", image) > 10
    assert not [link for link in page.find_elements(By.CSS_SELECTOR, "#rn50-pictures a") if link.is_displayed()]
    mine = [path for path in app.uploads() if path.name in (*names, "broken.jpg") or path.name.startswith("kept")]
    assert len(mine) == 4
    for path in mine:
        path.unlink()
    page.find_elements(By.CSS_SELECTOR, "[aria-label='Remove this file']")[1].click()
    assert cards(3) == [before[0], *before[2:]]
    add(names[3])
    assert cards(4) == [before[0], *before[2:], [names[3], known[3][1]]]
    tab(page, "Classify")
    tab(page, "Batch")
    find(page, ".rn50-card button").click()
    assert find(page, "dialog .rn50-best").text.startswith(known[0][1])
    assert_accessible(page, "A picture of a batch", SERIOUS)
    find(page, "dialog .rn50-button").click()
    head, *lines = table(page, tmp_path)
    assert head[::15] == ["file", "probability_5"]
    assert head[16] == "unsure"
    assert lines[0][0] == names[0]
    assert lines[0][2] == known[0][1]
    assert lines[0][16] == "false"
    assert lines[2] == before[3]
    find(page, "[aria-label='Clear']").click()
    wait(page, lambda: not page.find_elements(By.CSS_SELECTOR, ".rn50-card"))


def test_about_has_accuracy_cost_curve_and_card_and_api_has_examples(page):
    tab(page, "About")
    text = wait(page, lambda: page.find_element(By.CSS_SELECTOR, ".rn50-tiles").text)
    assert "top-1 (95 %:" in text
    assert "of training" in text
    panel = page.find_element(By.CSS_SELECTOR, "[role=tabpanel]:not([style*=none])")
    wait(page, lambda: "of training on" in panel.text)
    tab(page, "API")
    text = wait(page, lambda: page.find_element(By.ID, "rn50-api").text)
    assert "client.predict(handle_file(" in text
    assert '"unsure": false' in text


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
    find(browser, ".rn50-all summary").click()
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
