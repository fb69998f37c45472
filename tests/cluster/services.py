"""PostgreSQL, Redis and nginx as processes that a test can stop and start again.

They come from the machine's own packages (`PACKAGES`), listen on this machine only, and
keep what they have in directories that are removed at the end.
"""

import os
import shutil
import signal
import subprocess
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Self

import httpx
import psycopg
import redis

from tests.stack.host import free_port
from tests.stack.waiting import wait_until

PACKAGES = "postgresql redis-server nginx"
START_TIMEOUT = 30.0
"""Seconds a service may take from its start to its first answer."""
STOP_TIMEOUT = 10.0
"""Seconds a service may take to end."""
BASE = "/tmp"
"""Where services keep what they have. `TMPDIR` may be closed to `DATABASE_USER`, or too
long for the path of a socket."""
DATABASE = "openwebui"
DATABASE_USER = "postgres"
"""Whom PostgreSQL runs as, where we are the superuser: it refuses to be that."""


def find_program(name: str) -> str | None:
    """The path of a service's program; Debian keeps PostgreSQL's apart, by version."""
    newest = sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"), reverse=True)
    found = shutil.which(name) or shutil.which(name, path="/usr/sbin:/usr/local/sbin")
    return found or next(map(str, newest), None)


def missing_programs() -> list[str]:
    """The programs that are not there."""
    wanted = ("initdb", "postgres", "redis-server", "nginx")
    return [name for name in wanted if find_program(name) is None]


class Service(ABC):
    """A server program on a port of its own; a context manager that ends it."""

    ends_with = signal.SIGTERM
    user: str | None = None

    def __init__(self) -> None:
        self.port = free_port()
        prefix = f"{type(self).__name__}-"
        self.directory = Path(tempfile.mkdtemp(prefix=prefix, dir=BASE))
        self.log_path = self.directory / "service.log"
        self.process: subprocess.Popen[bytes] | None = None

    @property
    @abstractmethod
    def command(self) -> Sequence[str]:
        """The program and its arguments."""

    @abstractmethod
    def answers(self) -> bool:
        """Whether it takes requests."""

    def start(self) -> Self:
        """Start it, and return when it answers; raises with its log otherwise."""
        with self.log_path.open("ab") as log:
            self.process = subprocess.Popen(
                self.command,
                cwd=self.directory,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                user=self.user,
                group=self.user,
                extra_groups=[] if self.user else None,
            )
        try:
            wait_until(self._ready, START_TIMEOUT, f"{self.command[0]} answers")
        except TimeoutError as error:
            log_text = self.log_path.read_text("utf-8", "replace")
            raise RuntimeError(f"{error}\n{log_text}") from error
        return self

    def _ready(self) -> bool:
        ended = self.process and self.process.poll()
        if ended is not None:
            log_text = self.log_path.read_text("utf-8", "replace")
            raise RuntimeError(f"{self.command[0]} ended with {ended}\n{log_text}")
        return self.answers()

    def stop(self) -> None:
        """End it, with all its processes; harmless when it has ended."""
        if self.process is None:
            return
        self._signal(self.ends_with)
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(STOP_TIMEOUT)
        self._signal(signal.SIGKILL)
        self.process.wait()
        self.process = None

    def _signal(self, number: signal.Signals) -> None:
        if self.process is not None:
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, number)

    def restart(self, seconds: float = 0.0) -> None:
        """End it, and start it again after so long."""
        self.stop()
        time.sleep(seconds)
        self.start()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *exc: object) -> None:
        self.stop()
        shutil.rmtree(self.directory, ignore_errors=True)


class PostgreSQL(Service):
    """A fresh database; it need not survive a crash of the machine, so it is quick."""

    ends_with = signal.SIGINT  # ends at once, not when its clients have left

    def __init__(self) -> None:
        super().__init__()
        self.data = self.directory / "data"
        if os.geteuid() == 0:
            self.user = DATABASE_USER
            shutil.chown(self.directory, self.user, self.user)

    @property
    def url(self) -> str:
        """For Open WebUI: with the driver that it brings along."""
        user = f"{DATABASE_USER}@127.0.0.1:{self.port}"
        return f"postgresql+psycopg://{user}/{DATABASE}"

    @property
    def command(self) -> Sequence[str]:
        """The program and its arguments."""
        options = {
            "listen_addresses": "127.0.0.1",
            "unix_socket_directories": str(self.directory),
            "max_connections": "300",
            "fsync": "off",
            "log_min_messages": "fatal",
        }
        settings = [f"-c{name}={value}" for name, value in options.items()]
        program = str(find_program("postgres"))
        return [program, "-D", str(self.data), "-p", str(self.port), *settings]

    def connect(self, database: str = DATABASE) -> "psycopg.Connection[tuple[str]]":
        """A connection of our own, each statement a transaction."""
        return psycopg.connect(
            host="127.0.0.1",
            port=self.port,
            user=DATABASE_USER,
            dbname=database,
            autocommit=True,
            connect_timeout=2,
        )

    def answers(self) -> bool:
        """Whether it takes connections."""
        with suppress(psycopg.OperationalError), self.connect("postgres"):
            return True
        return False

    def __enter__(self) -> Self:
        how = ["-U", DATABASE_USER, "--auth=trust", "--no-sync"]
        how += ["--encoding=UTF8", "--locale=C"]  # whatever this machine speaks
        subprocess.run(
            [str(find_program("initdb")), "-D", str(self.data), *how],
            check=True,
            capture_output=True,
            cwd=self.directory,
            user=self.user,
            group=self.user,
            extra_groups=[] if self.user else None,
        )
        super().__enter__()
        with self.connect("postgres") as connection:
            connection.execute(f"CREATE DATABASE {DATABASE}")
        return self


class Redis(Service):
    """A fresh Redis that keeps nothing by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.client = redis.Redis(port=self.port, decode_responses=True)

    @property
    def url(self) -> str:
        """Its address."""
        return f"redis://127.0.0.1:{self.port}/0"

    @property
    def command(self) -> Sequence[str]:
        """The program and its arguments."""
        where = ["--bind", "127.0.0.1", "--port", str(self.port)]
        keeps_nothing = ["--save", "", "--appendonly", "no"]
        return [str(find_program("redis-server")), *where, *keeps_nothing]

    def answers(self) -> bool:
        """Whether it takes commands, all of its data loaded."""
        with suppress(redis.RedisError):
            return bool(self.client.ping())
        return False

    def restart_with_data(self, seconds: float = 0.0) -> None:
        """Restart it; what it had is there again."""
        self.client.save()
        self.restart(seconds)
        (self.directory / "dump.rdb").unlink()

    def calls(self) -> dict[str, int]:
        """How often each command was run since it started."""
        found = self.client.info("commandstats")
        names = ((name.removeprefix("cmdstat_"), row) for name, row in found.items())
        return {name: int(row["calls"]) for name, row in names}

    def __exit__(self, *exc: object) -> None:
        self.client.close()
        super().__exit__(*exc)


NGINX = """\
daemon off;
master_process off;
pid {directory}/nginx.pid;
error_log stderr;
events {{ worker_connections 4096; }}
http {{
  access_log off;
  client_max_body_size 0;
  client_body_temp_path {directory}/body;
  proxy_temp_path {directory}/proxy;
  fastcgi_temp_path {directory}/fastcgi;
  uwsgi_temp_path {directory}/uwsgi;
  scgi_temp_path {directory}/scgi;
  map $http_upgrade $connection_upgrade {{ default upgrade; "" close; }}
  map $cookie_visitor $visitor {{ "" $request_id; default $cookie_visitor; }}
  upstream spread {{ {servers} }}
  upstream sticky {{ hash $visitor consistent; {servers} }}
  proxy_http_version 1.1;
  proxy_set_header Host $http_host;
  proxy_set_header X-Forwarded-For $remote_addr;
  proxy_set_header Upgrade $http_upgrade;
  proxy_set_header Connection $connection_upgrade;
  proxy_buffering off;
  proxy_read_timeout 1h;
  server {{
    listen 127.0.0.1:{port};
    location / {{ proxy_pass http://spread; }}
  }}
  server {{
    listen 127.0.0.1:{sticky_port};
    location / {{
      proxy_pass http://sticky;
      add_header Set-Cookie "visitor=$visitor; Path=/; HttpOnly; SameSite=Lax" always;
    }}
  }}
}}
"""


class Nginx(Service):
    """A balancer: at `url` each request goes where it may, at `sticky_url` a visitor's
    requests, and its socket, all go to one server, by a cookie."""

    def __init__(self, ports: Sequence[int]) -> None:
        super().__init__()
        self.ports = ports
        self.sticky_port = free_port()

    @property
    def url(self) -> str:
        """The address at which requests are spread."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def sticky_url(self) -> str:
        """The address at which visitors stay with one server."""
        return f"http://127.0.0.1:{self.sticky_port}"

    @property
    def command(self) -> Sequence[str]:
        """The program and its arguments."""
        configuration = self.directory / "nginx.conf"
        where = ["-p", str(self.directory), "-c", str(configuration), "-e", "stderr"]
        return [str(find_program("nginx")), *where]

    def answers(self) -> bool:
        """Whether it takes requests, whatever becomes of them."""
        with suppress(httpx.TransportError):
            httpx.get(self.url, trust_env=False)
            return True
        return False

    def __enter__(self) -> Self:
        servers = " ".join(
            f"server 127.0.0.1:{port} max_fails=1 fail_timeout=5s;"
            for port in self.ports
        )
        text = NGINX.format(
            directory=self.directory,
            servers=servers,
            port=self.port,
            sticky_port=self.sticky_port,
        )
        (self.directory / "nginx.conf").write_text(text)
        return super().__enter__()
