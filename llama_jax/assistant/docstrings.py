"""Documentation of a module as data, from its source (by `ast`, importing nothing) or from the imported
module (C code has no source)."""

from __future__ import annotations

import ast
import copy
import dataclasses
import importlib
import inspect
import types
import warnings

LONGEST_DEFAULT = 16  # characters; a longer default value is shown as `...`


@dataclasses.dataclass(frozen=True)
class Definition:
    """One public class, function, method or property; `name` is dotted below the module, `signature` starts
    at the bracket."""

    name: str
    kind: str  # class | function | method | property
    signature: str | None  # "(iterable, /)", without annotations and without self
    docstring: str


@dataclasses.dataclass(frozen=True)
class ModuleDocumentation:
    """A module's docstring and its public definitions, in the order of the file (or of their names, if
    imported)."""

    module: str
    docstring: str
    definitions: tuple[Definition, ...]


def parse_module(module: str, source: str) -> ModuleDocumentation | None:
    """Reads documentation from source text; None if it does not parse under this Python."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in other people's strings
            tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None
    definitions: dict[str, Definition] = {}
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and _is_public(node.name):
            _add(definitions, node.name, "class", _class_signature(node), node)
            for member in node.body:
                if isinstance(member, _FUNCTIONS) and _is_public(member.name):
                    kind = "property" if "property" in _decorators(member) else "method"
                    _add(
                        definitions,
                        f"{node.name}.{member.name}",
                        kind,
                        _function_signature(member, in_class=True),
                        member,
                    )
        elif isinstance(node, _FUNCTIONS) and _is_public(node.name):
            _add(definitions, node.name, "function", _function_signature(node, in_class=False), node)
    return ModuleDocumentation(module, ast.get_docstring(tree) or "", tuple(definitions.values()))


def inspect_module(module: str) -> ModuleDocumentation | None:
    """Reads documentation from a module by importing it; None if this platform or Python version lacks it."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            loaded = importlib.import_module(module)
    except ImportError:
        return None
    listed = getattr(loaded, "__all__", None)
    definitions: dict[str, Definition] = {}
    for name in sorted(listed if listed is not None else dir(loaded)):
        value = getattr(loaded, name, None)
        # Without __all__ a module's names include what it imported for its own use.
        own = listed is not None or getattr(value, "__module__", None) == module
        if not own or not _is_public(name):
            continue
        if inspect.isclass(value):
            if value.__name__ != name:
                continue  # an alias: `importlib.resources.Resource` is `str`
            _add_inspected(definitions, name, "class", value)
            for member_name, member in sorted(vars(value).items()):
                is_callable = inspect.isroutine(member) or isinstance(member, classmethod | staticmethod)
                if is_callable and _is_public(member_name):
                    _add_inspected(
                        definitions,
                        f"{name}.{member_name}",
                        "method",
                        getattr(value, member_name),
                        raw=member,
                    )
        elif inspect.isroutine(value):
            _add_inspected(definitions, name, "function", value)
    return ModuleDocumentation(module, inspect.cleandoc(loaded.__doc__ or ""), tuple(definitions.values()))


_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


def _is_public(name: str) -> bool:
    return not name.startswith("_")


def _add(definitions: dict, name: str, kind: str, signature: str | None, node: ast.AST) -> None:
    docstring = ast.get_docstring(node)
    if docstring and name not in definitions:  # the first of several branches or overloads that is documented
        definitions[name] = Definition(name, kind, signature, docstring)


def _decorators(node: ast.FunctionDef | ast.AsyncFunctionDef) -> set[str]:
    names = set()
    for decorator in node.decorator_list:
        target = decorator.func if isinstance(decorator, ast.Call) else decorator
        name = target.id if isinstance(target, ast.Name) else getattr(target, "attr", "")
        names.add(
            "property" if name.endswith("property") or name in ("setter", "getter", "deleter") else name
        )
    return names


def _class_signature(node: ast.ClassDef) -> str | None:
    for member in node.body:
        if isinstance(member, ast.FunctionDef) and member.name == "__init__":
            return _function_signature(member, in_class=True)
    return None


def _function_signature(node: ast.FunctionDef | ast.AsyncFunctionDef, *, in_class: bool) -> str:
    """The argument list without annotations, and without the argument that the caller does not write."""
    arguments = copy.copy(node.args)
    bare = {
        id(arg): ast.arg(arg.arg) for arg in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)
    }
    arguments.posonlyargs = [bare[id(arg)] for arg in arguments.posonlyargs]
    arguments.args = [bare[id(arg)] for arg in arguments.args]
    arguments.kwonlyargs = [bare[id(arg)] for arg in arguments.kwonlyargs]
    arguments.vararg = arguments.vararg and ast.arg(arguments.vararg.arg)
    arguments.kwarg = arguments.kwarg and ast.arg(arguments.kwarg.arg)
    if in_class and "staticmethod" not in _decorators(node):
        positional = arguments.posonlyargs or arguments.args
        del positional[:1]
        count = len(arguments.posonlyargs) + len(arguments.args)
        arguments.defaults = arguments.defaults[-count:] if count else []
    arguments.defaults = [_short_default(default) for default in arguments.defaults]
    arguments.kw_defaults = [default and _short_default(default) for default in arguments.kw_defaults]
    return f"({ast.unparse(arguments)})"


def _short_default(default: ast.expr) -> ast.expr:
    if isinstance(default, ast.Constant):
        return default if len(repr(default.value)) <= LONGEST_DEFAULT else ast.Constant(...)
    return default if len(ast.unparse(default)) <= LONGEST_DEFAULT else ast.Constant(...)


def _add_inspected(definitions: dict, name: str, kind: str, value: object, raw: object = None) -> None:
    docstring = getattr(value, "__doc__", None)
    if isinstance(docstring, str) and docstring.strip():
        definitions[name] = Definition(
            name, kind, _inspected_signature(value, kind, raw), inspect.cleandoc(docstring)
        )


def _inspected_signature(value: object, kind: str, raw: object) -> str | None:
    try:
        signature = inspect.signature(value)
    except (ValueError, TypeError):
        return None  # many C functions carry no text signature
    parameters = list(signature.parameters.values())
    if kind == "method" and not isinstance(raw, classmethod | staticmethod | types.ClassMethodDescriptorType):
        # A C method bound to its type (`dict.fromkeys`) has no self to drop.
        if parameters and not isinstance(value, types.BuiltinMethodType):
            parameters = parameters[1:]
    bare = []
    for parameter in parameters:
        default = parameter.default
        if default is not parameter.empty and len(repr(default)) > LONGEST_DEFAULT:
            default = _Ellipsis()
        bare.append(parameter.replace(annotation=parameter.empty, default=default))
    return str(signature.replace(parameters=bare, return_annotation=signature.empty))


class _Ellipsis:
    def __repr__(self) -> str:
        return "..."
