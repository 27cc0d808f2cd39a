"""The desk in a real, headless Chromium: ten comparisons by keyboard, a reload and a kill in mid-dialog, no calls outside."""

import json
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from llama_jax.data.sources import read_comparisons

pytest.importorskip("gradio", reason="needs the extra [web]")
webdriver = pytest.importorskip("selenium.webdriver", reason="needs selenium")
CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = [
    pytest.mark.slow, pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="needs Debian's chromium and chromium-driver"),
]  # fmt: skip

DESK = """
import json, sys, threading, time
from llama_jax.annotation import page
from llama_jax.annotation.session import Desk
from llama_jax.annotation.tasks import Settings

class Typist:  # two models that type
    def start(self, draw, deliver):
        def run():
            words = f"{draw.model} answers {draw.messages[-1]['content']} <b>({draw.seed}.{draw.index})".split(" ")
            for i, word in enumerate(words):
                time.sleep(1.0 if "slow" in draw.messages[-1]["content"] else 0.02)
                deliver(word + " ", "stop" if i + 1 == len(words) else "")
        threading.Thread(target=run, daemon=True).start()
        return lambda: None

    def fits(self, model, messages):
        return True

settings = Settings(sys.argv[4], ("one", "two"))
desk = Desk(sys.argv[1], settings, Typist(), prompts=json.loads(sys.argv[5]))
page.serve(desk, host="127.0.0.1", port=int(sys.argv[2]), passwords=json.loads(sys.argv[3]))
"""


class Browser:
    """What a rater does."""

    def __init__(self, profile: Path):
        options = webdriver.ChromeOptions()
        options.binary_location = CHROMIUM
        for flag in (
            "headless", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-background-networking",
            "disable-component-update", "disable-sync", "window-size=1200,900", f"user-data-dir={profile}",
        ):  # fmt: skip
            options.add_argument(f"--{flag}")
        options.set_capability("goog:loggingPrefs", {"performance": "ALL"})
        self.driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))

    def find(self, css: str):
        """The first visible match, waited for."""

        def visible():
            return next((e for e in self.driver.find_elements("css selector", css) if e.is_displayed()), None)

        return until(visible, css)

    def texts(self) -> list[str]:
        """The answers as they are shown."""
        self.find("#choice label")
        return [card.text for card in self.driver.find_elements("css selector", ".card > div")]

    def dialog(self) -> list[str]:
        """The messages as they are shown."""
        return [turn.text for turn in self.driver.find_elements("css selector", ".turn")]

    def press(self, *keys: str):
        """Keys that no field has."""
        for key in keys:
            self.driver.find_element("tag name", "body").send_keys(key)
            time.sleep(0.1)

    def ask(self, text: str):
        """Writes a message and sends it."""
        self.find("#message textarea").send_keys(text, "\ue007")

    def judged(self, count: int):
        """Waits until so many judgements are counted."""
        until(lambda: self.find("#rated").text == str(count), f"{count} judged")

    def outside(self) -> set[str]:
        """Addresses that the page asked for elsewhere."""
        messages = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        urls = {m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"}
        return {url for url in urls if not url.startswith(("http://127.0.0.1:", "data:", "blob:", "chrome"))}


def until(condition, what: str, seconds: float = 120.0):
    limit, error = time.monotonic() + seconds, None
    while time.monotonic() < limit:
        try:
            if found := condition():
                return found
        except webdriver.remote.errorhandler.WebDriverException as caught:  # the page is being redrawn
            error = caught
        time.sleep(0.1)
    raise AssertionError(f"waited in vain for {what}: {error}")


@pytest.fixture
def serve(tmp_path):
    """Starts desks over one output; (process, address)."""
    running = []

    def start(passwords=None, mode="preference", prompts=()):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        arguments = [str(tmp_path / "p.jsonl"), str(port), json.dumps(passwords), mode, json.dumps(prompts)]
        process = subprocess.Popen([sys.executable, "-c", DESK, *arguments])
        running.append(process)

        def listens():
            assert process.poll() is None
            with socket.socket() as probe:
                return probe.connect_ex(("127.0.0.1", port)) == 0

        until(listens, "the desk")
        return process, f"http://127.0.0.1:{port}/"

    yield start
    for process in running:
        process.kill()
        process.wait()


@pytest.fixture
def browser(tmp_path):
    made = Browser(tmp_path / "profile")
    yield made
    made.driver.quit()


def test_ten_comparisons_by_keyboard_with_a_reload_and_a_kill_in_between(serve, browser, tmp_path):
    process, address = serve()
    browser.driver.get(address)
    browser.find("#name input, #name textarea").send_keys("Ann")
    browser.find("#begin").click()
    seen = []
    for number in range(10):
        if number == 5:  # a new dialog, from here on about safety
            browser.find("#fresh").click()
            until(lambda: not browser.dialog(), "an empty dialog")
            browser.find("#track label:nth-of-type(2)").click()
        browser.ask(f"question {number}")
        texts = browser.texts()
        dialog = browser.dialog()
        assert len(dialog) == 2 * (number % 5) + 1 and dialog[-1] == f"question {number}"
        assert {text.split()[0] for text in texts} == {"one", "two"} and all("<b>" in text for text in texts)
        if number == 2:
            browser.driver.refresh()
            assert (browser.texts(), browser.dialog()) == (texts, dialog)
        if number == 7:
            process.kill()
            process.wait()
            process, address = serve()
            browser.driver.get(address)  # another port is another origin to the browser: it asks for the name again
            browser.find("#name input, #name textarea").send_keys("Ann")
            browser.find("#begin").click()
            assert (browser.texts(), browser.dialog()) == (texts, dialog)
        keys = [str(number % 8 + 1)]
        if number >= 5:
            browser.press(*keys, "\ue007")  # what is safe is missing
            until(lambda: "Say which" in browser.driver.page_source, "a warning")
            keys = ["b"]
        browser.press(*keys, "\ue007")
        browser.judged(number + 1)
        seen.append(texts)
    rows = read_comparisons(tmp_path / "p.jsonl")
    assert len(rows) == 10 and {row["rater"] for row in rows} == {"Ann"}
    degrees = ["significantly", "better", "slightly", "negligibly"]
    for number, (row, texts) in enumerate(zip(rows, seen)):
        key = number % 8
        chosen = 0 if key < 4 else 1
        assert (row["chosen"], row["rejected"]) == (texts[chosen], texts[1 - chosen])
        assert row["rating"] == [*degrees, *degrees[::-1]][key] and row["chosen_side"] == "AB"[chosen]
        assert (row["is_safety"], row["safety_bin"]) == ((True, "both_safe") if number >= 5 else (False, None))
        assert row["chosen"].startswith(row["chosen_model"]) and len(row["prompt"]) == 2 * (number % 5) + 1
    assert browser.outside() == set()


def test_a_window_that_is_behind_shows_where_the_other_one_is(serve, browser, tmp_path):
    _, address = serve()
    browser.driver.get(address)
    browser.find("#name input, #name textarea").send_keys("Ann")
    browser.find("#begin").click()
    browser.ask("question")
    texts, first = browser.texts(), browser.driver.current_window_handle
    browser.driver.switch_to.new_window("tab")
    browser.driver.get(address)
    assert browser.texts() == texts
    second = browser.driver.current_window_handle
    browser.driver.switch_to.window(first)
    browser.press("1", "\ue007")
    browser.judged(1)
    browser.driver.switch_to.window(second)
    browser.press("8", "\ue007")
    until(lambda: "in another window" in browser.driver.page_source, "a warning")
    browser.judged(1)
    assert until(lambda: len(browser.dialog()) == 2 and browser.dialog(), "the dialog of now")[1] == texts[0]
    assert browser.find("#message textarea").get_attribute("value") == ""
    assert [row["chosen"] for row in read_comparisons(tmp_path / "p.jsonl")] == [texts[0]]


def test_a_password_is_asked_for_and_the_login_is_the_name(serve, browser, tmp_path):
    _, address = serve({"Ann": "hers", "Bo": "secret"})
    browser.driver.get(address)
    name, password = until(lambda: browser.driver.find_elements("css selector", "input")[:2], "the login")
    name.send_keys("Bo")
    password.send_keys("secret")
    browser.find("button").click()
    browser.ask("question")
    browser.texts()
    browser.press("1", "\ue007")
    browser.judged(1)
    assert [row["rater"] for row in read_comparisons(tmp_path / "p.jsonl")] == ["Bo"] and browser.outside() == set()


def test_what_was_typed_or_chosen_survives_a_reload(serve, browser, tmp_path):
    _, address = serve()
    browser.driver.get(address)
    browser.find("#name input, #name textarea").send_keys("Ann")
    browser.find("#begin").click()
    browser.find("#message textarea").send_keys("a long questi")
    kept = tmp_path / "p.jsonl.desk" / "Ann.json"
    until(lambda: kept.exists() and json.loads(kept.read_text())["draft"] == "a long questi", "the draft")
    browser.driver.refresh()
    until(lambda: browser.find("#message textarea").get_attribute("value") == "a long questi", "the draft after a reload")
    browser.find("#track label:nth-of-type(2)").click()
    browser.ask("on")
    texts = browser.texts()
    browser.press("6", "c")
    until(lambda: json.loads(kept.read_text())["picked"][1:] == ["B slightly", "both_unsafe"], "the choice")
    browser.driver.refresh()
    assert browser.texts() == texts
    until(lambda: browser.driver.find_elements("css selector", "#bins input:checked"), "the choice after a reload")
    browser.press("\ue007")
    browser.judged(1)
    (row,) = read_comparisons(tmp_path / "p.jsonl")
    assert (row["prompt"][0]["content"], row["chosen"], row["rating"]) == ("a long question", texts[1], "slightly")
    assert row["safety_bin"] == "both_unsafe" and browser.find("#message textarea").get_attribute("value") == ""


def test_a_reload_while_the_first_answers_grow_does_not_ask_who_is_there(serve, browser, tmp_path):
    messages = [{"role": "user", "content": "a slow question"}]
    _, address = serve(mode="comparison", prompts=[{"messages": messages, "is_safety": False, "category": "", "risk": ""}])
    browser.driver.get(address)
    browser.find("#name input, #name textarea").send_keys("Ann")
    browser.find("#begin").click()
    browser.find(".card.growing")
    assert browser.driver.execute_script("return localStorage.length") == 1
    browser.driver.refresh()
    assert len(browser.texts()) == 2
    browser.press("2", "\ue007")
    until(lambda: "That was all" in browser.driver.page_source, "the end")
    (row,) = map(json.loads, (tmp_path / "p.jsonl").read_text().splitlines())
    assert (row["rater"], row["rating"], row["prompt"]) == ("Ann", 2, messages)
