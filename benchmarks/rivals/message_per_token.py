"""
title: Rival that appends one message event per token
"""

import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from fastapi import Request
from open_webui.models.users import Users
from open_webui.utils.chat import generate_chat_completion
from pydantic import BaseModel

Json = dict[str, Any]


async def deltas(response: Any) -> AsyncIterator[Json]:
    """The deltas of a streamed completion."""
    rest = ""
    async for piece in response.body_iterator:
        rest += piece.decode() if isinstance(piece, bytes) else piece
        *lines, rest = rest.split("\n")
        for line in lines:
            if line.startswith("data: {"):
                for choice in json.loads(line[6:]).get("choices", []):
                    yield choice["delta"]


class Pipe:
    class Valves(BaseModel):
        models: str = ""
        rounds: int = 1

    def __init__(self) -> None:
        self.valves = self.Valves()

    async def pipe(
        self,
        body: Json,
        __user__: Json,
        __request__: Request,
        __event_emitter__: Callable[[Json], Awaitable[Any]],
    ) -> str:
        user, models = await Users.get_user_by_id(__user__["id"]), self.valves.models
        shown, replaced = "", 0.0
        for model in models.split(",") * self.valves.rounds:
            shown += (head := f"\n\n### {model}\n\n")
            await __event_emitter__({"type": "message", "data": {"content": head}})
            form = {"model": model, "stream": True, "messages": body["messages"]}
            response = await generate_chat_completion(__request__, form, user)
            async for delta in deltas(response):
                text, thought = delta.get("content"), delta.get("reasoning_content")
                shown += text or thought or ""
                kind, said = "message", text
                if thought and time.monotonic() - replaced > 0.5:
                    kind, said, replaced = "replace", shown, time.monotonic()
                if said:
                    await __event_emitter__({"type": kind, "data": {"content": said}})
        return ""
