"""A search engine for the host: SearXNG's JSON, always with the same finds.

with SearchEngine({"Oaks live long.": "https://example.com/oaks"}) as engine:
    with host.configured(engine.settings):
        ...
    assert engine.queries == ["Which tree?"]
"""

import json
import threading
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self
from urllib.parse import parse_qs, urlsplit


class SearchEngine:
    """The engine on a thread of its own; `finds` maps a text to its address."""

    def __init__(self, finds: Mapping[str, str]) -> None:
        self._results = [
            {"url": url, "title": url.rsplit("/", 1)[-1], "content": text, "score": 1}
            for text, url in finds.items()
        ]
        self._queries: list[str] = []
        engine = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                """Answer a query."""
                query = parse_qs(urlsplit(self.path).query).get("q", [""])[0]
                body = engine.answer(query)
                self.send_response(200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: Any) -> None:
                """Keep the tests' output clean."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)

    def answer(self, query: str) -> bytes:
        """Note a query; its answer."""
        self._queries.append(query)
        return json.dumps({"query": query, "results": self._results}).encode()

    @property
    def queries(self) -> list[str]:
        """What was searched for, in order."""
        return list(self._queries)

    @property
    def settings(self) -> dict[str, Any]:
        """The host's settings that make it search here, for the question itself.

        What is found is taken as it is: no page is loaded, nothing is embedded.
        """
        return {
            "web.search.enable": True,
            "web.search.engine": "searxng",
            "web.search.searxng_query_url": (
                f"http://127.0.0.1:{self._server.server_port}/search"
            ),
            "web.search.result_count": 5,
            "web.search.bypass_web_loader": True,
            "web.search.bypass_embedding_and_retrieval": True,
            "task.query.search.enable": False,
            "task.query.retrieval.enable": False,
        }

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
