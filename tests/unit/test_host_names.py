"""An Open WebUI in which something moved fails here, with the name of what moved."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.unit import host_names
from tests.unit.host_names import Package, installed, missing, read_use
from tests.unit.plugin import SOURCE

TREE = ast.parse(SOURCE)
ROWS = {
    f"{module}.{name}": use
    for module, rows in host_names.FUNCTIONS.items()
    for name, use in rows.items()
}
READ = {f"{m}.{name}" for m, names in host_names.VALUES.items() for name in names}
NOT_THE_HOSTS = {"function", "image_url", "invalid_request_error", "text"}
"""Types of what goes to providers and clients of the API."""


def test_the_installed_open_webui_has_every_name() -> None:
    assert missing(Package(installed())) == []


# -- the table is complete -------------------------------------------------------------


def imported() -> dict[str, str]:
    """What the file imports of Open WebUI: name -> dotted path."""
    nodes = (node for node in ast.walk(TREE) if isinstance(node, ast.ImportFrom))
    return {
        alias.asname or alias.name: f"{node.module}.{alias.name}"
        for node in nodes
        if (node.module or "").split(".")[0] == "open_webui"
        for alias in node.names
    }


HOSTS = imported()
IS_MODULE = {path for path in HOSTS.values() if path in host_names.FUNCTIONS}
IS_OBJECT = {name.rsplit(".", 1)[0] for name in (*ROWS, *READ)} - IS_MODULE


def path_of(node: ast.AST) -> str | None:
    """The host's dotted path that an expression names, if it names one."""
    if isinstance(node, ast.Name):
        return HOSTS.get(node.id)
    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
        owner = HOSTS.get(node.value.id)
        return f"{owner}.{node.attr}" if owner in IS_MODULE | IS_OBJECT else None
    return None


def looked_up() -> Iterator[str]:
    """What is taken with `getattr(middleware, "name", ...)`."""
    for node in ast.walk(TREE):
        match node:
            case ast.Call(
                func=ast.Name(id="getattr"),
                args=[ast.Name(id=owner), ast.Constant(value=str(name)), _],
            ) if owner in HOSTS:
                yield f"{HOSTS[owner]}.{name}"


def used() -> set[str]:
    """Every dotted path of the host that the file reads or calls."""
    paths = {path_of(node) for node in ast.walk(TREE)} - {None}
    named = {path for path in paths if path}
    return {path for path in named if path not in IS_MODULE | IS_OBJECT} | {
        *looked_up()
    }


def test_every_name_of_the_host_stands_in_the_table() -> None:
    assert used() == {*ROWS, *READ}


def test_what_is_done_without_is_never_taken_for_granted() -> None:
    imports = {path for path in host_names.WITH_FALLBACK if path.startswith("open_")}
    assert imports == set(looked_up())


def calls() -> Iterator[tuple[str, ast.Call]]:
    """The file's calls of functions of the host."""
    for node in ast.walk(TREE):
        path = path_of(node.func) if isinstance(node, ast.Call) else None
        if isinstance(node, ast.Call) and path in ROWS:
            yield path, node


@pytest.mark.parametrize(("path", "call"), list(calls()))
def test_the_table_says_how_each_function_is_called(path: str, call: ast.Call) -> None:
    _, by_position, by_name = read_use(ROWS[path])
    assert len(call.args) <= len(by_position)
    assert {keyword.arg for keyword in call.keywords} <= set(by_name)


# -- words that are no names of Python -------------------------------------------------


def strings() -> set[str]:
    """Every string of the file."""
    nodes = (node for node in ast.walk(TREE) if isinstance(node, ast.Constant))
    return {node.value for node in nodes if isinstance(node.value, str)}


def keys_read_of(owner: str) -> set[str]:
    """The keys read, with `[...]` or `.get(...)`, of what is called `owner`."""
    found = set()
    for node in ast.walk(TREE):
        match node:
            case ast.Subscript(value=value, slice=ast.Constant(value=str(key))):
                pass
            case ast.Call(
                func=ast.Attribute(value=value, attr="get"),
                args=[ast.Constant(value=str(key)), *_],
            ):
                pass
            case _:
                continue
        if ast.unparse(value).split(".")[-1] == owner:
            found.add(key)
    return found


def types_written() -> set[str]:
    """What stands behind `"type":` in the file."""
    found = set()
    for node in ast.walk(TREE):
        if isinstance(node, ast.Dict):
            for key, value in zip(node.keys, node.values, strict=True):
                if isinstance(key, ast.Constant) and key.value == "type":
                    found |= {
                        part.value
                        for part in ast.walk(value)
                        if isinstance(part, ast.Constant) and part.value in strings()
                    }
    return found


def test_every_event_stands_in_the_table() -> None:
    known = {
        *host_names.PAGE_EVENTS,
        *host_names.RESPONSE_EVENTS,
        *host_names.VALVE_INPUTS,
        *host_names.ITEM_TYPES,
        *NOT_THE_HOSTS,
    }
    prefixes = {text for text in strings() if text.startswith("response.")}
    for written in types_written() | prefixes:
        assert any(name.startswith(written) for name in known), written


def test_every_key_of_the_metadata_stands_in_the_table() -> None:
    read = keys_read_of("metadata") | keys_read_of("__metadata__")
    assert read <= set(host_names.METADATA)


def test_every_setting_and_permission_stands_in_the_table() -> None:
    first_arguments = {
        (path, ast.literal_eval(argument))
        for path, call in calls()
        for argument in call.args
        if isinstance(argument, ast.Constant)
    }
    settings = {name for path, name in first_arguments if path.endswith("Config.get")}
    asked = {name for path, name in first_arguments if path.endswith("has_permission")}
    assert settings == set(host_names.SETTINGS)
    assert asked == set(host_names.PERMISSIONS)


def test_every_parameter_the_host_fills_stands_in_the_table() -> None:
    pipe = next(
        node
        for node in ast.walk(TREE)
        if isinstance(node, ast.AsyncFunctionDef) and node.name == "pipe"
    )
    names = {argument.arg for argument in pipe.args.args}
    assert names - {"self", "body"} == set(host_names.PIPE_PARAMETERS)
    passed = {text for text in strings() if text[:2] == "__" == text[-2:]}
    assert passed == set(host_names.TOOL_PARAMETERS)


def test_everything_read_of_the_apps_state_stands_in_the_table() -> None:
    read = {
        node.attr
        for node in ast.walk(TREE)
        if isinstance(node, ast.Attribute)
        and ast.unparse(node.value).endswith("app.state")
    }
    assert read == set(host_names.APP_STATE)


def test_the_table_names_nothing_that_is_not_used() -> None:
    words = {
        *host_names.METADATA,
        *host_names.PAGE_EVENTS,
        *host_names.REQUEST_STATE,
        *host_names.VALVE_INPUTS,
    }
    assert words <= strings()


# -- a host in which something moved ---------------------------------------------------

SMALL = """
class Table:
    async def by_id(self, id, db=None): ...
    @staticmethod
    async def get(key, default=None): ...

Things = Table()

def plain(one, two=2, *, three=3): ...
def strict(one, two): ...
"""


@pytest.fixture
def small(tmp_path: Path) -> Package:
    """A package with one module."""
    (tmp_path / "a.py").write_text(SMALL)
    (tmp_path / "b.py").write_text("from open_webui.a import plain\n")
    return Package(tmp_path)


@pytest.mark.parametrize(
    ("name", "use", "problem"),
    [
        ("Things.by_id", "async (id)", ""),
        ("Things.by_id", "(id)", "is to be awaited"),
        ("Things.by_id", "async (user_id)", "takes (id, db), and not (user_id)"),
        ("Things.get", "async (key, default)", ""),
        ("plain", "(one, *, three)", ""),
        ("plain", "async (one)", "is not to be awaited any more"),
        ("plain", "(one, *, four)", "takes no four"),
        ("strict", "(one)", "now wants two"),
        ("Things", "()", "is no function"),
    ],
)
def test_what_moved_is_said(small: Package, name: str, use: str, problem: str) -> None:
    node = small.find("open_webui.a", name)
    assert node is not None
    assert host_names.misfit(node, use, "." in name) == problem


def test_what_is_gone_is_not_found_and_what_is_imported_is(small: Package) -> None:
    assert small.find("open_webui.a", "Things.by_name") is None
    assert small.find("open_webui.a", "gone") is None
    assert small.find("open_webui.nowhere", "plain") is None
    assert small.find("open_webui.b", "plain") is small.find("open_webui.a", "plain")


def test_an_empty_host_has_lost_everything_by_name(tmp_path: Path) -> None:
    lost = missing(Package(tmp_path))
    assert {f"{path} is gone" for path in (*ROWS, *READ)} <= set(lost)
    assert "app.state.MODELS is gone" in lost
    assert {"the event status is gone", "the input select is gone"} <= set(lost)
    assert "the event response.output_item.added is gone" in lost
