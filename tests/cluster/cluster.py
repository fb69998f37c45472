"""A cluster: PostgreSQL, Redis, Open WebUI as replicas, and nginx in front of them.

with Cluster.start(tmp_path, models.url) as cluster:
    admin = cluster.sign_up_admin()
    cluster.replicas[0].install_function(...)
"""

import os
import signal
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Self

import httpx

from tests.cluster.services import Nginx, PostgreSQL, Redis
from tests.stack.host import (
    PROBE,
    Account,
    Api,
    OpenWebUI,
    free_port,
    server_environment,
)
from tests.stack.page import Page

REPLICAS = 3
TASK_TTL = 60
"""Seconds after which a dead replica's task is forgotten; the least the host takes."""


class Replica(OpenWebUI):
    """One of several servers with the same accounts."""

    @classmethod
    def launch(
        cls, data_dir: Path, models_url: str, extra_env: Mapping[str, str]
    ) -> Self:
        """Start a server; it can be used after `server.wait_ready()`."""
        data_dir.mkdir(parents=True, exist_ok=True)
        environment = {
            **server_environment(data_dir, models_url),
            "MMC_PROBE": str(data_dir / "probe.json"),
            "PYTHONPATH": str(PROBE),
        }
        return cls(data_dir, {**environment, **extra_env})

    def adopt(self, admin: Account) -> None:
        """Call as an administrator who signed up at another replica."""
        self._admin = admin

    def kill(self) -> None:
        """End it as a crash would: nothing more is said or saved."""
        os.killpg(self.server.process.pid, signal.SIGKILL)
        self.server.process.wait()


class Balanced(Api):
    """The API behind the balancer."""

    def __init__(self, url: str, admin: Account):
        super().__init__(url)
        self._admin = admin


class Cluster:
    """All parts, running; a context manager that ends them, the last one first."""

    def __init__(self, data_dir: Path, models_url: str, extra_env: Mapping[str, str]):
        self.data_dir = data_dir
        self.models_url = models_url
        self.extra_env = extra_env
        self.replicas: list[Replica] = []
        self._ports = [free_port() for _ in range(REPLICAS)]
        self._parts = ExitStack()
        self.postgresql = PostgreSQL()
        self.redis = Redis()
        self.nginx = Nginx(self._ports)

    @classmethod
    def start(
        cls,
        data_dir: Path,
        models_url: str,
        extra_env: Mapping[str, str] | None = None,
    ) -> Self:
        """Start everything on empty data, and return when all of it answers."""
        cluster = cls(data_dir, models_url, extra_env or {})
        try:
            cluster._start()
        except BaseException:
            cluster.stop()
            raise
        return cluster

    def _start(self) -> None:
        self._parts.enter_context(self.postgresql)
        self._parts.enter_context(self.redis)
        self._launch(0)  # alone: it makes the tables
        for number in range(1, REPLICAS):
            self._launch(number, wait=False)
        for replica in self.replicas:
            replica.server.wait_ready()
        self._parts.enter_context(self.nginx)

    def _launch(self, number: int, wait: bool = True) -> None:
        environment = {
            "DATABASE_URL": self.postgresql.url,
            "REDIS_URL": self.redis.url,
            "REDIS_TASK_TTL": str(TASK_TTL),
            "WEBSOCKET_MANAGER": "redis",
            "WEBSOCKET_REDIS_URL": self.redis.url,
            "PORT": str(self._ports[number]),
            **self.extra_env,
        }
        directory = self.data_dir.resolve() / f"replica-{number}"
        replica = Replica.launch(directory, self.models_url, environment)
        self.replicas[number : number + 1] = [replica]
        if wait:
            replica.server.wait_ready()

    def revive(self, number: int) -> None:
        """Start a replica again that was killed."""
        admin = self.replicas[number].admin
        self.replicas[number].stop()
        self._launch(number)
        self.replicas[number].adopt(admin)

    def sign_up_admin(self) -> Account:
        """Create the first account; every replica then calls as it."""
        return self.adopt(self.replicas[0].sign_up_admin())

    def adopt(self, admin: Account) -> Account:
        """Let every replica call as this administrator."""
        for replica in self.replicas:
            replica.adopt(admin)
        return admin

    @property
    def spread(self) -> Api:
        """The API behind nginx, each request at a replica of its own."""
        return Balanced(self.nginx.url, self.replicas[0].admin)

    @property
    def sticky(self) -> Api:
        """The API behind nginx, each visitor with one replica."""
        return Balanced(self.nginx.sticky_url, self.replicas[0].admin)

    def stop(self) -> None:
        """End everything; harmless when it has ended."""
        with ThreadPoolExecutor(REPLICAS) as threads:
            list(threads.map(Replica.stop, self.replicas))
        self._parts.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()


class SplitPage(Page):
    """A page whose socket is at one replica and whose requests go to another."""

    def __init__(self, socket: Api, requests: Api, account: Account):
        super().__init__(socket, account)
        self._http.base_url = httpx.URL(requests.url)
