"""The page itself, in the machine's own Chromium, driven by Playwright.

with Browser() as browser:
    page = browser.open_as(host, account, "alice")
    page.ask("Hello")
    page.wait_finished()
    page.screenshot(path)
"""

import json
import os
import re
import shutil
from pathlib import Path
from types import TracebackType
from typing import Self
from urllib.parse import quote

import playwright.sync_api as playwright
import pytest

from tests.stack.host import Account, Api

NAMES = ("chromium", "chromium-browser", "google-chrome")
FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--no-proxy-server",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
TIMEOUT = 60.0
"""Seconds anything on the page may take when a test does not say."""
INPUT = "#chat-input"
REPLY = "#response-content-container"
STOP = "button[aria-label='Stop']"
COPY = ".copy-response-button"
STATUS = ".status-description"
STATUS_HISTORY = "button[aria-label='Toggle status history']"
DIALOG = "[role='dialog']"


def require(*names: str) -> str:
    """The path of the first of these programs that is installed.

    When none is, the test is skipped; where `CI` is set it fails instead.
    """
    found = next(filter(None, map(shutil.which, names)), None)
    if found:
        return found
    reason = f"not installed: {' or '.join(names)}"
    if os.environ.get("CI"):
        pytest.fail(reason)
    pytest.skip(reason)


class OpenPage:
    """One signed-in tab; `.tab` is Playwright's own page for everything else."""

    def __init__(self, tab: playwright.Page):
        self.tab = tab
        self.errors: list[str] = []
        tab.on("pageerror", lambda error: self.errors.append(str(error)))

    def wait_ready(self, timeout: float = TIMEOUT) -> None:
        """Return when the input can be typed into."""
        self.tab.wait_for_selector(INPUT, timeout=timeout * 1000)

    def ask(self, text: str) -> None:
        """Type a question and send it; returns when its answer's place is there."""
        answers = self.tab.locator(REPLY).count()
        self.tab.click(INPUT)
        self.tab.keyboard.insert_text(text)
        self.tab.click("#send-message-button")
        self.tab.locator(REPLY).nth(answers).wait_for(
            state="attached", timeout=TIMEOUT * 1000
        )

    def wait_text(self, text: str, timeout: float = TIMEOUT) -> None:
        """Return when the last answer contains this text."""
        last = self.tab.locator(REPLY).last
        playwright.expect(last).to_contain_text(text, timeout=timeout * 1000)

    def wait_status(self, text: str, timeout: float = TIMEOUT) -> None:
        """Return when the status line above the last answer contains this text."""
        last = self.tab.locator(STATUS).last
        playwright.expect(last).to_contain_text(text, timeout=timeout * 1000)

    def status_history(self) -> list[str]:
        """All status lines of the last answer, oldest first; folds them out."""
        self.tab.locator(STATUS_HISTORY).last.click()
        shown = self.tab.locator(STATUS)
        playwright.expect(shown.nth(1)).to_be_visible()
        return shown.all_inner_texts()[1:]

    def wait_finished(self, timeout: float = TIMEOUT) -> None:
        """Return when the answer is done: its buttons are there and Stop is gone."""
        deadline = timeout * 1000
        answers = self.tab.locator(REPLY)
        playwright.expect(self.tab.locator(STOP)).to_have_count(0, timeout=deadline)
        finished = self.tab.locator(COPY)
        playwright.expect(finished).to_have_count(answers.count(), timeout=deadline)

    def stop(self) -> None:
        """Press Stop."""
        self.tab.click(STOP)

    def reload(self) -> None:
        """Load the page again, as a user would."""
        self.tab.reload()
        self.wait_ready()
        self.tab.locator(REPLY).last.wait_for(state="attached")

    def reply_text_after_reload(self) -> str:
        """Load the page again, and read the last answer once it is all there."""
        self.reload()
        self.wait_finished()
        return self.visible_reply_text()

    def visible_reply_text(self) -> str:
        """The last answer as a reader sees it, without what is folded away."""
        return self.tab.locator(REPLY).last.inner_text()

    def visible_text(self) -> str:
        """Everything on the page as a reader sees it."""
        return self.tab.locator("body").inner_text()

    def screenshot(self, path: Path) -> Path:
        """Save what the window shows as a PNG, with everything faded in."""
        path.parent.mkdir(parents=True, exist_ok=True)
        self.tab.screenshot(path=path, animations="disabled")
        return path

    def open_valves(self) -> "ValvesPanel":
        """Open one's own valves, with the button beside the input."""
        self.tab.get_by_label("Valves", exact=True).click()
        return ValvesPanel(self.tab)

    def close(self) -> None:
        """Close the tab and forget its session."""
        self.tab.context.close()


class ValvesPanel:
    """The dialog in which somebody sets valves, their own or the administrator's."""

    def __init__(self, tab: playwright.Page):
        self.tab = tab
        self._form = tab.locator(f"{DIALOG} form")
        self._form.get_by_role(
            "button", name=re.compile("Default|Custom")
        ).first.wait_for()

    def field(self, title: str) -> playwright.Locator:
        """A field's part of the form, by its title."""
        named = self.tab.get_by_text(title, exact=True)
        return self._form.locator("div.w-full.py-0\\.5").filter(has=named)

    def change(self, title: str) -> playwright.Locator:
        """Switch a field from its default to a value of its own; gives the field."""
        field = self.field(title)
        field.get_by_role("button", name="Default").click()
        return field

    def fill(self, title: str, value: str) -> None:
        """Type a value."""
        self.change(title).get_by_placeholder(title).fill(value)

    def tick(self, title: str, *options: str) -> None:
        """Tick options of a multi-select, in this order."""
        opener = self.change(title).get_by_label("Select options")
        opener.click()
        for option in options:
            self.tab.get_by_role("button", name=option, exact=True).click()
        opener.click()

    def save(self) -> None:
        """Save, see that it was, and close."""
        self._form.get_by_role("button", name="Save", exact=True).click()
        self.tab.get_by_text("Valves updated successfully").last.wait_for()
        self.tab.locator(DIALOG).get_by_label("Close", exact=True).click()
        self._form.wait_for(state="hidden")


class Browser:
    """A headless Chromium; a context manager that ends it."""

    def __init__(self, width: int = 1280, height: int = 900):
        self.size = playwright.ViewportSize(width=width, height=height)
        self.executable = require(*NAMES)

    def __enter__(self) -> Self:
        self._driver = playwright.sync_playwright().start()
        try:
            self._chromium = self._driver.chromium.launch(
                executable_path=self.executable, args=list(FLAGS)
            )
        except BaseException:
            self._driver.stop()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._chromium.close()
        self._driver.stop()

    def open_as(
        self,
        host: Api,
        account: Account | None,
        model: str | None = None,
        *,
        chat_id: str | None = None,
    ) -> OpenPage:
        """A tab of its own for this account, on a new chat or on a stored one.

        Without an account nobody is signed in.
        """
        context = self._chromium.new_context(
            viewport=self.size, locale="en-US", reduced_motion="reduce"
        )
        store = {"locale": "en-US", **({"token": account.token} if account else {})}
        for name, value in store.items():
            script = f"localStorage.setItem({json.dumps(name)}, {json.dumps(value)})"
            context.add_init_script(script)
        path = f"/c/{chat_id}" if chat_id else "/"
        query = f"?models={quote(model)}" if model else ""
        page = OpenPage(context.new_page())
        page.tab.goto(f"{host.url}{path}{query}")
        page.wait_ready()
        return page
