"""Every name of Open WebUI that the plugin uses, and a look at whether it is there.

    python -m tests.unit.host_names [folder of an unpacked open_webui]

says what is missing. Sources are read, never imported: an import takes ten seconds,
and another version's package can be read beside the installed one.
"""

import ast
import importlib.util
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

FUNCTIONS: dict[str, dict[str, str]] = {
    "open_webui.models.chats": {
        "Chats.get_messages_map_by_chat_id": "async (id)",
        "Chats.is_chat_owner": "async (id, user_id)",
        "Chats.upsert_message_to_chat_by_id_and_message_id": (
            "async (id, message_id, message, *, touch)"
        ),
    },
    "open_webui.models.config": {"Config.get": "async (key, default)"},
    "open_webui.models.models": {"Models.get_models_by_ids": "async (ids)"},
    "open_webui.models.users": {"Users.get_user_by_id": "async (id)"},
    "open_webui.utils.access_control": {
        "has_permission": "async (user_id, permission_key, default_permissions)",
    },
    "open_webui.utils.chat": {
        "generate_chat_completion": (
            "async (request, form_data, user, *, bypass_system_prompt)"
        ),
    },
    "open_webui.utils.chat_id": {"is_saved_chat_id": "(chat_id)"},
    "open_webui.utils.files": {"get_image_base64_from_url": "async (url, *, user)"},
    "open_webui.utils.middleware": {
        "apply_source_context_to_messages": (
            "async (request, messages, sources, user_message)"
        ),
        "chat_completion_files_handler": "async (request, body, extra_params, user)",
        "chat_completion_tools_handler": (
            "async (request, body, extra_params, user, models, tools)"
        ),
        "chat_web_search_handler": "async (request, form_data, extra_params, user)",
        "get_citation_source_from_tool_result": (
            "(tool_name, tool_params, tool_result, tool_id)"
        ),
        "get_source_context": "(sources)",
        "process_tool_result": (
            "async (request, tool_function_name, tool_result, tool_type, "
            "direct_tool, metadata, user)"
        ),
        "store_tool_result_image": "async (request, image_url, metadata, user)",
        "terminal_event_handler": (
            "async (tool_function_name, tool_function_params, tool_result, "
            "event_emitter)"
        ),
    },
    "open_webui.utils.misc": {"get_message_list": "(messages_map, message_id)"},
    "open_webui.utils.models": {
        "get_all_models": "async (request, *, user)",
        "get_filtered_models": "async (models, user)",
    },
    "open_webui.utils.payload": {
        "apply_model_params_to_body_openai": "(params, form_data)",
        "resolve_system_prompt": "async (system, metadata, user)",
    },
    "open_webui.utils.response": {"merge_usage": "(current, incoming)"},
    "open_webui.utils.tools": {
        "get_builtin_tools": "async (request, extra_params, features, model)",
        "get_tools": "async (request, tool_ids, user, extra_params)",
        "get_updated_tool_function": "async (function, extra_params)",
    },
}
"""Module -> what is called there -> how: by position, and after `*` by name."""

VALUES: dict[str, tuple[str, ...]] = {
    "open_webui.env": ("BYPASS_MODEL_ACCESS_CONTROL", "REDIS_KEY_PREFIX", "VERSION"),
    "open_webui.internal.db": ("get_db",),
    "open_webui.main": ("app",),
    "open_webui.models.groups": ("GroupMember.group_id", "GroupMember.user_id"),
    "open_webui.utils.middleware": ("CITATION_TOOL_NAMES", "DEFAULT_REASONING_TAGS"),
}
"""Module -> what is read there, or called although it is no plain function."""

WITH_FALLBACK = (
    "open_webui.utils.middleware.CITATION_TOOL_NAMES",
    "open_webui.utils.middleware.store_tool_result_image",
    "request.state.model_id",
    "the event request:user_input",
    "the metadata regeneration_message_id",
)
"""What 0.11.0 does not have yet, and the plugin does without there."""

APP_STATE = ("MODELS", "redis")
"""What is read of `app.state`."""

REQUEST_STATE = ("bypass_filter", "bypass_system_prompt", "metadata", "model_id")
"""What the host keeps on `request.state`, and an inner call must not find there."""

PIPE_PARAMETERS = [
    "__event_call__",
    "__event_emitter__",
    "__metadata__",
    "__request__",
    "__user__",
]
"""What the host passes to `Pipe.pipe` by these names, beside `body`."""

TOOL_PARAMETERS = [
    "__chat_id__",
    "__event_call__",
    "__event_emitter__",
    "__files__",
    "__message_id__",
    "__messages__",
    "__metadata__",
    "__model__",
    "__request__",
    "__user__",
]
"""What we pass on to the host's tools and handlers."""

METADATA = [
    "assistant_message_id",
    "chat_id",
    "chat_variables",
    "features",
    "files",
    "folder_knowledge",
    "message_id",
    "model",
    "params",
    "regeneration_message_id",
    "session_id",
    "task",
    "task_body",
    "tools",
    "user_id",
    "user_message_id",
    "variables",
]
"""What is read of the metadata of a request."""

SETTINGS = ("models.default_params", "user.permissions", "web.search.enable")
"""Settings of the host that are read."""

PERMISSIONS = ("features.web_search",)
"""Permissions of a user that are asked for."""

PAGE_EVENTS = (
    "confirmation",
    "execute:tool",
    "request:user_input",
    "source",
    "status",
)
"""Types of events and questions that the page knows."""

VALVE_INPUTS = ("multiselect", "select")
"""Inputs of the valves that the page draws."""

RESPONSE_EVENTS = (
    "response.completed",
    "response.function_call_arguments.delta",
    "response.output_item.added",
    "response.output_item.done",
    "response.output_text.delta",
    "response.reasoning_text.delta",
)
"""Types of what is yielded, as the host reduces it into items."""

ITEM_TYPES = [
    "function_call",
    "function_call_output",
    "input_image",
    "input_text",
    "message",
    "output_text",
    "reasoning",
]
"""Types of the items and of their parts, as the host reads them."""

# -- an open_webui folder --------------------------------------------------------------

FunctionNode = ast.FunctionDef | ast.AsyncFunctionDef
Scope = ast.Module | ast.ClassDef


def installed() -> Path:
    """The folder of the installed package; it is not imported."""
    found = importlib.util.find_spec("open_webui")
    assert found and found.submodule_search_locations
    return Path(next(iter(found.submodule_search_locations)))


@cache
def text_of(path: Path) -> str:
    """A source, or nothing where there is none."""
    return path.read_text("utf-8") if path.exists() else ""


@cache
def tree_of(path: Path) -> ast.Module:
    """A source as a tree; the same one each time."""
    return ast.parse(text_of(path))


@dataclass(frozen=True, slots=True)
class Package:
    """The `open_webui` of one version, as its files say."""

    root: Path

    def source_path(self, module: str) -> Path:
        """The file of `open_webui.a.b`, whether it is a module or a package."""
        path = self.root.joinpath(*module.split(".")[1:])
        package = path / "__init__.py"
        return package if package.exists() else path.with_suffix(".py")

    def find(self, module: str, dotted: str) -> ast.AST | None:
        """What `dotted` names in a module: a function, a class, or an assignment."""
        scope: ast.AST | None = tree_of(self.source_path(module))
        for name in dotted.split("."):
            if isinstance(scope, ast.Assign | ast.AnnAssign):
                scope = self._class_of(module, scope)
            if not isinstance(scope, Scope):
                return None
            scope = self._member(scope, name)
        if isinstance(scope, ast.ImportFrom):
            return self.find(str(scope.module), dotted.split(".")[-1])
        return scope

    def _class_of(self, module: str, assigned: ast.AST) -> ast.AST | None:
        """The class of an object that a module makes at its end: `Users = Table()`."""
        value = getattr(assigned, "value", None)
        if not (isinstance(value, ast.Call) and isinstance(value.func, ast.Name)):
            return None
        return self.find(module, value.func.id)

    def _member(self, scope: Scope, name: str) -> ast.AST | None:
        found: ast.AST | None = None
        for node in scope.body:
            if name in set(_bound_by(node)):
                found = node
        return found

    def constants(self, *modules: str) -> set[str]:
        """All strings of these modules."""
        trees = (tree_of(self.source_path(module)) for module in modules)
        nodes = (node for tree in trees for node in ast.walk(tree))
        values = (node.value for node in nodes if isinstance(node, ast.Constant))
        return {value for value in values if isinstance(value, str)}

    def page(self) -> Iterator[str]:
        """The scripts of the page."""
        for path in sorted(self.root.glob("frontend/_app/immutable/*/*.js")):
            yield path.read_text("utf-8", "replace")


def _bound_by(node: ast.stmt) -> Iterator[str]:
    """The names a statement defines."""
    match node:
        case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
            yield node.name
        case ast.Assign():
            yield from (t.id for t in node.targets if isinstance(t, ast.Name))
        case ast.AnnAssign(target=ast.Name(id=name)):
            yield name
        case ast.ImportFrom():
            yield from (alias.asname or alias.name for alias in node.names)


# -- what is missing -------------------------------------------------------------------


def read_use(use: str) -> tuple[bool, list[str], list[str]]:
    """A row's `async (a, b, *, c)`: whether awaited, what by position, what by name."""
    definition = ast.parse(f"{use.replace('(', 'def f(')}: ...").body[0]
    assert isinstance(definition, FunctionNode)
    given = definition.args
    awaited = isinstance(definition, ast.AsyncFunctionDef)
    return awaited, [a.arg for a in given.args], [a.arg for a in given.kwonlyargs]


def misfit(node: ast.AST, use: str, method: bool) -> str:
    """Why a function cannot be called as a row says, or nothing."""
    awaited, by_position, by_name = read_use(use)
    if not isinstance(node, FunctionNode):
        return "is no function"
    if isinstance(node, ast.AsyncFunctionDef) != awaited:
        return "is to be awaited" if not awaited else "is not to be awaited any more"
    given = node.args
    static = any("staticmethod" in ast.unparse(d) for d in node.decorator_list)
    positional = [a.arg for a in given.args][1 if method and not static else 0 :]
    if positional[: len(by_position)] != by_position:
        return f"takes ({', '.join(positional)}), and not ({', '.join(by_position)})"
    names = {*positional, *(a.arg for a in given.kwonlyargs)}
    if missing := sorted(set(by_name) - names):
        return f"takes no {', '.join(missing)}"
    optional = positional[len(positional) - len(given.defaults) :]
    optional += [
        a.arg
        for a, default in zip(given.kwonlyargs, given.kw_defaults, strict=True)
        if default is not None
    ]
    wanted = sorted(names - {*by_position, *by_name, *optional})
    return f"now wants {', '.join(wanted)}" if wanted else ""


def _functions_missing(host: Package) -> Iterator[str]:
    for module, rows in FUNCTIONS.items():
        for name, use in rows.items():
            node = host.find(module, name)
            problem = "is gone" if node is None else misfit(node, use, "." in name)
            if problem:
                yield f"{module}.{name} {problem}"
    for module, names in VALUES.items():
        for name in names:
            if host.find(module, name) is None:
                yield f"{module}.{name} is gone"


def _strings_missing(host: Package) -> Iterator[str]:
    main = "open_webui.main"
    middleware, chat = "open_webui.utils.middleware", "open_webui.utils.chat"
    places = {
        "metadata": (METADATA, (main, middleware, "open_webui.routers.tasks")),
        "parameter": (PIPE_PARAMETERS, ("open_webui.functions",)),
        "tool parameter": (
            TOOL_PARAMETERS,
            (middleware, "open_webui.utils.tools", "open_webui.tools.builtin"),
        ),
        "setting": (SETTINGS, ("open_webui.config",)),
        "permission": (PERMISSIONS, (middleware, "open_webui.routers.retrieval")),
    }
    for what, (names, modules) in places.items():
        known = host.constants(*modules)
        if what == "tool parameter":  # also as a parameter of a built-in tool
            texts = "".join(text_of(host.source_path(module)) for module in modules)
            known |= set(re.findall(r"\b__\w+__\b", texts))
        yield from (f"the {what} {name} is gone" for name in names if name not in known)
    states = "".join(text_of(host.source_path(m)) for m in (main, middleware, chat))
    for name in APP_STATE:
        if not re.search(rf"(?m)^app\.state\.{name}\b.* = ", states):
            yield f"app.state.{name} is gone"
    for name in REQUEST_STATE:
        if not re.search(rf"request\.state\.{name}\b|request\.state, '{name}'", states):
            yield f"request.state.{name} is gone"


def _events_missing(host: Package) -> Iterator[str]:
    known = host.constants("open_webui.utils.response", "open_webui.utils.middleware")
    for event in RESPONSE_EVENTS:
        kind, _, verb = event.removeprefix("response.").partition(".")
        in_general = verb == "delta" and {kind, ".delta"} <= known
        if event not in known and not in_general:
            yield f"the event {event} is gone"
    yield from (f"the item {name} is gone" for name in ITEM_TYPES if name not in known)
    asked = {f'==="{name}"': f"the event {name}" for name in PAGE_EVENTS}
    asked |= {f'"{name}"': f"the input {name}" for name in VALVE_INPUTS}
    for script in host.page():
        asked = {code: name for code, name in asked.items() if code not in script}
        if not asked:
            return
    yield from (f"{name} is gone" for name in asked.values())


def missing(host: Package) -> list[str]:
    """What the plugin uses and this version does not have, or has otherwise."""
    return [
        *_functions_missing(host),
        *_strings_missing(host),
        *_events_missing(host),
    ]


def main(arguments: list[str]) -> int:
    """Say what is missing in a folder, by default the installed one."""
    found = missing(Package(Path(arguments[0]) if arguments else installed()))
    done_without = {f"{name} is gone" for name in WITH_FALLBACK}
    for line in found:
        print(f"{line} (done without)" if line in done_without else line)
    return 1 if set(found) - done_without else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
