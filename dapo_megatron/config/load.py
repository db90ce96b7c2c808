"""YAML files, left to right, then overrides by path: one validated `Config`, or every problem at once.

A file holds nested mappings; later files win leaf by leaf. An override is `--a.b value` or `--a.b=value`, its value read as YAML
(`0.28`, `null`, `true`, `{lr: 1e-4}`). A path may be shortened to any ending that is unique in the schema, and written with dashes:
`--seed 7` is `--run.seed 7`, `--gpus-per-node 4` is `--slurm.gpus_per_node 4`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from dapo_megatron.config.fields import ConfigField, config_fields, did_you_mean, either, nearest, section_paths
from dapo_megatron.config.schema import Config
from dapo_megatron.config.slurm_text import RULES as SLURM_RULES
from dapo_megatron.types import ConfigError

_RULES = {
    "greater_than": "be greater than {gt:g}",
    "greater_than_equal": "be at least {ge:g}",
    "less_than": "be less than {lt:g}",
    "less_than_equal": "be at most {le:g}",
    "literal_error": "be {expected}",
    "bool_type": "be true or false",
    "int_type": "be an integer",
    "float_type": "be a number",
    "string_type": "be text (quote it if it looks like a number)",
    "dict_type": "be a mapping of names to values",
    "model_type": "be a mapping of names to values",
    "union_tag_invalid": "have a type of {expected_tags}",
    **SLURM_RULES,
}
"""What a value must do, by pydantic's error type."""


def load_config(files: Sequence[Path], overrides: Sequence[str] = (), *, base: Mapping[str, Any] | None = None) -> Config:
    """Merge `files` left to right over `base` (as of `resolved_dict`), apply `overrides` (command-line tokens), validate.

    Raises ConfigError whose `problems` name every unreadable file, unknown key, ambiguous override and value out of range.
    """
    problems: list[str] = []
    merged = _path_defaults()
    _merge(merged, base or {})
    for file in files:
        try:
            _merge(merged, _read_file(file))
        except ConfigError as error:
            problems += error.problems
    if problems:
        raise ConfigError(problems)

    tree, problems = _parse_overrides(overrides)
    _merge(merged, tree)
    try:
        # Strict JSON mode: text becomes a path and an integer a number, but "3" is no integer and true is no 1.
        config = Config.model_validate_json(json.dumps(merged), strict=True)
    except ValidationError as error:
        raise ConfigError(problems + list(_validation_problems(error))) from None
    if problems:
        raise ConfigError(problems)
    return config


def _path_defaults() -> dict[str, Any]:
    """Defaults that are paths, as text: strict JSON mode validates defaults too and takes no Path object."""
    tree: dict[str, Any] = {}
    for field in config_fields():
        if isinstance(field.default, Path):
            _put(tree, field.path, str(field.default))
    return tree


def resolved_dict(config: Config) -> dict[str, Any]:
    """All values of a run, defaults included, as plain JSON types. Written as JSON, it is a config file again."""
    return config.model_dump(mode="json")


class _ConfigLoader(yaml.SafeLoader):
    """SafeLoader that refuses a key given twice and reads 1e-6 as a number (YAML 1.1: text), dates and 24:00:00 as text (86400)."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode) or key_node.tag != "tag:yaml.org,2002:str":
                raise yaml.constructor.ConstructorError(None, None, "a key must be text", key_node.start_mark)
            if key_node.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key_node.value} is given twice", key_node.start_mark)
            seen.add(key_node.value)
        return super().construct_mapping(node, deep)


_ConfigLoader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in ("tag:yaml.org,2002:timestamp", "tag:yaml.org,2002:int")]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_ConfigLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)
_ConfigLoader.add_implicit_resolver(
    "tag:yaml.org,2002:int", re.compile(r"[-+]?(0b[01_]+|0[0-7_]+|0|[1-9][0-9_]*|0x[0-9a-fA-F_]+)$"), list("-+0123456789")
)


def parse_yaml(text: str, source: str) -> Any:
    """YAML as config files and overrides write it; ConfigError names the `source` of what cannot be read."""
    try:
        return yaml.load(text, Loader=_ConfigLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{source}, line {mark.line + 1}" if mark else source
        raise ConfigError(f"{place}: {getattr(error, 'problem', None) or error}; correct the YAML.") from None


def _parse_json(text: str, source: str) -> Any:
    """JSON is nearly YAML: a character that JSON writes as two escapes is not."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{source}, line {error.lineno}: {error.msg}; correct the JSON.") from None


def _read_file(file: Path) -> dict[str, Any]:
    try:
        text = file.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{file} cannot be read: {error.strerror}; give the path of a YAML file.") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file} must be UTF-8 text: {error}.") from None
    tree = _parse_json(text, str(file)) if file.suffix == ".json" else parse_yaml(text, str(file))
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ConfigError(f"{file} must hold a mapping of sections at its top, not {type(tree).__name__}.")
    return tree


def _merge(target: dict[str, Any], source: Mapping[str, Any], prefix: str = "") -> None:
    """Deep merge in place; an empty section (`actor:` with nothing under it) changes nothing."""
    for key, value in source.items():
        path = prefix + key
        if value is None and path in section_paths():
            continue
        if isinstance(value, Mapping) and isinstance(target.get(key), dict):
            _merge(target[key], value, path + ".")
        elif isinstance(value, Mapping):
            target[key] = {}
            _merge(target[key], value, path + ".")
        else:
            target[key] = value


def _parse_overrides(tokens: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """The overrides as a tree, and what is wrong with the others."""
    tree: dict[str, Any] = {}
    problems: list[str] = []
    remaining = list(reversed(tokens))
    while remaining:
        token = remaining.pop()
        if not token.startswith("--"):
            problems.append(f"{token} is neither an override nor the value of one; write --section.name value.")
            continue
        name, equals, text = token[2:].partition("=")
        if not equals:
            if not remaining or remaining[-1].startswith("--"):
                problems.append(f"--{name} needs a value; write --{name} VALUE (true or false for a switch).")
                continue
            text = remaining.pop()
        try:
            _put(tree, _resolve(name), parse_yaml(text, f"--{name}"))
        except ConfigError as error:
            problems += error.problems
    return tree, problems


def _resolve(name: str) -> str:
    """Full path of an override's name: itself, or the one field that ends with it; a dash is as good as an underscore."""
    if _owner_of(name) is not None:
        return name
    paths, name = [field.path for field in config_fields()], name.replace("-", "_")
    if name in paths or name in section_paths():
        return name
    endings = [path for path in paths if path.endswith("." + name)]
    if len(endings) == 1:
        return endings[0]
    if endings:
        raise ConfigError(f"--{name} is ambiguous; write {either('--' + path for path in endings)}.")
    raise ConfigError(_unknown_key(name, "--"))


def _owner_of(path: str) -> ConfigField | None:
    """The free mapping that `path` lies in."""
    return next((field for field in config_fields() if field.takes_any_key and path.startswith(field.path + ".")), None)


def _put(tree: dict[str, Any], path: str, value: Any) -> None:
    *sections, leaf = path.split(".")
    for section in sections:
        inner = tree.get(section)
        if not isinstance(inner, dict):
            inner = tree[section] = {}
        tree = inner
    tree[leaf] = value


def _validation_problems(error: ValidationError) -> Iterator[str]:
    meanings = {field.path: field.meaning for field in config_fields()}
    rules: dict[str, list[str]] = {}  # several when a field takes one of several types
    values: dict[str, str] = {}
    for fault in error.errors(include_url=False):
        path = _field_path([str(part) for part in fault["loc"]], meanings)
        if fault["type"] == "extra_forbidden":
            yield _unknown_key(path)
        elif fault["type"] == "missing":
            yield f"{path} is missing; set it in a file or with --{_example(path)}."
        else:
            template = _RULES.get(fault["type"])
            rule = template.format(**fault.get("ctx", {})).replace("'", "") if template else f"be valid: {fault['msg']}"
            rules.setdefault(path, []).append(rule)
            values[path] = json.dumps(fault["input"])
    for path, alternatives in rules.items():
        meaning = f" Meaning: {meanings[path]}" if meanings.get(path) else ""
        yield f"{path} ({values[path]}) must {either(alternatives)}.{meaning}"


def _field_path(parts: Sequence[str], known: Mapping[str, object]) -> str:
    """Where the fault is; pydantic appends the alternatives of a field with several types and inserts those of a section."""
    parts = [part for index, part in enumerate(parts) if not _is_tag(parts, index)]
    paths = [".".join(parts[:count]) for count in range(len(parts), 0, -1)]
    return next((path for path in paths if path in known), paths[0])


def _is_tag(parts: Sequence[str], index: int) -> bool:
    """Whether the part stands for the variant of a section (`hf` in `rollout.engine.hf.dtype`)."""
    before = ".".join(parts[:index])
    names = {path for path in (*section_paths(), *(field.path for field in config_fields()))}
    return 0 < index < len(parts) - 1 and before in section_paths() and f"{before}.{parts[index]}" not in names


def _example(path: str) -> str:
    """`a.b VALUE` for a leaf, `a.b VALUE --a.c VALUE` for the required leaves of a section."""
    required = [field.path for field in config_fields() if field.required and field.path.startswith(path + ".")]
    return " --".join(f"{leaf} VALUE" for leaf in required or [path])


def _unknown_key(path: str, dashes: str = "") -> str:
    """`actor.lr is not a configuration key; did you mean actor.optimizer.lr?`"""
    section, _, name = path.rpartition(".")
    every = sorted({*(field.path for field in config_fields()), *section_paths()})
    if path in every:
        return f"{dashes}{path} belongs to another {section}.type than the one chosen; remove it, or change the type."
    siblings = [known for known in every if known.rpartition(".")[0] == section]
    suggestions = (
        _called(nearest(name, _names(siblings)), siblings)
        or _called([name], every)
        or _called(nearest(name, _names(every)), every)
    )
    hint = did_you_mean(dashes + suggestion for suggestion in suggestions[:4]) or "; `dapo-megatron config` lists all keys."
    return f"{dashes}{path} is not a configuration key{hint}"


def _names(paths: Iterable[str]) -> set[str]:
    return {path.rpartition(".")[2] for path in paths}


def _called(names: Iterable[str], paths: Iterable[str]) -> list[str]:
    return [path for name in names for path in paths if path.rpartition(".")[2] == name]


__all__ = ["load_config", "nearest", "parse_yaml", "resolved_dict"]
