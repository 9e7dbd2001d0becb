"""Reading the standard library: Python sources through their syntax tree, C modules by looking into them.

`scan` reads one source file without running it, `inspect_c` looks into a C module, `namespace` joins them
into the names that a user writes: `json.JSONDecoder`, not `json.decoder.JSONDecoder`. All of it is cached.
"""

import ast
import contextlib
import importlib
import importlib.machinery
import importlib.util
import inspect
import io
import re
import sys
import tokenize
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from famc.steps.pystdlib_id import SKIPPED_FOLDERS, SKIPPED_MODULES, STDLIB, source_files

# Documented under a better name elsewhere: loses every tie for the same text.
_ALIASES = "genericpath imp nt ntpath posix posixpath pyexpat sre_compile sre_constants sre_parse"
LESS_PUBLIC = frozenset(_ALIASES.split())


# ---------------------------------------------------------------- reading one module


@dataclass(frozen=True, slots=True)
class Found:
    kind: str
    signature: str
    doc: str


@dataclass(slots=True)
class Module:
    """What a module defines, before anyone asks what is public."""

    doc: str = ""
    objects: dict[str, Found] = field(default_factory=dict)  # `JSONDecoder`, `JSONDecoder.decode`
    imports: list[tuple[str, str, str]] = field(
        default_factory=list
    )  # local name, module, its name there or `*`
    bound: set[str] = field(default_factory=set)  # every name at module level
    exported: set[str] = field(default_factory=set)  # literal names in `__all__`


@cache
def sources() -> dict[str, str]:
    """Module name -> path under the library folder, for what is written in Python."""
    found = {}
    for path, _ in source_files():
        module = path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        known = module.partition(".")[0] in sys.stdlib_module_names and not module.endswith("__main__")
        if path.endswith(".py") and known:
            found[module] = path
    return found


def read(path: str) -> str:
    with tokenize.open(STDLIB / path) as file:  # honours the coding cookie; newlines become \n
        return file.read()


@cache
def scan(module: str) -> Module:
    """Read a Python source: its documentation, definitions and imports. Nothing is run."""
    path = sources()[module]
    package = module if path.endswith("__init__.py") else module.rpartition(".")[0]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tree = ast.parse(read(path))
    found = Module(doc=ast.get_docstring(tree) or "")
    for node in _statements(tree.body):
        match node:
            case ast.FunctionDef() | ast.AsyncFunctionDef():
                found.bound.add(node.name)
                if is_public(node.name) and node.name not in found.objects:
                    found.objects[node.name] = _function(node, "function")
            case ast.ClassDef():
                found.bound.add(node.name)
                if node.name not in found.objects:
                    _add_class(found, node)
            case ast.ImportFrom():
                base = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
                source = ".".join([*base, *([node.module] if node.module else [])])
                for alias in node.names:
                    found.imports.append((alias.asname or alias.name, source, alias.name))
                    found.bound.add(alias.asname or alias.name)
            case ast.Import():
                found.bound.update(alias.asname or alias.name.partition(".")[0] for alias in node.names)
            case _:
                names = [name for name in ast.walk(node) if isinstance(name, ast.Name)]
                found.bound.update(name.id for name in names if isinstance(name.ctx, ast.Store))
                if any(name.id == "__all__" for name in names):
                    texts = [text.value for text in ast.walk(node) if isinstance(text, ast.Constant)]
                    found.exported.update(text for text in texts if isinstance(text, str))
    return found


def _statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Statements at module level, also those under `if`, `try` and `with`."""
    for node in body:
        if isinstance(node, ast.If | ast.Try | ast.With):
            for name in ("body", "handlers", "orelse", "finalbody"):
                for inner in getattr(node, name, []):
                    yield from _statements(inner.body if isinstance(inner, ast.ExceptHandler) else [inner])
        else:
            yield node


def _function(node: ast.FunctionDef | ast.AsyncFunctionDef, kind: str) -> Found:
    decorators = {ast.unparse(decorator).rpartition(".")[2] for decorator in node.decorator_list}
    kind = "property" if decorators & {"property", "cached_property", "setter", "getter", "deleter"} else kind
    first = kind == "method" and "staticmethod" not in decorators
    return Found(kind, _signature(node.args, first), ast.get_docstring(node) or "")


def _signature(args: ast.arguments, drop_first: bool) -> str:
    """`(a, *p)`: names and defaults without annotations, which would drown them."""
    for arg in [*args.posonlyargs, *args.args, *args.kwonlyargs, args.vararg, args.kwarg]:
        if arg is not None:
            arg.annotation = None
    positional = args.posonlyargs or args.args
    if drop_first and positional:
        if len(args.defaults) == len(args.posonlyargs) + len(args.args):
            args.defaults.pop(0)
        positional.pop(0)
    return f"({ast.unparse(args)})"


def _add_class(found: Module, node: ast.ClassDef) -> None:
    functions = [
        item for item in _statements(node.body) if isinstance(item, ast.FunctionDef | ast.AsyncFunctionDef)
    ]
    members: dict[str, Found] = {}
    for item in functions:
        if is_public(item.name) or item.name in ("__init__", "__new__"):
            members.setdefault(item.name, _function(item, "method"))
    maker = members.get("__init__") or members.get("__new__")
    found.objects[node.name] = Found("class", maker.signature if maker else "", ast.get_docstring(node) or "")
    for name, member in members.items():
        found.objects[f"{node.name}.{name}"] = member


@cache
def inspect_c(module: str) -> Module:
    """Look into a module written in C. It is imported in silence; what cannot be is empty."""
    found = Module()
    silence = io.StringIO()
    with warnings.catch_warnings(), contextlib.redirect_stdout(silence), contextlib.redirect_stderr(silence):
        warnings.simplefilter("ignore")
        try:
            loaded = importlib.import_module(module)
        except ImportError:  # an extension built without its library
            return found
    found.doc = inspect.cleandoc(loaded.__doc__ or "")
    found.bound.update(dir(loaded))
    for name, value in sorted(vars(loaded).items()):
        if isinstance(value, type):
            found.objects[name] = _c_object(value, "class")
            for inner, member in sorted(vars(value).items()):
                member = member.__func__ if isinstance(member, staticmethod | classmethod) else member
                if inspect.isroutine(member):
                    found.objects[f"{name}.{inner}"] = _c_object(member, "method")
        elif inspect.isbuiltin(value):
            found.objects[name] = _c_object(value, "function")
    return found


def _c_object(value: Any, kind: str) -> Found:
    doc = value.__doc__ if isinstance(value.__doc__, str) else ""
    signature = getattr(value, "__text_signature__", None) or ""
    signature = re.sub(r"^\(\$\w+(?:, /)?(?:, )?", "(", signature)  # ($module, x, /), ($self, /, x)
    return Found(kind, re.sub(r"<[^<>]*>", "...", signature), inspect.cleandoc(doc))


# ---------------------------------------------------------------- the names that users write


@cache
def _is_c() -> frozenset[str]:
    """Top-level modules without a source: built in, or an extension."""
    names = [name for name in sorted(sys.stdlib_module_names) if name not in sources()]
    names = [name for name in names if name not in SKIPPED_MODULES | SKIPPED_FOLDERS and "test" not in name]
    specs = [(name, importlib.util.find_spec(name)) for name in names]
    suffixes = tuple(importlib.machinery.EXTENSION_SUFFIXES)
    return frozenset(
        name
        for name, spec in specs
        if spec and (spec.origin == "built-in" or str(spec.origin).endswith(suffixes))
    )


def scan_or_inspect(module: str) -> Module:
    """What a module defines; nothing where there is no such module on this platform."""
    if module in sources():
        return scan(module)
    return inspect_c(module) if module in _is_c() else Module()


@cache
def namespace(module: str, hops: int = 3) -> dict[str, Found]:
    """Local dotted name -> object: what the module defines and, at most so many hops away, re-exports."""
    found = scan_or_inspect(module)
    objects = dict(found.objects)
    package = sources().get(module, "").endswith("__init__.py")
    for local, source, name in found.imports if hops else ():
        own = source.partition(".")[0].lstrip("_") == module.partition(".")[0].lstrip("_")
        private = own or source.startswith("_") or source in LESS_PUBLIC
        if (
            source == module
            or not private
            or not (name == "*" or local in found.exported or (package and own))
        ):
            continue
        for inner, value in namespace(source, hops - 1).items():
            head, _, rest = inner.partition(".")
            if name == "*" and not head.startswith("_"):
                objects.setdefault(inner, value)
            elif head == name:
                objects.setdefault(f"{local}.{rest}" if rest else local, value)
    return objects


@cache
def public_modules() -> tuple[str, ...]:
    """Every module without an underscore in its name, sorted."""
    return tuple(sorted(name for name in [*sources(), *_is_c()] if is_public(name)))


def is_public(name: str) -> bool:
    """Whether no part of a dotted name starts with an underscore."""
    return not any(part.startswith("_") for part in name.split("."))


def exists(module: str, attribute: str) -> bool:
    """Whether the module binds the name on this or, as far as the sources tell, any platform."""
    found = scan_or_inspect({"os.path": "posixpath"}.get(module, module))
    starred = [source for _, source, name in found.imports if name == "*" and source != module]
    inner = f"{module}.{attribute}"
    return (
        attribute in found.bound or inner in sources() or any(exists(source, attribute) for source in starred)
    )
