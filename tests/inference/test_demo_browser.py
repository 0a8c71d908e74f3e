"""The demo's page in headless Chromium, driven by Selenium: upload, ask, read the answer, see the map.

Needs Selenium (`pip install selenium`) and Chromium with its driver (Debian: `apt-get install chromium
chromium-driver`). The picture in the README is written by

    DEMO_RUN=runs/quickstart pytest -m slow tests/inference/test_demo_browser.py -k picture

from the run that `flamingo-ft train recipes/quickstart.yaml` writes.
"""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path

import pytest

from flamingo_ft.adapters.switched_off import switched_off
from flamingo_ft.inference.demo.examples import examples_of

from .conftest import PROMPT, served_demo

pytestmark = pytest.mark.slow  # a browser starts, and the page takes seconds to load
pytest.importorskip("selenium", reason="Selenium is not installed: pip install selenium")

from selenium import webdriver  # noqa: E402
from selenium.common.exceptions import StaleElementReferenceException  # noqa: E402
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.support.ui import WebDriverWait  # noqa: E402

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
RUN = os.environ.get("DEMO_RUN")
ROOT = Path(__file__).parents[2]
PICTURE, DIGIT = ROOT / "docs" / "demo.png", ROOT / "recipes" / "quickstart" / "images" / "0001.png"
LONGEST_WAIT = 60  # seconds


class Visitor:
    """What a person does on the page: every method acts on, or reads, what is visible."""

    def __init__(self, driver: webdriver.Chrome, url: str):
        self.driver, self.answered = driver, 0  # answers before the last question
        driver.get(url)
        self.wait_for("#question textarea")

    def all(self, selector: str) -> list:
        return [e for e in self.driver.find_elements(By.CSS_SELECTOR, selector) if e.is_displayed()]

    def wait(self, condition):
        # The page replaces elements while an answer is written.
        ignored = [StaleElementReferenceException]
        return WebDriverWait(self.driver, LONGEST_WAIT, 0.05, ignored).until(lambda _: condition())

    def wait_for(self, selector: str):
        return self.wait(lambda: self.all(selector))[0]

    def click(self, selector: str, index: int = 0) -> None:
        def clicked() -> bool:
            if elements := self.all(selector):
                elements[index].click()
            return bool(elements)

        self.wait(clicked)

    def upload(self, *files: Path) -> None:
        box = self.driver.find_element(By.CSS_SELECTOR, "#question input[type=file]")
        self.driver.execute_script("arguments[0].value = ''", box)  # the driver adds to an earlier choice
        box.send_keys("\n".join(map(str, files)))
        self.wait(lambda: len(self.all("#question .thumbnail-item")) == len(files))

    def ask(self, text: str, *files: Path) -> None:
        self.answered = len(self.answers())
        if files:
            self.upload(*files)
        self.wait_for("#question textarea").send_keys(text)
        self.click("#question .submit-button")

    def wait_for_answer(self) -> str:
        """Wait until one more answer is shown and another question can be asked, and return the answer."""
        self.wait(lambda: len(self.answers()) > self.answered and self.all("#question .submit-button"))
        return self.answers()[-1]

    def answers(self, chat: str = "answers") -> list[str]:
        selector = f"#{chat} [data-testid=bot]"
        script = "return [...document.querySelectorAll(arguments[0])].map(e => e.textContent.trim())"
        return self.driver.execute_script(script, selector)  # in one step: the page changes meanwhile

    def map(self) -> str:
        script = "return document.querySelector('#look img')?.src"
        return self.wait(lambda: self.driver.execute_script(script))

    def error(self) -> str:
        return self.wait(lambda: [toast.text for toast in self.all("[data-testid=toast-text]")])[0]


@pytest.fixture(scope="module")
def driver():
    if not (CHROMIUM and DRIVER):
        pytest.skip("Chromium is not installed: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1280,1000"):
        options.add_argument(argument)
    driver = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


@pytest.fixture
def visitor(driver, demo_page):
    return Visitor(driver, demo_page.url)


def test_an_uploaded_picture_is_asked_about_and_the_answer_is_shown_whole(visitor, demo_page):
    image = demo_page.images[0]
    visitor.ask(PROMPT, image)
    assert visitor.wait_for_answer() == demo_page.predictor(image, PROMPT)
    assert len(visitor.all("#answers img")) == 1


def test_the_map_follows_the_choice_of_a_token_and_a_layer(visitor, demo_page):
    visitor.ask(PROMPT, demo_page.images[0])
    mean = visitor.map()
    labels = [label.text for label in visitor.all("#token label")]
    tokens = demo_page.predictor.look(demo_page.images[0], PROMPT).tokens
    assert labels == ["all", *(token.strip() for token in tokens)]
    visitor.click("#token label", 1)
    assert visitor.wait(lambda: visitor.map() != mean)


def test_the_answer_without_the_adapter_stands_beside_it(visitor, demo_page):
    image = demo_page.images[0]
    assert not visitor.all("#base-answers")
    visitor.click("#compare input")
    visitor.wait_for("#base-answers")
    visitor.ask(PROMPT, image)
    assert visitor.wait_for_answer() == demo_page.predictor(image, PROMPT)
    with switched_off(demo_page.predictor.model, demo_page.bridge):
        assert visitor.answers("base-answers") == [demo_page.predictor(image, PROMPT)]


def test_an_unreadable_image_is_named_and_the_question_can_be_corrected(visitor, demo_page, tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_bytes(demo_page.images[0].read_bytes()[:40])
    visitor.ask(PROMPT, broken)
    assert visitor.error().startswith("broken.png: not a readable image")
    assert visitor.answers() == [] and visitor.wait_for("#question textarea").get_property("value") == PROMPT


def test_the_decoding_options_that_are_left_empty_have_no_effect(visitor, demo_page):
    image = demo_page.images[0]
    visitor.click("#options button")
    longest = visitor.wait_for("#options textarea")
    longest.clear()
    longest.send_keys("3")
    visitor.ask(PROMPT, image)
    assert visitor.wait_for_answer() == demo_page.predictor(image, PROMPT, max_new_tokens=3)


def test_an_answer_can_be_stopped_and_another_question_asked(visitor, demo_page):
    image, model = demo_page.images[0], demo_page.predictor.model
    whole = demo_page.predictor(image, PROMPT)
    slow = model.lang_encoder.register_forward_pre_hook(lambda *_: time.sleep(0.5))
    try:
        visitor.ask(PROMPT, image)
        visitor.wait(visitor.answers)
        visitor.click("#question .stop-button")
        visitor.wait_for("#question .submit-button")
        stopped = visitor.answers()[-1]
    finally:
        slow.remove()
    assert whole.startswith(stopped) and stopped != whole
    visitor.ask("And now?")
    visitor.wait_for_answer()
    assert visitor.answers()[0] == stopped


def test_an_example_is_asked_with_a_click_and_a_new_dialogue_is_empty(visitor, demo_page):
    visitor.click(".gallery-item")
    visitor.wait_for("#question .thumbnail-item")
    visitor.click("#question .submit-button")
    assert visitor.wait_for_answer() == demo_page.predictor(demo_page.images[0], PROMPT)
    visitor.map()
    visitor.click("#clear")
    visitor.wait(lambda: not visitor.answers() and not visitor.all("#look img"))


@pytest.mark.skipif(not RUN, reason="DEMO_RUN is not set: it names the run that the picture is taken of")
def test_the_picture_of_the_readme_is_written(driver, tmp_path):
    run = Path(RUN)
    with served_demo(run, examples=examples_of(run, tmp_path), max_new_tokens=16) as page:
        visitor = Visitor(driver, page.url)
        visitor.click("#compare input")
        visitor.ask("Which digit is this?", DIGIT)
        visitor.wait_for_answer()
        visitor.map()
        PICTURE.parent.mkdir(exist_ok=True)
        driver.save_screenshot(str(PICTURE))
