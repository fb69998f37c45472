"""The one file keeps its rules: it can be pasted, read, and changed without fear."""

import ast
import io
import re
import subprocess
import sys
import tokenize
from collections.abc import Iterator

import pytest

from tests.unit.plugin import PATH, SOURCE, load

TREE = ast.parse(SOURCE)
LINES = SOURCE.splitlines()
TITLES = [
    "Settings",
    "Values",
    "Decoding",
    "Conversation",
    "Transcript",
    "Open WebUI",
    "Running",
    "Pipe",
]
HOST_SECTION = TITLES.index("Open WebUI") + 1
PURE = range(TITLES.index("Values") + 1, HOST_SECTION)
FUNCTION_KINDS = (ast.FunctionDef, ast.AsyncFunctionDef)
FunctionNode = ast.FunctionDef | ast.AsyncFunctionDef
CLASSES = [node for node in TREE.body if isinstance(node, ast.ClassDef)]
FUNCTIONS = [node for node in ast.walk(TREE) if isinstance(node, FUNCTION_KINDS)]
ALLOWED = {"pydantic", "starlette", "fastapi", "open_webui"}
CLOCKS = {"time", "random", "datetime", "uuid", "uuid4", "secrets", "asyncio"}


def front_matter(source: str) -> dict[str, str]:
    """The `key: value` lines of the first docstring, as the host reads them."""
    lines = source.splitlines()
    assert lines[0].strip() == '"""'
    found = {}
    for line in lines[1:]:
        if '"""' in line:
            break
        match = re.match(r"(?i)^\s*([a-z_]+):\s*(.*)\s*$", line)
        if match:
            found[match[1]] = match[2].strip()
    return found


def section_at(line: int) -> int:
    """The number of the section a line is in; 0 above the first."""
    return sum(start <= line for start in SECTION_STARTS)


def banners() -> Iterator[tuple[int, int, str]]:
    """Line, number and title of each banner."""
    for at, line in enumerate(LINES, 1):
        match = re.fullmatch(r"# ==== (\d) (.+)", line)
        if match:
            yield at, int(match[1]), match[2]


SECTION_STARTS = [line for line, _, _ in banners()]


# -- pasted into Open WebUI ------------------------------------------------------------


def test_the_front_matter_is_a_docstring_on_the_first_line() -> None:
    found = front_matter(SOURCE)
    assert ast.get_docstring(TREE)
    for key in ("title", "author", "description", "license"):
        assert found[key]
    assert re.fullmatch(r"\d+\.\d+\.\d+", found["version"])
    assert re.fullmatch(r"\d+\.\d+\.\d+", found["required_open_webui_version"])
    assert "requirements" not in found


def test_the_host_has_no_word_of_it_to_rewrite() -> None:
    for name in ("utils", "apps", "main", "config"):
        assert f"from {name}" not in SOURCE


def test_nothing_is_installed_on_the_users_server() -> None:
    assert "requirements" + ":" not in SOURCE


def test_the_access_check_is_never_switched_off() -> None:
    assert "bypass_filter=True" not in SOURCE.replace(" ", "")
    assert '"bypass_filter":True' not in SOURCE.replace(" ", "")


@pytest.mark.parametrize("number", ["", "_" + "0123456789abcdef" * 2])
@pytest.mark.parametrize("function_id", ["x", "multi_model_conversation"])
def test_it_loads_under_the_name_the_host_gives_it(
    function_id: str, number: str
) -> None:
    module = load(f"function_{function_id}{number}")
    pipe = module.Pipe()
    assert [entry["id"] for entry in pipe.pipes()] == [
        "round_robin",
        "manager",
        "council",
        "debate",
    ]
    assert pipe.pipes()[1]["name"] == "Manager · Conversation"
    assert not hasattr(pipe, "name"), "the host would put it in front of each"
    assert module.own_function_id() == function_id
    assert not hasattr(module.Turn("Ann", ""), "__dict__")


def test_it_loads_where_open_webui_cannot_be_imported() -> None:
    program = (
        "import sys, types\n"
        "sys.modules['open_webui'] = None\n"
        "module = types.ModuleType('function_x')\n"
        "sys.modules['function_x'] = module\n"
        f"exec(open({str(PATH)!r}, encoding='utf-8').read(), module.__dict__)\n"
        "module.Pipe().pipes()\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


# -- imports ---------------------------------------------------------------------------


def imports() -> Iterator[tuple[int, str]]:
    """Line and first name of every import."""
    for node in ast.walk(TREE):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name.split(".")[0]) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            yield node.lineno, (node.module or "").split(".")[0]


def test_it_imports_only_what_every_open_webui_has() -> None:
    foreign = {name for _, name in imports()} - set(sys.stdlib_module_names)
    assert foreign - {"__future__"} <= ALLOWED


def test_only_the_host_section_imports_open_webui() -> None:
    lines = [line for line, name in imports() if name == "open_webui"]
    assert lines
    assert {section_at(line) for line in lines} == {HOST_SECTION}


def test_only_the_host_section_names_open_webui_in_code() -> None:
    tokens = tokenize.generate_tokens(io.StringIO(SOURCE).readline)
    docstrings = {
        node.body[0].lineno
        for node in ast.walk(TREE)
        if isinstance(node, (ast.Module, ast.ClassDef, *FUNCTION_KINDS))
        and ast.get_docstring(node) is not None
    }
    for token in tokens:
        if "open_webui" not in token.string or token.type == tokenize.COMMENT:
            continue
        line, logger = token.start[0], "getLogger(" in token.line
        assert section_at(line) == HOST_SECTION or line in docstrings or logger


# -- sections --------------------------------------------------------------------------


def test_the_sections_stand_in_their_order_under_banners() -> None:
    found = list(banners())
    assert [(number, title) for _, number, title in found] == list(enumerate(TITLES, 1))
    for line, _, _ in found:
        assert LINES[line - 2] == LINES[line] == "# " + "=" * 86


def test_the_map_at_the_top_lists_every_section() -> None:
    listed = re.findall(r"(?m)^#   (\d) (\w+(?: WebUI)?)  +\S", SOURCE)
    assert listed == [(str(n), title) for n, title in enumerate(TITLES, 1)]


def definitions() -> dict[str, int]:
    """Every name of the module, with the section that defines it."""
    found: dict[str, int] = {}
    for node in TREE.body:
        if isinstance(node, (ast.ClassDef, *FUNCTION_KINDS)):
            found[node.name] = section_at(node.lineno)
        targets = node.targets if isinstance(node, ast.Assign) else []
        if isinstance(node, ast.AnnAssign):
            targets = [node.target]
        for target in targets:
            for name in ast.walk(target):
                if isinstance(name, ast.Name):
                    found[name.id] = section_at(node.lineno)
    return found


def bound_in(function: FunctionNode) -> set[str]:
    """The names that mean something of a function's own inside it."""
    names = {node.arg for node in ast.walk(function) if isinstance(node, ast.arg)}
    for node in ast.walk(function):
        if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load):
            names.add(node.id)
        elif isinstance(node, (ast.ExceptHandler, ast.MatchAs)) and node.name:
            names.add(node.name)
        elif isinstance(node, ast.alias):
            names.add((node.asname or node.name).split(".")[0])
    return names


def names_used(
    node: ast.AST = TREE, bound: frozenset[str] = frozenset()
) -> Iterator[tuple[int, str]]:
    """Line and name of everything of the module that is read."""
    if isinstance(node, FUNCTION_KINDS):
        bound |= bound_in(node)
    read = isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)
    if isinstance(node, ast.Name) and read and node.id not in bound:
        yield node.lineno, node.id
    for child in ast.iter_child_nodes(node):
        yield from names_used(child, bound)


def test_each_section_uses_only_those_above_it() -> None:
    defined = definitions()
    below = [
        f"line {line}: {name} is of section {defined[name]}"
        for line, name in names_used()
        if name in defined and defined[name] > section_at(line)
    ]
    assert below == []


def test_no_name_is_defined_twice() -> None:
    names = [
        node.name
        for node in TREE.body
        if isinstance(node, (ast.ClassDef, *FUNCTION_KINDS))
    ]
    assert len(names) == len(set(names))


def test_the_pure_sections_never_wait() -> None:
    waiting = (
        ast.Await,
        ast.AsyncFor,
        ast.AsyncWith,
        ast.AsyncFunctionDef,
    )
    lines = [node.lineno for node in ast.walk(TREE) if isinstance(node, waiting)]
    assert not [line for line in lines if section_at(line) in PURE]


def test_the_pure_sections_know_no_clock_and_no_chance() -> None:
    used = [line for line, name in names_used() if name in CLOCKS]
    assert used
    assert not [line for line in used if section_at(line) in PURE]


def test_nothing_about_a_run_is_kept_on_the_pipe() -> None:
    pipe = next(node for node in CLASSES if node.name == "Pipe")
    for method in pipe.body:
        if not isinstance(method, FUNCTION_KINDS) or method.name == "__init__":
            continue
        for node in ast.walk(method):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                stored = isinstance(node.ctx, (ast.Store, ast.Del))
                assert not (stored and node.value.id in ("self", "cls"))
            assert not isinstance(node, (ast.Global, ast.Nonlocal))


def test_there_is_no_state_of_the_module_that_changes() -> None:
    assert not [n for n in ast.walk(TREE) if isinstance(n, (ast.Global, ast.Nonlocal))]


# -- size and shape --------------------------------------------------------------------

BLOCKS = (
    ast.If,
    ast.For,
    ast.AsyncFor,
    ast.While,
    ast.With,
    ast.AsyncWith,
    ast.Try,
    ast.Match,
)


def depth(node: ast.AST, level: int = 0) -> int:
    """How deep blocks are nested in a function; `elif` is no deeper than its `if`."""
    deepest = level
    for child in ast.iter_child_nodes(node):
        if isinstance(child, FUNCTION_KINDS):
            continue
        chained = isinstance(node, ast.If) and node.orelse == [child]
        inside = isinstance(child, BLOCKS)
        inside = inside and not (chained and isinstance(child, ast.If))
        deepest = max(deepest, depth(child, level + inside))
    return deepest


def named(node: FunctionNode) -> str:
    return f"line {node.lineno}: {node.name}"


def test_no_function_is_longer_than_fifty_lines() -> None:
    long = [
        named(node)
        for node in FUNCTIONS
        if (node.end_lineno or node.lineno) - node.lineno + 1 > 50
    ]
    assert long == []


def test_nothing_is_nested_deeper_than_three() -> None:
    assert [named(node) for node in FUNCTIONS if depth(node) > 3] == []


def test_nothing_takes_more_than_five_parameters() -> None:
    """The names of `Pipe.pipe` are the host's."""
    many = []
    for node in FUNCTIONS:
        given = node.args
        names = [a.arg for a in (*given.posonlyargs, *given.args, *given.kwonlyargs)]
        if len([name for name in names if name not in ("self", "cls")]) > 5:
            many.append(node.name)
    assert many == ["pipe"]


def test_no_other_rule_of_the_linter_is_set_aside() -> None:
    assert re.findall("noqa.*", SOURCE) == [
        "noqa: PLR0913 - the host passes what these names ask for"
    ]


def test_there_are_exactly_two_broad_excepts() -> None:
    broad = [
        node.lineno
        for node in ast.walk(TREE)
        if isinstance(node, ast.ExceptHandler)
        and (
            node.type is None
            or re.search(r"\b(Base)?Exception\b", ast.unparse(node.type))
        )
    ]
    assert len(broad) == 2
    for line in broad:
        assert "#" in LINES[line - 1], "a broad except says why it is one"


def test_a_cancellation_is_never_swallowed() -> None:
    handlers = (n for n in ast.walk(TREE) if isinstance(n, ast.ExceptHandler))
    for handler in handlers:
        if handler.type and "CancelledError" in ast.unparse(handler.type):
            assert isinstance(handler.body[-1], ast.Raise)


def test_everything_public_says_what_it_is_for() -> None:
    silent = [
        f"line {node.lineno}: {node.name}"
        for node in [*TREE.body, *(part for kind in CLASSES for part in kind.body)]
        if isinstance(node, (ast.ClassDef, *FUNCTION_KINDS))
        and not node.name.startswith("_")
        and not ast.get_docstring(node)
    ]
    assert silent == []


def test_there_is_nothing_left_to_do_in_it() -> None:
    assert not re.search(r"\b(TODO|FIXME|XXX)\b|type: ignore|breakpoint\(", SOURCE)
    assert "print(" not in SOURCE
