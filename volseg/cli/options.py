"""Options from a spec: one pydantic model gives the flags, their help, and the check of YAML and --set."""

from __future__ import annotations

import argparse
import re
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar, Union, get_args, get_origin

import yaml
from pydantic.fields import FieldInfo

from volseg.errors import SpecError, nearest
from volseg.spec import Spec

SpecT = TypeVar("SpecT", bound=Spec)


class Parser(argparse.ArgumentParser):
    """An argument parser that raises SpecError instead of ending the process, and hints at the nearest option."""

    def error(self, message: str) -> NoReturn:
        """Raise SpecError with what is wrong and where to read on."""
        raise SpecError(f"{message}: see '{self.prog} --help'")


def parse(parser: Parser, commands: dict[str, Parser], words: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line; an unknown option is refused with the nearest right name."""
    arguments, rest = parser.parse_known_args(words)
    if rest:
        command = commands.get(getattr(arguments, "command", None) or "", parser)
        known = [option for action in command._actions for option in action.option_strings]
        word = next((w for w in rest if w.startswith("-")), rest[0])
        hint = nearest(word.split("=")[0], known)
        raise SpecError(
            f"unknown argument {word!r}{hint}; nothing was done: '{command.prog} --help' lists what there is"
        )
    return arguments


def add_spec_options(
    parser: Parser, model: type[Spec], positional: Sequence[str] = (), *, file_first: bool = False
) -> None:
    """Add one option a field of `model`, dotted ones for groups; `positional` ones may come from the file instead.

    With `file_first` the spec file is the first argument, otherwise it is --spec.
    """
    for name in positional:
        parser.add_argument(
            name, nargs="?", default=argparse.SUPPRESS, metavar=name.upper(), help=_help(model.model_fields[name])
        )
    _add_fields(parser, model, "", positional)
    text = "YAML file with any of these options, underscores in their names; flags win over it"
    if file_first:
        parser.add_argument("spec", nargs="?", metavar="SPEC.yaml", help=text)
    else:
        parser.add_argument("--spec", metavar="FILE", help=text)
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", dest="assignments",
        help="set one field of the spec, as YAML; may be given several times and wins over everything",
    )  # fmt: skip


def _add_fields(parser: Parser, model: type[Spec], prefix: str, without: Sequence[str] = ()) -> None:
    section: argparse.ArgumentParser | argparse._ArgumentGroup = parser
    for name, field in model.model_fields.items():
        if name in model.sections:
            section = parser.add_argument_group(model.sections[name])
        group = group_of(field)
        if group is not None:
            _add_fields(parser, group, f"{prefix}{name}.")
        elif name not in without and get_origin(field.annotation) is not dict:
            flag, dest, text = "--" + (prefix + name).replace("_", "-"), prefix + name, _help(field)
            if field.annotation is bool:
                section.add_argument(
                    flag, dest=dest, action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS, help=text
                )
            else:
                section.add_argument(flag, dest=dest, default=argparse.SUPPRESS, metavar=_metavar(field), help=text)


def group_of(field: FieldInfo) -> type[Spec] | None:
    """Return the model of a field that is a group of options, None for a plain option."""
    annotation = field.annotation
    return annotation if isinstance(annotation, type) and issubclass(annotation, Spec) else None


def read_spec(
    arguments: argparse.Namespace, model: type[SpecT], read: Callable[[dict[str, Any]], SpecT] | None = None
) -> SpecT:
    """Merge file, flags and assignments into a checked spec, by `read` instead of `model.read`; raises SpecError."""
    values = load_yaml(arguments.spec) if arguments.spec else {}
    for name, value in vars(arguments).items():
        if name.split(".")[0] in model.model_fields:
            _assign(values, name.split("."), value)
    for text in arguments.assignments:
        key, sign, value = text.partition("=")
        if not sign:
            raise SpecError(f"--set {text!r} has no value: write --set key=value")
        _assign(values, key.strip().split("."), _parse_value(text, value))
    missing = [name for name, field in model.model_fields.items() if field.is_required() and name not in values]
    if missing:
        raise SpecError(f"{', '.join(m.upper() for m in missing)} must be given, as an argument or in the spec file")
    return (read or model.read)(values)


class _Loader(yaml.SafeLoader):
    """YAML whose whole numbers are those of JSON: 1:4 and 0:14 are text, not sums of sixties."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, rule) for tag, rule in rules if tag not in {"tag:yaml.org,2002:int", "tag:yaml.org,2002:float"}]
    for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"^[-+]?(0|[1-9][0-9]*)$"), list("-+0123456789"))
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?$"),
    list("-+.0123456789"),
)


def load_yaml(path: str) -> dict[str, Any]:
    """Return the options in a YAML file; raises SpecError where it cannot be read or holds something else."""
    try:
        content = yaml.load(Path(path).read_text(encoding="utf-8"), _Loader)
    except OSError as error:
        raise SpecError(f"spec {path} cannot be read ({error.strerror}); nothing was done: check the path") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise SpecError(
            f"spec {path} is no YAML ({reason}); nothing was done: correct it, and quote values with colons, such as "
            "roi: '0:14,:,:'"
        ) from None
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise SpecError(f"spec {path} must hold 'option: value' lines; nothing was done: see 'volseg segment --help'")
    return content


def _parse_value(text: str, value: str) -> Any:
    try:
        found = yaml.load(value, _Loader)
    except yaml.YAMLError:
        raise SpecError(f"--set {text!r}: the value is no YAML: quote it") from None
    # To YAML, a region such as 0:14,:,: is a group with a key that ends before the last colon.
    return value.strip() if isinstance(found, dict) and not value.lstrip().startswith("{") else found


def _assign(values: dict[str, Any], path: Sequence[str], value: Any) -> None:
    for part in path[:-1]:
        inner = values.setdefault(part, {})
        if not isinstance(inner, dict):
            raise SpecError(f"--set {'.'.join(path)}: {part!r} is no group of options: leave out the dot")
        values = inner
    values[path[-1]] = value


def _help(field: FieldInfo) -> str:
    text = field.description or ""
    if field.default is not None and not field.is_required() and field.annotation is not bool:
        shown = field.default
        if isinstance(shown, tuple):
            shown = ",".join(map(str, shown)) if all(isinstance(part, int) for part in shown) else ";".join(shown)
        text += f" [default: {shown}]"
    return text.replace("%", "%%")


def _metavar(field: FieldInfo) -> str:
    choices: list[str] = []
    for option in _union(field.annotation):
        if str(get_origin(option)) == "typing.Literal":
            choices += [str(choice) for choice in get_args(option)]
        elif get_origin(option) is tuple:
            inner = get_args(option)
            return "LIST" if Ellipsis in inner else "Z,Y,X" if len(inner) == 3 else "N"
        elif option in {int, float}:
            return "N" if option is int else "F"
    return "{" + ",".join(choices) + "}" if choices else "TEXT"


def _union(annotation: Any) -> tuple[Any, ...]:
    if get_origin(annotation) in {Union, types.UnionType}:
        return tuple(a for a in get_args(annotation) if a is not type(None))
    return (annotation,)
