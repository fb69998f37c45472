"""People in front of the page."""

from itertools import count
from pathlib import Path

from tests.conftest import FUNCTION_ID
from tests.stack.browser import Browser, OpenPage
from tests.stack.host import Account, OpenWebUI

ROUND_ROBIN = f"{FUNCTION_ID}.round_robin"
MANAGER = f"{FUNCTION_ID}.manager"
COUNCIL = f"{FUNCTION_ID}.council"
DEBATE = f"{FUNCTION_ID}.debate"

_numbers = count(1)


class Scene:
    """What most tests need: somebody new, their page, and pictures of it."""

    def __init__(self, host: OpenWebUI, browser: Browser, pictures: Path):
        self.host = host
        self.pages: list[OpenPage] = []
        self._browser = browser
        self._pictures = pictures

    def person(self, name: str, **valves: object) -> Account:
        """Somebody new who is no administrator, with these valves of their own."""
        account = self.host.add_user(f"{name} {next(_numbers)}")
        if valves:
            self.host.set_user_valves(account, FUNCTION_ID, valves)
        return account

    async def open(self, account: Account, model: str | None = ROUND_ROBIN) -> OpenPage:
        """A page for this account, on a new chat; closed when the test ends."""
        self.pages.append(await self._browser.open_as(self.host, account, model))
        return self.pages[-1]

    async def join(
        self, name: str, model: str = ROUND_ROBIN, **valves: object
    ) -> OpenPage:
        """A page for somebody new with these valves."""
        return await self.open(self.person(name, **valves), model)

    async def snap(self, page: OpenPage, name: str) -> None:
        """Keep a picture of what the window shows."""
        await page.screenshot(self._pictures / f"{name}.png")
