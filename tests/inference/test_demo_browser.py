"""The demo's page in headless Chromium, driven by Selenium: upload, ask, read the answer, see the map.

Needs Selenium (`pip install selenium`) and Chromium with its driver (Debian: `apt-get install chromium
chromium-driver`). The picture in the README is written by

    DEMO_RUN=runs/quickstart pytest -m slow tests/inference/test_demo_browser.py -k picture

from the run that `flamingo-ft train recipes/quickstart.yaml` writes.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from flamingo_ft.adapters.switched_off import switched_off
from flamingo_ft.inference.demo.examples import examples_of

from .conftest import PROMPT, served_demo

pytestmark = pytest.mark.slow  # a browser starts, and the page takes seconds to load
pytest.importorskip("selenium", reason="Selenium is not installed: pip install selenium")

from selenium import webdriver  # noqa: E402
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.support.ui import WebDriverWait  # noqa: E402

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
RUN = os.environ.get("DEMO_RUN")
PICTURE = Path(__file__).parents[2] / "docs" / "demo.png"
LONGEST_WAIT = 60  # seconds


class Visitor:
    """What a person does on the page: every method acts on, or reads, what is visible."""

    def __init__(self, driver: webdriver.Chrome, url: str):
        self.driver = driver
        driver.get(url)
        self.wait_for("#question textarea")

    def all(self, selector: str) -> list:
        return [e for e in self.driver.find_elements(By.CSS_SELECTOR, selector) if e.is_displayed()]

    def wait(self, condition):
        return WebDriverWait(self.driver, LONGEST_WAIT, 0.05).until(lambda _: condition())

    def wait_for(self, selector: str):
        return self.wait(lambda: self.all(selector))[0]

    def upload(self, *files: Path) -> None:
        box = self.driver.find_element(By.CSS_SELECTOR, "#question input[type=file]")
        self.driver.execute_script("arguments[0].value = ''", box)  # the driver adds to an earlier choice
        box.send_keys("\n".join(map(str, files)))
        self.wait(lambda: len(self.all("#question .thumbnail-item")) == len(files))

    def ask(self, text: str, *files: Path) -> None:
        if files:
            self.upload(*files)
        self.wait_for("#question textarea").send_keys(text)
        self.wait_for("#question .submit-button").click()

    def wait_for_answer(self) -> str:
        """Wait until a question can be asked again, and return the answer that is shown then."""
        self.wait_for("#question .stop-button")
        self.wait_for("#question .submit-button")
        return self.answers()[-1]

    def answers(self, chat: str = "answers") -> list[str]:
        selector = f"#{chat} [data-testid=bot]"
        script = "return [...document.querySelectorAll(arguments[0])].map(e => e.textContent.trim())"
        return self.driver.execute_script(script, selector)  # in one step: the page changes meanwhile

    def map(self) -> str:
        return self.wait_for("#look img").get_property("src")

    def error(self) -> str:
        return self.wait_for("[data-testid=toast-text]").text


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
    visitor.all("#token label")[1].click()
    assert visitor.wait(lambda: visitor.map() != mean)


def test_the_answer_without_the_adapter_stands_beside_it(visitor, demo_page):
    image = demo_page.images[0]
    assert not visitor.all("#base-answers")
    visitor.wait_for("#compare input").click()
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


def test_an_answer_can_be_stopped_and_another_question_asked(visitor, demo_page):
    image = demo_page.images[0]
    visitor.wait_for("#options button").click()
    longest = visitor.wait_for("#options input")
    longest.clear()
    longest.send_keys("400")
    visitor.ask(PROMPT, image)
    visitor.wait(lambda: visitor.answers())
    visitor.wait_for("#question .stop-button").click()
    visitor.wait_for("#question .submit-button")
    stopped = visitor.answers()[-1]
    assert demo_page.predictor(image, PROMPT, max_new_tokens=400).startswith(stopped)
    visitor.ask("And now?")
    assert visitor.wait_for_answer() != stopped and len(visitor.answers()) == 2


def test_an_example_is_asked_with_a_click_and_a_new_dialogue_is_empty(visitor, demo_page):
    visitor.wait_for(".gallery-item").click()
    visitor.wait_for("#question .thumbnail-item")
    visitor.wait_for("#question .submit-button").click()
    assert visitor.wait_for_answer() == demo_page.predictor(demo_page.images[0], PROMPT)
    visitor.map()
    visitor.wait_for("#clear").click()
    visitor.wait(lambda: not visitor.answers() and not visitor.all("#look img"))


@pytest.mark.skipif(not RUN, reason="DEMO_RUN is not set: it names the run that the picture is taken of")
def test_the_picture_of_the_readme_is_written(driver):
    run = Path(RUN)
    with served_demo(run, examples=examples_of(run, run), max_new_tokens=16) as page:
        visitor = Visitor(driver, page.url)
        visitor.wait_for("#compare input").click()
        visitor.ask("Which digit is this?", run.parents[1] / "recipes/quickstart/images/0001.png")
        visitor.wait_for_answer()
        visitor.map()
        PICTURE.parent.mkdir(exist_ok=True)
        driver.save_screenshot(str(PICTURE))
