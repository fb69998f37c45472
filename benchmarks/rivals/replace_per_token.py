"""
title: Rival that sends the whole transcript at every token
"""

import json
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from fastapi import Request
from open_webui.models.users import Users
from open_webui.utils.chat import generate_chat_completion
from pydantic import BaseModel

Json = dict[str, Any]


async def texts(response: Any) -> AsyncIterator[str]:
    """The pieces of text of a streamed completion."""
    rest = ""
    async for piece in response.body_iterator:
        rest += piece.decode() if isinstance(piece, bytes) else piece
        *lines, rest = rest.split("\n")
        for line in lines:
            if line.startswith("data: {"):
                for choice in json.loads(line[6:]).get("choices", []):
                    yield choice["delta"].get("content") or ""


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
        shown = ""
        for model in models.split(",") * self.valves.rounds:
            shown += f"\n\n### {model}\n\n"
            form = {"model": model, "stream": True, "messages": body["messages"]}
            response = await generate_chat_completion(__request__, form, user)
            async for text in texts(response):
                shown += text
                event = {"type": "replace", "data": {"content": shown}}
                if text:
                    await __event_emitter__(event)
        return ""
