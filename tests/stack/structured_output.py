"""How the page keeps a message's `output`: a port of its `structuredOutput.ts`.

Of Open WebUI 0.12.4, function by function and with the same corner cases, so that a
test sees exactly the items, and the text, that the page would have.
"""

from collections.abc import Callable
from typing import Any

Item = dict[str, Any]
Output = list[Item]


def part_text(part: Item | None) -> str:
    """The text of one content part, as the page prints it."""
    text = (part or {}).get("text")
    return "" if text is None else str(text)


def parts_text(parts: list[Item] | None) -> str:
    """The text of all content parts."""
    return "".join(part_text(part) for part in parts or [])


def get_output_text(output: Output | None) -> str:
    """What the page copies, reads aloud and stores as a message's `content`."""
    messages = [item for item in output or [] if item and item.get("type") == "message"]
    texts = [parts_text(item.get("content")) for item in messages]
    return "\n".join(text for text in texts if text.strip())


def append_delta(current: Any, delta: Any) -> Any:
    """`current` grown by `delta`: texts are joined, objects merged."""
    if isinstance(current, str) or isinstance(delta, str):
        return ("" if current is None else str(current)) + (
            "" if delta is None else str(delta)
        )
    if isinstance(current, dict) and isinstance(delta, dict):
        return {**current, **delta}
    if delta is not None:
        return delta
    return "" if current is None else current


def ensure_item(output: Output, index: int, fallback: Item) -> Item:
    """A fresh copy of item `index`, made when missing, already put in its place."""
    while len(output) <= index:
        filler = {
            "type": "message",
            "status": "in_progress",
            "role": "assistant",
            "content": [],
        }
        output.append(dict(fallback) if len(output) == index else filler)
    output[index] = dict(output[index])
    return output[index]


def ensure_part(parts: list[Item], index: int, fallback: Item | None = None) -> Item:
    """A fresh copy of part `index`, made when missing, already put in its place."""
    while len(parts) <= index:
        parts.append(fallback or {"type": "output_text", "text": ""})
    parts[index] = dict(parts[index])
    return parts[index]


def set_part(
    parts: list[Item], index: int, part: Item, fallback: Item | None = None
) -> None:
    """Put `part` at `index`, without a hole before it."""
    ensure_part(parts, index, fallback)
    parts[index] = part


def find_item(output: Output, item: Item) -> int:
    """Where an item with the same id, or the same call, is; -1 when nowhere."""
    for index, existing in enumerate(output):
        same_id = item.get("id") and existing.get("id") == item["id"]
        same_call = (
            item.get("call_id")
            and existing.get("type") == item.get("type")
            and existing.get("call_id") == item["call_id"]
        )
        if same_id or same_call:
            return index
    return -1


def index_of(output: Output, event: Item) -> int:
    """Which item an event is about: by `item_id` first, then by `output_index`."""
    wanted = event.get("item_id")
    for index, item in enumerate(output if wanted else []):
        if item.get("id") == wanted or item.get("call_id") == wanted:
            return index
    given = event.get("output_index")
    return max(len(output) - 1, 0) if given is None else int(given)


def complete(output: Output, event: Item) -> Output:
    """Apply `response.completed`: its items replace or follow the ones there."""
    result = list(output)
    for item in (event.get("response") or {}).get("output") or []:
        index = find_item(result, item)
        if index >= 0:
            result[index] = item
        else:
            result.append(item)
    return result


def place_item(output: Output, event: Item) -> Output:
    """Apply `response.output_item.added` and `.done`."""
    if not event.get("item"):
        return output
    result, item = list(output), dict(event["item"])
    existing, index = find_item(result, item), index_of(output, event)
    if existing >= 0:
        result[existing] = item
    elif index >= len(result):
        result.append(item)
    elif event["type"] == "response.output_item.added":
        result.insert(index, item)
    else:
        result[index] = item
    return result


def part_added(item: Item, event: Item) -> None:
    """Apply `response.content_part.added` to its item."""
    if item.get("type") == "reasoning" or not event.get("part"):
        return
    item["content"] = list(item.get("content") or [])
    index = event.get("content_index")
    index = len(item["content"]) if index is None else index
    set_part(item["content"], index, dict(event["part"]))


def summary_parts(item: Item) -> list[Item]:
    """The item's summary as a fresh list, already put in its place."""
    summary = item.get("summary")
    item["summary"] = list(summary) if isinstance(summary, list) else []
    parts: list[Item] = item["summary"]
    return parts


def summary_part_added(item: Item, event: Item) -> None:
    """Apply `response.reasoning_summary_part.added` to its item."""
    if not event.get("part"):
        return
    parts = summary_parts(item)
    index = event.get("summary_index")
    index = len(parts) if index is None else index
    set_part(parts, index, dict(event["part"]), {"type": "summary_text", "text": ""})


def delta_added(item: Item, event: Item) -> None:
    """Apply any `response.*.delta` to its item."""
    kind, delta = event["type"].split(".")[1], event.get("delta")
    if kind == "function_call_arguments":
        item["arguments"] = append_delta(item.get("arguments") or "", delta)
    elif kind == "reasoning_summary_text":
        part = ensure_part(
            summary_parts(item),
            event.get("summary_index") or 0,
            {"type": "summary_text", "text": ""},
        )
        part["text"] = append_delta(part.get("text") or "", delta)
    elif item.get("type") == "open_webui:code_interpreter":
        item["code"] = append_delta(item.get("code") or "", delta or "")
    else:
        key = "text" if kind in ("output_text", "reasoning_text") else kind
        item["content"] = list(item.get("content") or [])
        part = ensure_part(item["content"], event.get("content_index") or 0)
        part[key] = append_delta(part.get(key), delta)


def part_done(item: Item, event: Item) -> None:
    """Apply any `response.*.done` but an item's to its item."""
    kind = event["type"].split(".")[1]
    if kind == "content_part" and event.get("part"):
        item["content"] = list(item.get("content") or [])
        index = event.get("content_index")
        index = max(len(item["content"]) - 1, 0) if index is None else index
        set_part(item["content"], index, dict(event["part"]))
    elif kind == "function_call_arguments" and "arguments" in event:
        item["arguments"] = event["arguments"]
    elif kind in ("output_text", "text", "reasoning_text") and "text" in event:
        item["content"] = list(item.get("content") or [])
        ensure_part(item["content"], event.get("content_index") or 0)["text"] = event[
            "text"
        ]


def item_type(event_type: str) -> str:
    """The type of the item that an event about an unknown item makes."""
    if "reasoning" in event_type:
        return "reasoning"
    return "function_call" if "function_call" in event_type else "message"


def updater(event_type: str) -> Callable[[Item, Item], None] | None:
    """How events of this type change their item; none when they do not."""
    if event_type == "response.content_part.added":
        return part_added
    if event_type == "response.reasoning_summary_part.added":
        return summary_part_added
    if event_type.endswith(".delta"):
        return delta_added
    return part_done if event_type.endswith(".done") else None


def apply_response_event(output: Output, event: Item) -> Output:
    """The items after one event of the Responses API; `output` is left as it is."""
    event_type = event.get("type") or ""
    if not event_type.startswith("response."):
        return output
    if event_type == "response.completed":
        return complete(output, event)
    if event_type in ("response.output_item.added", "response.output_item.done"):
        return place_item(output, event)
    update = updater(event_type)
    if update is None:
        return output
    result = list(output)
    fallback: Item = {
        "id": event.get("item_id"),
        "type": item_type(event_type),
        "status": "in_progress",
        "role": "assistant",
        "content": [],
    }
    update(ensure_item(result, index_of(output, event), fallback), event)
    return result
