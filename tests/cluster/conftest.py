"""One cluster for all tests here; its first replica is their `host`."""

from collections.abc import Iterator

import pytest

from tests.cluster.cluster import Cluster, Replica
from tests.cluster.services import PACKAGES, missing_programs
from tests.conftest import FUNCTION, FUNCTION_ID, FUNCTION_NAME
from tests.integration.conftest import GARDEN, PIXEL
from tests.integration.talk import Talk
from tests.stack.browser import missing
from tests.stack.host import Account
from tests.stack.models import ModelServer


@pytest.fixture(scope="session")
def cluster(
    model_server: ModelServer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Cluster]:
    """Three replicas with the function installed, and every model open to everybody."""
    if missing_programs():
        missing(f"{', '.join(missing_programs())}: apt install {PACKAGES}")
    data_dir = tmp_path_factory.mktemp("cluster")
    with Cluster.start(data_dir, model_server.openai_url) as cluster:
        cluster.sign_up_admin()
        first = cluster.replicas[0]
        first.install_function(FUNCTION_ID, FUNCTION_NAME, FUNCTION.read_text("utf-8"))
        first.create_tool("garden", GARDEN.replace("PIXEL", PIXEL))
        first.open_models_to_all()
        yield cluster


@pytest.fixture(scope="session")
def host(cluster: Cluster) -> Replica:
    """The first replica, through which settings are made."""
    return cluster.replicas[0]


@pytest.fixture
def talk(host: Replica, model_server: ModelServer, user: Account) -> Iterator[Talk]:
    """A plain user's talk; nothing is set yet, and nothing stays set."""
    host.set_user_valves(user, FUNCTION_ID, {})
    model_server.wait_for(lambda server: server.in_flight == 0)
    model_server.clear()
    yield Talk(host, model_server, user)
    host.set_valves(FUNCTION_ID, {})
