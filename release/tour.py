"""`make tour`: the pictures and the animation of docs/tour.md, taken of the demo.

Nothing in them is drawn by hand: the demo's Open WebUI, its scripted speakers, and
Chromium. They go to docs/tour/.
"""

import asyncio
import os
from collections.abc import Awaitable, Callable
from contextlib import ExitStack
from dataclasses import dataclass
from io import BytesIO
from time import monotonic

from PIL import Image
from playwright.async_api import Locator

from tests.stack.browser import REPLY, STATUS, STOP, Browser, OpenPage
from tests.stack.demo import COUNCIL, FUNCTION_ID, ROOT, furnish, start_host
from tests.stack.host import OpenWebUI

PLACE = ROOT / "docs" / "tour"
QUESTION = "Should our small team rewrite the old billing system?"
WIDE = (1280, 860)
PHONE = (390, 844)
FILM = (960, 646)
FRAME = 0.5
"""Seconds between two frames of the animation."""
SPEED = 1.5
"""How much faster than it happened the animation runs."""
SMALLER = (800, 538)
"""What the animation's frames become."""
TEAM = """\
Optimist | ada   | You look for what could work, and make it concrete.
Sceptic  | grace | You look for what could go wrong. You are fair about it.
Engineer |       | You count the cost in hours."""


@dataclass(frozen=True, slots=True)
class Stage:
    """The demo, and a window on it."""

    host: OpenWebUI
    browser: Browser

    async def open(
        self, model: str, *, size: tuple[int, int] = WIDE, dark: bool = False
    ) -> OpenPage:
        """A new chat with this model."""
        page = await self.browser.open_as(self.host, self.host.admin, model)
        await page.tab.set_viewport_size({"width": size[0], "height": size[1]})
        if dark:
            await again_with(page, theme="dark")
        return page


async def again_with(page: OpenPage, **stored: str) -> None:
    """Load the page again, with these things in the browser's own storage."""
    lines = (f"localStorage.setItem({k!r}, {v!r})" for k, v in stored.items())
    await page.tab.add_init_script("; ".join(lines))
    await page.tab.reload()


async def keep(page: OpenPage, name: str) -> None:
    """Save what the window shows."""
    png = await page.tab.screenshot(animations="disabled")
    Image.open(BytesIO(png)).save(PLACE / f"{name}.webp", quality=82, method=6)
    print(f"docs/tour/{name}.webp", flush=True)


async def scroll_to(shown: Locator) -> None:
    """Put something of the page at its top, below the host's own line."""
    await shown.evaluate("at => at.style.scrollMarginTop = '6rem'")
    await shown.evaluate("at => at.scrollIntoView({block: 'start'})")


def mode(name: str) -> str:
    """The id of one of the four models."""
    return f"{FUNCTION_ID}.{name}"


# -- the pictures, in their order ------------------------------------------------------


async def picker(stage: Stage) -> None:
    """The four models, teams, and what one of them is for."""
    page = await stage.open(mode("council"))
    await page.tab.click("#model-selector-model-button")
    row = page.tab.locator(f"[role='option'][data-value='{mode('round_robin')}']")
    await row.locator("svg").first.hover()
    await page.tab.locator(".tippy-box").first.wait_for()
    await keep(page, "01-picker")


async def in_turns(stage: Stage) -> None:
    """The end of a Round Robin, and what may be asked next."""
    page = await stage.open(mode("round_robin"))
    await page.ask(QUESTION)
    await page.wait_finished()
    chip = page.tab.get_by_text("/rounds 1 Take up what was said.")
    await chip.wait_for()
    await chip.evaluate("at => at.scrollIntoView({block: 'center'})")
    await keep(page, "02-round-robin")


async def managed(stage: Stage) -> None:
    """Manager, with its reasons in the status line's history."""
    page = await stage.open(mode("manager"))
    await page.ask(QUESTION)
    await page.wait_finished()
    await page.status_history()
    await scroll_to(page.tab.locator(STATUS).first)
    await keep(page, "03-manager")


async def have_a_say(stage: Stage) -> None:
    """The card above the input, after a round in which the person has a seat."""
    page = await stage.open(mode("round_robin"))
    await page.ask(f"/join {QUESTION}")
    await page.tab.get_by_text("Anything to add?").wait_for()
    await keep(page, "04-have-a-say")
    await page.close()


async def council(stage: Stage) -> None:
    """What a council comes to."""
    page = await stage.open(COUNCIL)
    await page.ask(QUESTION)
    await page.wait_finished()
    await scroll_to(page.tab.locator(REPLY).last)
    await keep(page, "05-council")


async def debate(stage: Stage) -> None:
    """A debate's conclusion, votes and rounds."""
    page = await stage.open(mode("debate"), dark=True)
    await page.ask(QUESTION)
    await page.wait_finished()
    await scroll_to(page.tab.locator(REPLY).last)
    await keep(page, "06-debate")


async def team(stage: Stage) -> None:
    """A ready-made team, before anything is asked."""
    page = await stage.open("pros-and-cons")
    await page.tab.get_by_text("Should we do it?").wait_for()
    await keep(page, "07-team")


async def valves(stage: Stage) -> None:
    """One's own settings, with a team."""
    page = await stage.open(mode("round_robin"))
    panel = await page.open_valves()
    await panel.fill("Team", TEAM)
    box = panel.field("Team").locator("textarea")
    await box.evaluate("box => box.style.height = '8rem'")
    await keep(page, "08-valves")


async def on_a_phone(stage: Stage) -> None:
    """A council on a phone, in the dark."""
    page = await stage.open(COUNCIL, size=PHONE, dark=True)
    await page.ask(QUESTION)
    await page.wait_finished()
    await scroll_to(page.tab.locator(REPLY).last)
    await keep(page, "09-phone")


async def in_german(stage: Stage) -> None:
    """The administrator's settings in another language."""
    page = await stage.open(mode("council"))
    await again_with(page, locale="de-DE")
    await page.tab.goto(f"{stage.host.url}/admin/functions")
    await page.tab.locator("button[aria-label='Valves']").first.click()
    await page.tab.get_by_text("Teilnehmer", exact=True).wait_for()
    await keep(page, "10-german")


PICTURES: tuple[Callable[[Stage], Awaitable[None]], ...] = (
    picker,
    in_turns,
    managed,
    have_a_say,
    council,
    debate,
    team,
    valves,
    on_a_phone,
    in_german,
)


# -- the animation ---------------------------------------------------------------------


async def film(stage: Stage) -> None:
    """A council from its question to its conclusion."""
    page = await stage.open(COUNCIL, size=FILM)
    await page.ask(QUESTION)
    frames: list[tuple[float, bytes]] = []
    done = False
    while not done:
        done = not await page.tab.locator(STOP).count()
        frames.append((monotonic(), await page.tab.screenshot(animations="disabled")))
        await asyncio.sleep(FRAME - (monotonic() - frames[-1][0]) % FRAME)
    await scroll_to(page.tab.locator(REPLY).last)
    frames.append((monotonic(), await page.tab.screenshot(animations="disabled")))
    times = [at for at, _ in frames]
    lasting = [(b - a) / SPEED for a, b in zip(times, times[1:], strict=False)]
    taken = (Image.open(BytesIO(png)).convert("RGB") for _, png in frames)
    pictures = [each.resize(SMALLER, Image.Resampling.LANCZOS) for each in taken]
    pictures[0].save(
        PLACE / "council.webp",
        save_all=True,
        append_images=pictures[1:],
        duration=[round(1000 * each) for each in (*lasting, 5.0)],
        loop=0,
        quality=70,
        method=4,
    )
    print("docs/tour/council.webp", len(frames), "frames", flush=True)


async def take(host: OpenWebUI) -> None:
    """All of them, or those that `ONLY` names; the film alone, for its pace."""
    only = os.environ.get("ONLY", "").split()
    PLACE.mkdir(exist_ok=True)
    async with Browser() as browser:
        stage = Stage(host, browser)
        for picture in (*PICTURES, film):
            if not only or picture.__name__ in only:
                await picture(stage)


def main() -> None:
    """Start the demo, take the pictures, and end it."""
    os.environ["PORT"] = "0"
    for name in ("OPENAI_API_BASE_URL", "OPENAI_API_KEY"):
        os.environ.pop(name, None)  # scripted speakers: the same words every time
    with ExitStack() as stack:
        host = start_host(stack)
        furnish(host)
        asyncio.run(take(host))


if __name__ == "__main__":
    main()
