"""Setting it up: valves of a user, valves of the administrator, pasting the file."""

from playwright.async_api import Page as Tab
from playwright.async_api import expect

from tests.browser.scene import Scene
from tests.conftest import FUNCTION, FUNCTION_ID
from tests.stack.browser import OpenPage, ValvesPanel
from tests.stack.host import Account, OpenWebUI

PASTED = "pasted_conversation"


async def open_functions(page: OpenPage) -> Tab:
    """Go to Admin -> Functions."""
    await page.tab.goto(f"{page.tab.url.split('?')[0].rstrip('/')}/admin/functions")
    return page.tab


async def test_a_user_chooses_participants_by_clicking(scene: Scene) -> None:
    account = scene.person("Vera")
    page = await scene.open(account)
    panel = await page.open_valves()
    await panel.tick("Participants", "thinker", "bob")
    await panel.fill("Rounds", "1")
    await scene.snap(page, "15-valves")
    await panel.save()
    await page.ask("Is tea better than coffee?")
    await page.wait_finished()
    shown = await page.visible_reply_text()
    assert shown.index("🔵 thinker") < shown.index("🔴 bob")
    await page.wait_status("Finished after 1 round · 2 turns")
    await page.open_valves()
    await expect(page.tab.get_by_label("Select options")).to_have_text("bob, thinker")


async def test_the_administrators_valves_are_saved(
    scene: Scene, admin: Account, host: OpenWebUI
) -> None:
    page = await scene.open(admin)
    tab = await open_functions(page)
    row = tab.get_by_text("Multi-Model Conversation", exact=True)
    await row.wait_for()
    await tab.get_by_label("Valves", exact=True).first.click()
    panel = await ValvesPanel.of(tab)
    await panel.tick("Participants", "dave", "erin")
    await panel.fill("Rounds", "1")
    await panel.fill("Turn Timeout", "450")
    await panel.save()
    try:
        path = f"/api/v1/functions/id/{FUNCTION_ID}/valves"
        stored = host.request("GET", path)
        assert stored["participants"] == ["dave", "erin"]
        assert (stored["rounds"], stored["turn_timeout"]) == (1, 450)
        visitor = await scene.join("Vito")
        await visitor.ask("Which of you is here?")
        await visitor.wait_finished()
        shown = await visitor.visible_reply_text()
        assert "🔵 dave" in shown and "🔴 erin" in shown and "alice" not in shown
    finally:
        host.set_valves(FUNCTION_ID, {})
    await tab.get_by_label("Valves", exact=True).first.click()
    await ValvesPanel.of(tab)
    await scene.snap(page, "16-admin-valves")


async def test_the_pasted_file_is_saved_unchanged(
    scene: Scene, admin: Account, host: OpenWebUI
) -> None:
    source = FUNCTION.read_text("utf-8")
    page = await scene.open(admin)
    tab = page.tab
    await tab.context.grant_permissions(["clipboard-read", "clipboard-write"])
    await open_functions(page)
    await tab.goto(f"{tab.url}/create")
    await tab.locator(".cm-content").click()
    await tab.keyboard.press("Control+A")
    await tab.evaluate("text => navigator.clipboard.writeText(text)", source)
    await tab.keyboard.press("Control+V")
    name = tab.get_by_placeholder("Function Name")
    await expect(name).to_have_value("Multi Model Conversation")
    await tab.get_by_placeholder("Function ID").fill(PASTED)
    await tab.get_by_role("button", name="Save & Create").click()
    await tab.get_by_role("button", name="Confirm").click()
    await tab.get_by_text("Function created successfully").wait_for()
    try:
        stored = host.request("GET", f"/api/v1/functions/id/{PASTED}")
        assert stored["content"] == source
        assert (stored["type"], stored["is_active"]) == ("pipe", False)
    finally:
        host.request("DELETE", f"/api/v1/functions/id/{PASTED}/delete")
