"""`make cluster`: three replicas with the conversation installed, ready to type into.

The models are those of `make demo`. Everything runs on this machine only and ends with
Ctrl-C.
"""

import signal
from contextlib import ExitStack, suppress

import httpx

from tests.cluster.cluster import Cluster, Replica
from tests.cluster.services import PACKAGES, missing_programs
from tests.stack.demo import (
    ENDINGS,
    MODEL,
    data_directory,
    furnish,
    interrupt,
    provider,
)
from tests.stack.waiting import wait_until

FOREVER = float("inf")


def start(stack: ExitStack) -> Cluster:
    """A cluster without a login, on its own data."""
    url, key = provider(stack)
    environment = {
        "WEBUI_AUTH": "False",
        "OPENAI_API_KEY": key,
        "RAG_OPENAI_API_KEY": key,
        "DEFAULT_MODELS": MODEL,
    }
    data_dir = stack.enter_context(data_directory())
    return stack.enter_context(Cluster.start(data_dir, url, environment))


def describe(cluster: Cluster) -> str:
    """Where everything is."""
    lines = [
        f"  {cluster.nginx.url}    each request at any replica",
        f"  {cluster.nginx.sticky_url}    each visitor at one replica",
        *(
            f"  {replica.url}    replica {at}"
            for at, replica in enumerate(cluster.replicas)
        ),
        f"  {cluster.redis.url}",
        f"  {cluster.postgresql.url}",
    ]
    return "\n".join(lines)


def ended(cluster: Cluster) -> list[Replica]:
    """The replicas that have ended by themselves."""
    replicas = cluster.replicas
    return [one for one in replicas if one.server.process.poll() is not None]


def main() -> None:
    """Start everything, say where, and wait until told to end or a replica has."""
    if missing_programs():
        raise SystemExit(f"{', '.join(missing_programs())}: apt install {PACKAGES}")
    for number in ENDINGS:
        signal.signal(number, interrupt)
    with suppress(KeyboardInterrupt), ExitStack() as stack:
        print("Starting PostgreSQL, Redis, three Open WebUI and nginx ...", flush=True)
        cluster = start(stack)
        try:
            furnish(cluster.replicas[0])
        except httpx.HTTPStatusError:
            print(cluster.replicas[0].log_tail())
            raise
        print(f"\n{describe(cluster)}\n\nCtrl-C ends it.", flush=True)
        wait_until(lambda: ended(cluster), FOREVER, "a replica ends")
        for replica in ended(cluster):
            print(replica.log_tail())
    print("\nStopped.")


if __name__ == "__main__":
    main()
