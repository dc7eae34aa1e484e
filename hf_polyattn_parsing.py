"""How arguments are read: dataclasses whose field docs are the help; a YAML file first, the command line on top.

A module of its own beside the package, for the reason that `hf_polyattn_arguments` gives.
"""

import argparse
import ast
import dataclasses
import difflib
import inspect
import itertools
import json
import re
import sys
from collections.abc import Iterator, Sequence
from decimal import Decimal
from pathlib import Path
from types import MappingProxyType
from typing import Any

import yaml

from hf_polyattn_scripts import DEBUG, answer_interrupts

Group = Any


class Help(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """The recipe's own header as it is, and defaults where there are any."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None else super()._get_help_string(action)


def check_usage(module: str, groups: Sequence[type], description: str | None) -> None:
    """In a script, answers --help and wrong arguments, and exits; call it above the imports that take long.

    module: the caller's `__name__`; nothing happens unless it is "__main__".
    """
    if module == "__main__":
        answer_interrupts()
        parse_arguments(None, groups, description)


def parse_arguments(
    argv: Sequence[str] | None, groups: Sequence[type], description: str | None = None
) -> tuple[Group, ...]:
    """One instance of each dataclass of `groups` from `[CONFIG.yaml] --name value ...`; the command line wins.

    argv: arguments without the program's name; None: sys.argv[1:].
    Exits with status 2 and a message that names the nearest known key when a key is unknown, in YAML or on the line.
    """
    from transformers import HfArgumentParser

    argv = list(sys.argv[1:] if argv is None else argv)
    for group in groups:
        add_help(group)
    parser = HfArgumentParser(
        groups,  # type: ignore[arg-type]
        usage="%(prog)s [CONFIG.yaml] [--name value ...]",
        description=description,
        epilog=f"{DEBUG}=1 in the environment shows the whole traceback of an error.",
        formatter_class=Help,
        allow_abbrev=False,
    )
    known = [field.name for group in groups for field in dataclasses.fields(group)]
    values: dict[str, Any] = {}
    if argv and not argv[0].startswith("-"):
        path = Path(argv.pop(0))
        if not path.is_file():
            parser.error(f"no such configuration file: {path}")
        values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
        if not isinstance(values, dict):
            parser.error(f"{path} must hold `name: value` lines")
        for name in values:
            if name not in known:
                parser.error(_unknown(f"{path}: unknown key {name!r}", name, known))
    try:
        argv = [_plain_number(word) for word in _fold_dotted(argv, values)]
    except ValueError as error:
        parser.error(str(error))
    words = [*_as_argv(values), *argv]
    # first, for the groups check their values when they are made, and some of that imports torch
    for word in parser.parse_known_args(words)[1]:
        name = word.lstrip("-").split("=")[0].replace("-", "_")
        parser.error(_unknown(f"unknown argument {word!r}", name, known))
    try:
        return parser.parse_args_into_dataclasses(words, look_for_args_file=False)
    except ValueError as error:
        parser.error(str(error))


def parse_values(group: type, values: dict[str, Any], name: str) -> Any:
    """One instance of a dataclass from a mapping, with the types and messages of the command line.

    Raises ValueError for a key that it has not, and for a value that is no such thing.
    """
    from transformers import HfArgumentParser

    known = [field.name for field in dataclasses.fields(group)]
    for key in values:
        if key not in known:
            raise ValueError(_unknown(f"{name}: unknown key {key!r}", key, known))
    parser = HfArgumentParser((group,), prog=name, exit_on_error=False, allow_abbrev=False)  # type: ignore[arg-type]
    try:
        return parser.parse_args_into_dataclasses(_as_argv(values), look_for_args_file=False)[0]
    except (argparse.ArgumentError, ValueError) as error:
        raise ValueError(f"{name}: {error}") from error


def add_help(group: type) -> type:
    """Copies the docstring under each field into its metadata, where HfArgumentParser looks for the help."""
    fields = {field.name: field for field in dataclasses.fields(group)}
    for cls in group.__mro__:
        if not dataclasses.is_dataclass(cls):
            continue
        for name, doc in _field_docs(cls):
            if name in fields and "help" not in fields[name].metadata:
                options: dict[str, Any] = {"help": " ".join(doc.split()).replace("%", "%%")}
                if fields[name].type == bool | None:
                    # --qk_norm alone means true, as it does for plain bools
                    options |= {"nargs": "?", "const": True}
                fields[name].metadata = MappingProxyType({**fields[name].metadata, **options})
    if group.__doc__ and "_argument_group_name" not in vars(group):
        group._argument_group_name = " ".join(group.__doc__.split()).rstrip(".")  # type: ignore[attr-defined]
    return group


def as_yaml(*groups: Group) -> str:
    """The arguments as a YAML file that `parse_arguments` reads back."""
    values: dict[str, Any] = {}
    for group in groups:
        values.update({k: v for k, v in dataclasses.asdict(group).items() if v is not None})
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)


def mapping(name: str, text: str) -> dict[str, Any]:
    """The mapping written as JSON or YAML in `text`."""
    try:
        value = yaml.safe_load(text) or {}
    except yaml.YAMLError:
        value = None
    if not isinstance(value, dict):
        raise ValueError(f"{name} must be a mapping such as {{n_layer: 4}}, got {text!r}")
    return value


def _field_docs(cls: type) -> Iterator[tuple[str, str]]:
    body = ast.parse(inspect.cleandoc("\n" + inspect.getsource(cls))).body[0].body  # type: ignore[attr-defined]
    for field, below in itertools.pairwise(body):
        if isinstance(field, ast.AnnAssign) and isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant):
            yield field.target.id, str(below.value.value)  # type: ignore[union-attr]


def _as_argv(values: dict[str, Any]) -> list[str]:
    # everything goes through argparse, so that YAML's 1e-3, which is a string, becomes a number like any other
    out: list[str] = []
    for name, value in values.items():
        if value is None:
            continue
        if isinstance(value, list):
            out += [f"--{name}", *(_plain_number(str(entry)) for entry in value)]
        else:
            out.append(f"--{name}={json.dumps(value) if isinstance(value, dict) else value}")
    return out


def _fold_dotted(argv: list[str], values: dict[str, Any]) -> list[str]:
    """Puts `--model_config.n_layer 2`, on top of any `--model_config` before it, into `values`; returns the rest.

    Raises ValueError for one without a value.
    """
    dotted = re.compile(r"--(\w[\w-]*)\.([\w.]+)(?:=(.*))?$", re.DOTALL)
    changed = {match[1].replace("-", "_") for match in map(dotted.match, argv) if match}
    rest, words = [], iter(argv)
    for word in words:
        match = dotted.match(word)
        whole, _, text = word.removeprefix("--").partition("=")
        name = (match[1] if match else whole).replace("-", "_")
        if match:
            text = _value_of(word, words) if match[3] is None else match[3]
            current = values.get(name) or {}
            current = mapping(name, current) if isinstance(current, str) else current
            values[name] = {**current, match[2]: yaml.safe_load(text)}
        elif word.startswith("--") and name in changed:
            values[name] = text or _value_of(word, words)
        else:
            rest.append(word)
    return rest


def _value_of(option: str, words: Iterator[str]) -> str:
    """The next word; ValueError where there is none, or another option."""
    word = next(words, None)
    if word is None or re.match("--[a-zA-Z]", word):
        raise ValueError(f"argument {option}: expected a value")
    return word


def _plain_number(word: str) -> str:
    """-1e-2 -> -0.01: argparse takes a word that starts with a minus for an option unless it is a plain number."""
    return format(Decimal(word), "f") if re.fullmatch(r"-[\d.]+[eE][-+]?\d+", word) else word


def _unknown(message: str, name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    return message + (f"; did you mean {near[0]!r}?" if near else "; --help lists what there is")
