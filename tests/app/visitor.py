"""Headless Chromium and what a visitor does in it, for the tests of both pages."""

import base64
import csv
import io

import pytest
from PIL import Image

from tests import tiny_model

pytest.importorskip("selenium")
from axe_selenium_python import Axe
from selenium import webdriver
from selenium.common.exceptions import StaleElementReferenceException
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait


def start_browser(*flags, gpu=False):
    """Headless Chromium, which keeps what it says about its requests. gpu: whether it may use a graphics processor."""
    programs = tiny_model.chromium()
    if not programs:
        pytest.skip("no chromium and chromedriver; run: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = programs[0]
    own = ["--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--hide-scrollbars"]
    for flag in (*own, *([] if gpu else ["--disable-gpu"]), *flags):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    return webdriver.Chrome(options=options, service=webdriver.ChromeService(programs[1]))


def wait(browser, condition, within=20):
    """What `condition` comes to within some seconds; an element that was found may have been replaced since."""
    patient = WebDriverWait(browser, within, 0.05, [StaleElementReferenceException])
    return patient.until(lambda b: condition())


def find(browser, selector, within=20):
    """The first element that is there within some seconds."""
    return wait(browser, lambda: browser.find_elements(By.CSS_SELECTOR, selector), within)[0]


def shape(browser, width, height, *, mobile=False):
    metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": mobile}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)


def tab(browser, name):
    button = next(b for b in browser.find_elements(By.CSS_SELECTOR, "button[role=tab]") if b.text == name)
    button.click()
    wait(browser, lambda: button.get_attribute("aria-selected") == "true")


def drawn(browser):
    """(class that the heat map is of, its pixels)."""
    canvas = find(browser, ".rn50-seen canvas[data-drawn]")
    return int(canvas.get_attribute("data-drawn")), browser.execute_script("return arguments[0].toDataURL()", canvas)


def choose_other(browser, wanted):
    """Take a class that is not among the best, for which the list of all others is searched."""
    find(browser, ".rn50-all summary").click()
    find(browser, ".rn50-all input").send_keys(wanted.upper())
    [row] = [row for row in browser.find_elements(By.CSS_SELECTOR, ".rn50-list .rn50-row") if row.is_displayed()]
    row.click()


def table(browser, folder):
    """The lines of the batch's CSV, which is saved into a folder."""
    browser.execute_cdp_cmd("Browser.setDownloadBehavior", {"behavior": "allow", "downloadPath": str(folder)})
    find(browser, "#rn50-csv").click()
    wait(browser, lambda: (folder / "classes.csv").exists())
    return list(csv.reader(io.StringIO((folder / "classes.csv").read_text())))


def drop(browser, target, path):
    """Let go of a file over the element `target`, a selector."""
    browser.execute_script(
        """const bytes = Uint8Array.from(atob(arguments[0]), (c) => c.charCodeAt(0));
        const data = new DataTransfer();
        data.items.add(new File([bytes], "dropped.jpg", {type: "image/jpeg"}));
        const target = document.querySelector(arguments[1]);
        for (const kind of ["dragenter", "dragover", "drop"])
            target.dispatchEvent(new DragEvent(kind, {bubbles: true, cancelable: true, dataTransfer: data}));""",
        base64.b64encode(path.read_bytes()).decode(),
        target,
    )


def copy(browser, url, path):
    """Put a picture on Chromium's clipboard, as a PNG, which is what programs put there."""
    permissions = ["clipboardReadWrite", "clipboardSanitizedWrite"]
    browser.execute_cdp_cmd("Browser.grantPermissions", {"origin": url, "permissions": permissions})
    file = io.BytesIO()
    Image.open(path).save(file, "PNG")
    outcome = browser.execute_async_script(
        """const bytes = Uint8Array.from(atob(arguments[0]), (c) => c.charCodeAt(0)), done = arguments[1];
        const item = new ClipboardItem({"image/png": new Blob([bytes], {type: "image/png"})});
        navigator.clipboard.write([item]).then(() => done("copied"), (error) => done(String(error)));""",
        base64.b64encode(file.getvalue()).decode(),
    )
    assert outcome == "copied"


def press_paste(browser):
    key = {"key": "v", "code": "KeyV", "modifiers": 2}
    browser.execute_cdp_cmd("Input.dispatchKeyEvent", {"type": "keyDown", "commands": ["paste"], **key})
    browser.execute_cdp_cmd("Input.dispatchKeyEvent", {"type": "keyUp", **key})


def assert_accessible(browser, where, impacts=("minor", "moderate", "serious", "critical")):
    """axe-core finds nothing of these impacts."""
    axe = Axe(browser)
    axe.inject()
    found = [v for v in axe.run()["violations"] if v["impact"] in impacts]
    told = [f"{where}: {v['id']}: {node['html'][:200]}" for v in found for node in v["nodes"]]
    assert not told, "\n".join(told)
