"""Open WebUI as a process on a fresh data directory, and its API as a test needs it.

    with OpenWebUI.start(tmp_path, models.url) as host:
        admin = host.sign_up_admin()
        host.install_function("multi_model_conversation", "Conversation", source)

Every path and body below is that of Open WebUI 0.12.4.
"""

import json
import os
import signal
import socket
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic, sleep
from typing import Any, Literal, Self
from uuid import uuid4

import httpx

from tests.stack.waiting import wait_until
from tests.versions import program, server_version

Json = dict[str, Any]

START_TIMEOUT = 120.0
"""Seconds a server may take from its start to its first answer."""
STOP_TIMEOUT = 15.0
"""Seconds a server may take to end after SIGTERM."""
KEPT_ALIVE = httpx.Limits(keepalive_expiry=2.0)
"""The server closes a connection after five idle seconds; who asks just then fails."""
LOG_LINES = 60
"""Lines of the server's log that an error shows."""
PROBE = Path(__file__).parent / "probe"
PASSED_ON = ("PATH", "HOME", "LANG", "LC_ALL", "TMPDIR", "VIRTUAL_ENV")
"""What the server inherits of our environment: no proxies, no keys."""


@dataclass(frozen=True, slots=True)
class Account:
    """A person with an account, signed in."""

    id: str
    token: str
    email: str
    name: str
    role: str


def difference(later: Mapping[str, int], earlier: Mapping[str, int]) -> dict[str, int]:
    """What each count of `later` has grown by, without those that have not."""
    grown = {name: count - earlier.get(name, 0) for name, count in later.items()}
    return {name: count for name, count in grown.items() if count}


@dataclass(frozen=True, slots=True)
class Counts:
    """What the server has done since it started, or between two moments.

    `sql` and `sql_bytes` are by verb (`SELECT`, `UPDATE`, ...). `lookups` are calls
    of the host's look-ups by name (`Models.get_model_by_id`, `get_tools`, ...) except
    those made inside its own `generate_chat_completion`, which are in `inside`.
    `memory` is bytes in use, where asked for. `tasks`, `threads` and `files` are those
    of now, tasks of sockets left out. Once `watch` was asked for, `stall` is the
    longest delay of the event loop and `collection` the longest collection of garbage,
    in seconds, since the last question.
    """

    sql: dict[str, int] = field(default_factory=dict)
    sql_bytes: dict[str, int] = field(default_factory=dict)
    lookups: dict[str, int] = field(default_factory=dict)
    inside: dict[str, int] = field(default_factory=dict)
    cpu_seconds: float = 0.0
    memory: int = 0
    tasks: int = 0
    threads: int = 0
    files: int = 0
    stall: float = 0.0
    collection: float = 0.0

    @property
    def writes(self) -> int:
        """How many statements changed the database."""
        return sum(self.sql.get(verb, 0) for verb in ("INSERT", "UPDATE", "DELETE"))

    def __sub__(self, earlier: "Counts") -> "Counts":
        return Counts(
            sql=difference(self.sql, earlier.sql),
            sql_bytes=difference(self.sql_bytes, earlier.sql_bytes),
            lookups=difference(self.lookups, earlier.lookups),
            inside=difference(self.inside, earlier.inside),
            cpu_seconds=self.cpu_seconds - earlier.cpu_seconds,
            memory=self.memory - earlier.memory,
            tasks=self.tasks - earlier.tasks,
            threads=self.threads - earlier.threads,
            files=self.files - earlier.files,
            stall=self.stall,
            collection=self.collection,
        )


def free_port() -> int:
    """A TCP port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def grant(reader: Account | Literal["public"]) -> Json:
    """An access grant as the host stores it: read, for one account or everybody."""
    who = "*" if reader == "public" else reader.id
    return {"principal_type": "user", "principal_id": who, "permission": "read"}


def server_environment(
    data_dir: Path, models_url: str, ollama_url: str | None = None
) -> dict[str, str]:
    """The environment of a server that reaches nothing but the two given URLs."""
    return {
        **{name: os.environ[name] for name in PASSED_ON if name in os.environ},
        "DATA_DIR": str(data_dir),
        "OFFLINE_MODE": "true",
        "HF_HUB_OFFLINE": "1",
        "NO_PROXY": "*",
        "ANONYMIZED_TELEMETRY": "false",
        "DO_NOT_TRACK": "true",
        "SCARF_NO_ANALYTICS": "true",
        "WEBUI_SECRET_KEY": "not-a-secret",
        "OPENAI_API_BASE_URL": models_url,
        "OPENAI_API_KEY": "not-a-key",
        "RAG_EMBEDDING_ENGINE": "openai",
        "RAG_OPENAI_API_BASE_URL": models_url,
        "RAG_OPENAI_API_KEY": "not-a-key",
        "ENABLE_OLLAMA_API": "true" if ollama_url else "false",
        "OLLAMA_BASE_URL": ollama_url or "",
        "ENABLE_API_KEYS": "true",
        "USER_PERMISSIONS_FEATURES_API_KEYS": "true",
    }


class ServerProcess:
    """`open-webui serve` as a process group of its own, logging to a file."""

    def __init__(self, data_dir: Path, environment: Mapping[str, str], port: int):
        self.url = f"http://127.0.0.1:{port}"
        self.log_path = data_dir / "server.log"
        with self.log_path.open("wb") as log:
            self.process = subprocess.Popen(
                [str(program()), "serve", "--host", "127.0.0.1", "--port", str(port)],
                cwd=data_dir,
                env=dict(environment),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def log_tail(self, lines: int = LOG_LINES) -> str:
        """The last lines the server has logged."""
        text = self.log_path.read_text("utf-8", "replace")
        return "\n".join(text.splitlines()[-lines:])

    def _answers(self, client: httpx.Client) -> bool:
        if self.process.poll() is not None:
            raise RuntimeError(
                f"Open WebUI ended with {self.process.returncode}:\n{self.log_tail()}"
            )
        try:
            return client.get(f"{self.url}/health").status_code == 200
        except httpx.TransportError:
            return False

    def wait_ready(self, timeout: float = START_TIMEOUT) -> None:
        """Return when the server answers; raise with its log if it does not."""
        with httpx.Client(trust_env=False, timeout=5) as client:
            try:
                wait_until(
                    lambda: self._answers(client), timeout, f"{self.url} answers"
                )
            except TimeoutError as e:
                raise RuntimeError(f"{e}\n{self.log_tail()}") from e

    def _signal(self, number: signal.Signals) -> None:
        try:
            os.killpg(self.process.pid, number)
        except ProcessLookupError:
            return

    def stop(self) -> None:
        """End the server and everything it started; harmless when it has ended."""
        if self.process.poll() is None:
            self._signal(signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(STOP_TIMEOUT)
        self._signal(signal.SIGKILL)
        self.process.wait()


class Api:
    """The host's HTTP API, as the administrator unless an account is given."""

    def __init__(self, url: str):
        self.url = url
        self._admin: Account | None = None
        self._client = httpx.Client(
            base_url=url, timeout=60, trust_env=False, limits=KEPT_ALIVE
        )

    @property
    def admin(self) -> Account:
        """The first account. Raises `RuntimeError` before `sign_up_admin`."""
        if self._admin is None:
            raise RuntimeError("call sign_up_admin() first")
        return self._admin

    def request(
        self,
        method: str,
        path: str,
        body: Any = None,
        *,
        account: Account | None = None,
        **options: Any,
    ) -> Any:
        """The JSON answer to one call; raises `httpx.HTTPStatusError` with its text."""
        signed = account or self._admin
        headers = {"Authorization": f"Bearer {signed.token}"} if signed else {}
        answer = self._client.request(
            method, path, json=body, headers=headers, **options
        )
        if answer.is_error:
            raise httpx.HTTPStatusError(
                f"{method} {path}: {answer.status_code} {answer.text[:500]}",
                request=answer.request,
                response=answer,
            )
        return answer.json()

    # -- accounts ------------------------------------------------------------------

    def _sign_in(self, how: str, form: Json) -> Account:
        signed = self.request("POST", f"/api/v1/auths/{how}", form)
        account = Account(
            **{name: str(signed[name]) for name in Account.__dataclass_fields__}
        )
        self._admin = self._admin or account
        self.set_interface(account, {})
        return account

    def sign_up_admin(self, name: str = "Ada Admin") -> Account:
        """Create the first account, which administers the host."""
        form = {"name": name, "email": "admin@example.com", "password": "password"}
        return self._sign_in("signup", form)

    def sign_in_without_login(self) -> Account:
        """The only account of a server that runs with `WEBUI_AUTH=False`."""
        return self._sign_in("signin", {"email": "", "password": ""})

    def adopt(self, account: Account) -> None:
        """Go on as an administrator that signed in before a restart."""
        self._admin = account

    def add_user(self, name: str, role: str = "user") -> Account:
        """Create another account, signed in."""
        email = f"{name.lower().replace(' ', '.')}@example.com"
        form = {"name": name, "email": email, "password": "password", "role": role}
        return self._sign_in("add", form)

    def set_interface(self, account: Account, settings: Json) -> None:
        """Set the page's own settings for one account; "What's New" stays away."""
        body = {"ui": {"showChangelog": False, **settings}}
        self.request(
            "POST", "/api/v1/users/user/settings/update", body, account=account
        )

    def create_api_key(self, account: Account) -> str:
        """A key for `/api/chat/completions` from outside."""
        answer = self.request("POST", "/api/v1/auths/api_key", account=account)
        return str(answer["api_key"])

    # -- functions -----------------------------------------------------------------

    def install_function(
        self, id: str, name: str, content: str, meta: Json | None = None
    ) -> None:
        """Add a function from its source, as Admin -> Functions does, and enable it."""
        about = meta or {"description": ""}
        form = {"id": id, "name": name, "content": content, "meta": about}
        self.request("POST", "/api/v1/functions/create", form)
        self.request("POST", f"/api/v1/functions/id/{id}/toggle")
        self.models()

    def set_valves(self, function_id: str, values: Json) -> Json:
        """Store the administrator's valves, whole; returns them as validated."""
        path = f"/api/v1/functions/id/{function_id}/valves/update"
        stored: Json = self.request("POST", path, values)
        return stored

    def set_user_valves(self, account: Account, function_id: str, values: Json) -> Json:
        """Store one account's own valves, whole; returns them as validated."""
        path = f"/api/v1/functions/id/{function_id}/valves/user/update"
        stored: Json = self.request("POST", path, values, account=account)
        return stored

    # -- models and what hangs on them ---------------------------------------------

    def models(
        self, account: Account | None = None, refresh: bool = False
    ) -> list[Json]:
        """The models this account may choose from.

        The host remembers for a second what connections list; `refresh` asks them,
        but with 0.11.0 only when that second is over.
        """
        if refresh and server_version() == "0.11.0":
            sleep(1.1)
        path = f"/api/models{'?refresh=true' if refresh else ''}"
        found: list[Json] = self.request("GET", path, account=account)["data"]
        return found

    def create_model(self, model: Json) -> Json:
        """Add a workspace model: `id`, `name`, `base_model_id`, `meta`, `params`.

        With the id of an existing base model and `base_model_id` left out it sets
        that model's own settings instead.
        """
        form = {"name": model["id"], "meta": {}, "params": {}, **model}
        created: Json = self.request("POST", "/api/v1/models/create", form)
        self.models()
        return created

    def import_models(self, models: list[Json]) -> None:
        """Add or change models, as Workspace -> Models -> Import does."""
        self.request("POST", "/api/v1/models/import", {"models": models})
        self.models()

    def delete_model(self, model_id: str) -> None:
        """Remove a workspace model, or a base model's own settings."""
        self.request("POST", "/api/v1/models/model/delete", {"id": model_id})
        self.models()

    def set_readers(self, model_id: str, *readers: Account | Literal["public"]) -> None:
        """Let exactly these read a model; nobody but administrators when empty."""
        name = next((m["name"] for m in self.models() if m["id"] == model_id), model_id)
        form = {
            "id": model_id,
            "name": name,
            "access_grants": [grant(reader) for reader in readers],
        }
        self.request("POST", "/api/v1/models/model/access/update", form)
        self.models()

    def grant_read(self, model_id: str, reader: Account | Literal["public"]) -> None:
        """Let one account, or everybody, use a model (replaces earlier grants)."""
        self.set_readers(model_id, reader)

    def open_models_to_all(self) -> None:
        """Let every account use every model there is now."""
        for model in self.models():
            if model.get("owned_by") != "arena":
                self.grant_read(model["id"], "public")

    def create_tool(self, id: str, content: str, name: str = "") -> None:
        """Add a workspace tool from its source; everybody may use it."""
        form = {
            "id": id,
            "name": name or id,
            "content": content,
            "meta": {"description": name or id},
            "access_grants": [grant("public")],
        }
        self.request("POST", "/api/v1/tools/create", form)

    def create_knowledge(self, name: str, files: Mapping[str, str]) -> Json:
        """Add a knowledge base of text files (name -> text); everybody may read it."""
        form = {"name": name, "description": name, "access_grants": [grant("public")]}
        knowledge: Json = self.request("POST", "/api/v1/knowledge/create", form)
        for file_name, text in files.items():
            upload = {"file": (file_name, text.encode(), "text/plain")}
            options = {"process": "true", "process_in_background": "false"}
            stored = self.request(
                "POST", "/api/v1/files/", files=upload, params=options
            )
            path = f"/api/v1/knowledge/{knowledge['id']}/file/add"
            self.request("POST", path, {"file_id": stored["id"]})
        return knowledge

    # -- settings and chats --------------------------------------------------------

    def config(self) -> Json:
        """Every setting of the host by its dotted name."""
        settings: Json = self.request("GET", "/api/v1/configs/export")
        return settings

    def set_config(self, values: Json) -> None:
        """Change settings of the host by their dotted names.

        For example `chat.tool_permissions.enable`, `task.model.external`,
        `task.title.enable`, `evaluation.arena.enable`, `ui.default_models`.
        """
        self.request("POST", "/api/v1/configs/import", {"config": values})

    @contextmanager
    def configured(self, values: Json) -> Iterator[None]:
        """Change settings for a while."""
        before = self.config()
        self.set_config(values)
        try:
            yield
        finally:
            self.set_config({name: before.get(name) for name in values})

    def chat(self, account: Account, chat_id: str) -> Json:
        """A chat as the database has it."""
        found: Json = self.request("GET", f"/api/v1/chats/{chat_id}", account=account)
        return found

    def stored(self, account: Account, chat_id: str, message_id: str) -> Json:
        """One message of a chat as the database has it."""
        history = self.chat(account, chat_id)["chat"]["history"]
        message: Json = history["messages"][message_id]
        return message


class OpenWebUI(Api):
    """A running Open WebUI; a context manager that ends it."""

    def __init__(self, data_dir: Path, environment: Mapping[str, str]):
        self.data_dir = data_dir
        self._probe = Path(environment.get("MMC_PROBE", "/nonexistent"))
        port = int(environment.get("PORT", 0)) or free_port()
        self.server = ServerProcess(data_dir, environment, port)
        super().__init__(self.server.url)

    @classmethod
    def start(
        cls,
        data_dir: Path,
        models_url: str,
        *,
        ollama_url: str | None = None,
        extra_env: Mapping[str, str] | None = None,
        probe: bool = True,
    ) -> Self:
        """Start a server on `data_dir` and return when it answers.

        `models_url` is an OpenAI-compatible base URL, `/v1` included. `extra_env`
        wins over the environment chosen here; `PORT` in it fixes the port.
        """
        data_dir = data_dir.resolve()
        data_dir.mkdir(parents=True, exist_ok=True)
        environment = server_environment(data_dir, models_url, ollama_url)
        if probe:
            environment["MMC_PROBE"] = str(data_dir / "probe.json")
            environment["PYTHONPATH"] = str(PROBE)
        host = cls(data_dir, {**environment, **(extra_env or {})})
        try:
            host.server.wait_ready()
        except BaseException:
            host.stop()
            raise
        return host

    def log_tail(self, lines: int = LOG_LINES) -> str:
        """The last lines the server has logged."""
        return self.server.log_tail(lines)

    def counts(
        self, timeout: float = 10.0, memory: bool = False, watch: bool = False
    ) -> Counts:
        """What the server has done so far, counted inside it.

        With `memory`, what it has in use too; for that it stops and collects garbage.
        With `watch`, its event loop is watched from now on.
        """
        kind = "memory" if memory else "watch" if watch else "counts"
        nonce = f"{kind} {uuid4().hex}"
        question = os.open(f"{self._probe}.ask", os.O_WRONLY | os.O_NONBLOCK)
        with open(question, "w", encoding="utf-8") as pipe:
            pipe.write(f"{nonce}\n")

        def answer() -> Json:
            text = self._probe.read_text() if self._probe.exists() else "{}"
            counts: Json = json.loads(text)
            return counts

        wait_until(lambda: answer().get("nonce") == nonce, timeout, "the probe answers")
        counts = answer()
        del counts["nonce"]
        return Counts(**counts)

    def settled_counts(self, quiet: float = 0.5, timeout: float = 20.0) -> Counts:
        """`counts()` once the server has not touched its database for a while."""
        last, since = self.counts(), monotonic()

        def settled() -> bool:
            nonlocal last, since
            now = self.counts()
            if now.sql != last.sql:
                last, since = now, monotonic()
            return monotonic() - since > quiet

        wait_until(settled, timeout, "the server leaves its database alone")
        return last

    def stop(self) -> None:
        """End the server; harmless when it has ended."""
        self._client.close()
        self.server.stop()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()
