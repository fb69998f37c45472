"""The page itself, in the machine's own Chromium, driven by Playwright.

async with Browser() as browser:
    page = await browser.open_as(host, account, "alice")
    await page.ask("Hello")
    await page.wait_finished()
    await page.screenshot(path)
"""

import asyncio
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NoReturn, Self
from urllib.parse import quote

import playwright.async_api as playwright
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


def find_chromium(driver: playwright.Playwright) -> str | None:
    """The path of the machine's Chromium, else of the one Playwright installed."""
    paths = map(shutil.which, (*NAMES, driver.chromium.executable_path))
    return next(filter(None, paths), None)


def missing(reason: str) -> NoReturn:
    """Skip the test; where `CI` is set, fail it."""
    if os.environ.get("CI"):
        pytest.fail(reason)
    pytest.skip(reason)


class OpenPage:
    """One signed-in tab; `.tab` is Playwright's own page for everything else."""

    def __init__(self, tab: playwright.Page):
        self.tab = tab
        self.errors: list[str] = []
        tab.on("pageerror", self._note)

    def _note(self, error: playwright.Error) -> None:
        # Beside HTML code the page draws it, in a frame so well shut off that its own
        # script fails to listen to it.
        if "cross-origin frame" not in str(error):
            self.errors.append(str(error))

    async def wait_ready(self, timeout: float = TIMEOUT) -> None:
        """Return when the input can be typed into."""
        await self.tab.wait_for_selector(INPUT, timeout=timeout * 1000)

    async def ask(self, text: str) -> None:
        """Type a question and send it; returns when its answer's place is there."""
        answers = await self.tab.locator(REPLY).count()
        await self.tab.click(INPUT)
        await self.tab.keyboard.insert_text(text)
        await self.tab.click("#send-message-button")
        await (
            self.tab.locator(REPLY)
            .nth(answers)
            .wait_for(state="attached", timeout=TIMEOUT * 1000)
        )

    async def wait_text(self, text: str, timeout: float = TIMEOUT) -> None:
        """Return when the last answer contains this text."""
        last = self.tab.locator(REPLY).last
        await playwright.expect(last).to_contain_text(text, timeout=timeout * 1000)

    async def wait_status(self, text: str, timeout: float = TIMEOUT) -> None:
        """Return when the status line above the last answer contains this text."""
        last = self.tab.locator(STATUS).last
        await playwright.expect(last).to_contain_text(text, timeout=timeout * 1000)

    async def status_history(self) -> list[str]:
        """All status lines of the last answer, oldest first; folds them out."""
        await self.tab.locator(STATUS_HISTORY).last.click()
        shown = self.tab.locator(STATUS)
        await playwright.expect(shown.nth(1)).to_be_visible()
        return (await shown.all_inner_texts())[1:]

    async def wait_finished(self, timeout: float = TIMEOUT) -> None:
        """Return when the answer is done: its buttons are there and Stop is gone."""
        tab, deadline = self.tab, timeout * 1000
        answers = await tab.locator(REPLY).count()
        await playwright.expect(tab.locator(STOP)).to_have_count(0, timeout=deadline)
        finished = playwright.expect(tab.locator(COPY))
        await finished.to_have_count(answers, timeout=deadline)

    async def stop(self) -> None:
        """Press Stop."""
        await self.tab.click(STOP)

    async def reload(self) -> None:
        """Load the page again, as a user would."""
        await self.tab.reload()
        await self.wait_ready()
        await self.tab.locator(REPLY).last.wait_for(state="attached")

    async def reply_text_after_reload(self) -> str:
        """Load the page again, and read the last answer once it is all there."""
        await self.reload()
        await self.wait_finished()
        return await self.visible_reply_text()

    async def visible_reply_text(self) -> str:
        """The last answer as a reader sees it, without what is folded away."""
        return await self.tab.locator(REPLY).last.inner_text()

    async def visible_text(self) -> str:
        """Everything on the page as a reader sees it."""
        return await self.tab.locator("body").inner_text()

    async def screenshot(self, path: Path) -> Path:
        """Save what the window shows as a PNG, with everything faded in."""
        path.parent.mkdir(parents=True, exist_ok=True)
        await self.tab.screenshot(path=path, animations="disabled")
        return path

    async def open_valves(self) -> "ValvesPanel":
        """Open one's own valves, with the button beside the input."""
        await self.tab.get_by_label("Valves", exact=True).click()
        return await ValvesPanel.of(self.tab)

    async def close(self) -> None:
        """Close the tab and forget its session."""
        await self.tab.context.close()


class ValvesPanel:
    """The dialog in which somebody sets valves, their own or the administrator's."""

    def __init__(self, tab: playwright.Page):
        self.tab = tab
        self._form = tab.locator(f"{DIALOG} form")

    @classmethod
    async def of(cls, tab: playwright.Page) -> Self:
        """The dialog that is opening; returns when it can be filled in."""
        panel = cls(tab)
        fields = panel._form.get_by_role("button", name=re.compile("Default|Custom"))
        await fields.first.wait_for()
        return panel

    def field(self, title: str) -> playwright.Locator:
        """A field's part of the form, by its title."""
        named = self.tab.get_by_text(title, exact=True)
        return self._form.locator("div.w-full.py-0\\.5").filter(has=named)

    async def change(self, title: str) -> playwright.Locator:
        """Switch a field from its default to a value of its own; gives the field."""
        field = self.field(title)
        await field.get_by_role("button", name="Default").click()
        return field

    async def fill(self, title: str, value: str) -> None:
        """Type a value."""
        field = await self.change(title)
        await field.get_by_placeholder(title).fill(value)

    async def tick(self, title: str, *options: str) -> None:
        """Tick options of a multi-select, in this order."""
        opener = (await self.change(title)).get_by_label("Select options")
        await opener.click()
        for option in options:
            await self.tab.get_by_role("button", name=option, exact=True).click()
        await opener.click()

    async def save(self) -> None:
        """Save, see that it was, and close."""
        await self._form.get_by_role("button", name="Save", exact=True).click()
        await self.tab.get_by_text("Valves updated successfully").last.wait_for()
        await self.tab.locator(DIALOG).get_by_label("Close", exact=True).click()
        await self._form.wait_for(state="hidden")


class Browser:
    """A headless Chromium; a context manager that ends it."""

    def __init__(self, width: int = 1280, height: int = 900):
        self.size = playwright.ViewportSize(width=width, height=height)

    async def __aenter__(self) -> Self:
        self._driver = await playwright.async_playwright().start()
        try:
            path = find_chromium(self._driver)
            if not path:
                missing(f"not installed: {', '.join(NAMES)} or Playwright's own")
            self._chromium = await self._driver.chromium.launch(
                executable_path=path, args=list(FLAGS)
            )
        except BaseException:
            await self._driver.stop()
            raise
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self._chromium.close()
        await self._driver.stop()

    async def open_as(
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
        context = await self._chromium.new_context(
            viewport=self.size, locale="en-US", reduced_motion="reduce"
        )
        store = {"locale": "en-US", **({"token": account.token} if account else {})}
        setting = f"Object.assign(localStorage, {json.dumps(store)})"
        await context.add_init_script(f"if (window === top) {setting}")
        path = f"/c/{chat_id}" if chat_id else "/"
        query = f"?models={quote(model)}" if model else ""
        page = OpenPage(await context.new_page())
        await page.tab.goto(f"{host.url}{path}{query}")
        await page.wait_ready()
        return page


async def is_there() -> bool:
    """Whether there is a Chromium that tests can use."""
    async with playwright.async_playwright() as driver:
        return bool(find_chromium(driver))


if __name__ == "__main__":
    if not asyncio.run(is_there()):
        print("No Chromium here; trying Playwright's own", flush=True)
        subprocess.run([sys.executable, "-m", "playwright", "install", "chromium"])
