"""Setting it up: valves of a user, valves of the administrator, pasting the file."""

from playwright.sync_api import Page as Tab
from playwright.sync_api import expect

from tests.browser.scene import Scene
from tests.conftest import FUNCTION, FUNCTION_ID
from tests.stack.browser import OpenPage, ValvesPanel
from tests.stack.host import Account, OpenWebUI

PASTED = "pasted_conversation"


def open_functions(page: OpenPage) -> Tab:
    """Go to Admin -> Functions."""
    page.tab.goto(f"{page.tab.url.split('?')[0].rstrip('/')}/admin/functions")
    return page.tab


def test_a_user_chooses_participants_by_clicking(scene: Scene) -> None:
    account = scene.person("Vera")
    page = scene.open(account)
    panel = page.open_valves()
    panel.tick("Participants", "thinker", "bob")
    panel.fill("Rounds", "1")
    scene.snap(page, "15-valves")
    panel.save()
    page.ask("Is tea better than coffee?")
    page.wait_finished()
    shown = page.visible_reply_text()
    assert shown.index("🔵 thinker") < shown.index("🔴 bob")
    page.wait_status("Finished after 1 round · 2 turns")
    page.open_valves()
    expect(page.tab.get_by_label("Select options")).to_have_text("bob, thinker")


def test_the_administrators_valves_are_saved(
    scene: Scene, admin: Account, host: OpenWebUI
) -> None:
    page = scene.open(admin)
    tab = open_functions(page)
    row = tab.get_by_text("Multi-Model Conversation", exact=True)
    row.wait_for()
    tab.get_by_label("Valves", exact=True).first.click()
    panel = ValvesPanel(tab)
    panel.tick("Participants", "dave", "erin")
    panel.fill("Rounds", "1")
    panel.fill("Silence timeout (s)", "45")
    panel.save()
    try:
        path = f"/api/v1/functions/id/{FUNCTION_ID}/valves"
        stored = host.request("GET", path)
        assert stored["participants"] == ["dave", "erin"]
        assert (stored["rounds"], stored["silence_timeout"]) == (1, 45)
        visitor = scene.join("Vito")
        visitor.ask("Which of you is here?")
        visitor.wait_finished()
        shown = visitor.visible_reply_text()
        assert "🔵 dave" in shown and "🔴 erin" in shown and "alice" not in shown
    finally:
        host.set_valves(FUNCTION_ID, {})
    tab.get_by_label("Valves", exact=True).first.click()
    ValvesPanel(tab)
    scene.snap(page, "16-admin-valves")


def test_the_pasted_file_is_saved_unchanged(
    scene: Scene, admin: Account, host: OpenWebUI
) -> None:
    source = FUNCTION.read_text("utf-8")
    page = scene.open(admin)
    tab = page.tab
    tab.context.grant_permissions(["clipboard-read", "clipboard-write"])
    open_functions(page)
    tab.goto(f"{tab.url}/create")
    tab.locator(".cm-content").click()
    tab.keyboard.press("Control+A")
    tab.evaluate("text => navigator.clipboard.writeText(text)", source)
    tab.keyboard.press("Control+V")
    name = tab.get_by_placeholder("Function Name")
    expect(name).to_have_value("Multi Model Conversation")
    tab.get_by_placeholder("Function ID").fill(PASTED)
    tab.get_by_role("button", name="Save & Create").click()
    tab.get_by_role("button", name="Confirm").click()
    tab.get_by_text("Function created successfully").wait_for()
    try:
        stored = host.request("GET", f"/api/v1/functions/id/{PASTED}")
        assert stored["content"] == source
        assert (stored["type"], stored["is_active"]) == ("pipe", False)
    finally:
        host.request("DELETE", f"/api/v1/functions/id/{PASTED}/delete")
