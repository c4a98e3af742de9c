"""The page in a real browser: a file is read, a question answered, the keyboard and a narrow screen suffice."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from serve.books import book

FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
).split()


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    driver = shutil.which("chromedriver")
    if chromium is None or driver is None:
        pytest.skip("no chromium with chromedriver here")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('browser')}", "--window-size=1280,860"):
        options.add_argument(flag)
    made = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield made
    made.quit()


def wait(browser: Any, selector: str, condition: Callable[[str], bool]) -> str:
    """The text of an element once it is so."""
    end = time.monotonic() + 60
    while True:
        found = browser.find_elements("css selector", selector)
        text = found[0].text if found else ""
        if condition(text):
            return text
        assert time.monotonic() < end, f"{selector} is {text!r}"
        time.sleep(0.05)


def test_the_page_loads_nothing_from_elsewhere(http: httpx.Client) -> None:
    reply = http.get("/")
    assert reply.headers["content-security-policy"].startswith("default-src 'none'")
    outside = [link for link in ("http://", "https://") if link in reply.text.replace("http://www.w3.org/2000/svg", "")]
    assert outside == []


def test_a_file_is_read_and_asked(browser: Any, server: Any, engine: Any, tmp_path: Path) -> None:
    text = book(90)
    (tmp_path / "harbour.txt").write_text(text)
    browser.get(server.url)
    wait(browser, "#server", lambda shown: "tiny · full, exact · 1 shard" in shown)
    browser.find_element("id", "file").send_keys(str(tmp_path / "harbour.txt"))
    wait(browser, "#facts", lambda shown: "Read in" in shown)
    assert f"{len(engine.prompt(text, '?').document)} tokens" in browser.find_element("id", "facts").text
    assert "Prefilled without the question" in browser.find_element("id", "notes").text
    assert browser.find_elements("css selector", "#picture .bar .block")
    assert (
        "1 session" in browser.find_element("id", "memory").text
        or "sessions" in browser.find_element("id", "memory").text
    )
    browser.switch_to.active_element.send_keys("Who saw the river?\n")  # the question has the focus
    wait(browser, "#turns", lambda shown: "tokens not read again" in shown)
    shown = browser.find_element("css selector", ".turn .a").text
    assert shown.strip() == engine.generate(text, "Who saw the river?", 8).text.strip()
    assert browser.get_log("browser") == []


def test_keyboard_and_narrow_screen(browser: Any, server: Any) -> None:
    """All controls are reached by Tab, each shows its focus, and nothing needs scrolling sideways."""
    size = {"width": 390, "height": 844, "deviceScaleFactor": 1, "mobile": True}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    try:
        browser.get(server.url)
        wait(browser, "#list", lambda shown: "harbour.txt" in shown)
        browser.find_element("css selector", "li.doc .pick").click()
        browser.execute_script("document.activeElement.blur()")
        wanted = {"skip", "choose", "pick", "drop", "question", "send"}
        for _ in range(60):  # the list of documents may be long
            browser.switch_to.active_element.send_keys("\ue004")  # Tab
            active = browser.switch_to.active_element
            name = active.get_attribute("id") or active.get_attribute("data-key") or active.get_attribute("class") or ""
            wanted.discard(name.partition("-")[0])
            if not wanted:
                break
        assert wanted == set()
        assert browser.execute_script("return document.documentElement.scrollWidth") <= 390
    finally:
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_a_wrong_file_is_said_in_words(browser: Any, server: Any, tmp_path: Path) -> None:
    (tmp_path / "picture.txt").write_bytes(b"\xff\xd8\xff")
    browser.get(server.url)
    browser.find_element("id", "file").send_keys(str(tmp_path / "picture.txt"))
    wait(browser, "#upload", lambda shown: "not UTF-8 text" in shown)
