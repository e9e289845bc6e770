"""From a command line to a checked configuration, before anything heavy is imported.

Hydra composes the YAML groups and the overrides; the result is merged once more into the structured schema, because
`+new.key=1` slips past a structured config that Hydra itself composed. Every failure becomes a `UsageError` of one line that
names the field, the value and what is allowed.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence
from dataclasses import fields, is_dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar, get_args, get_type_hints

T = TypeVar("T")


class UsageError(ValueError):
    """A command line or configuration that cannot be run: what, which value, and what to do instead."""


def reject(field: str, value: object, allowed: str) -> None:
    """Raise the one error format that every check of a configuration uses."""
    raise UsageError(f"{field}={value!r}: {allowed}")


def package_folder(package: str, source_name: str) -> Path:
    """The folder of `configs/` or `recipes/`: beside the code in a checkout, inside site-packages when installed."""
    beside = Path(__file__).resolve().parent.parent / source_name
    if (beside / "__init__.py").is_file():
        return beside
    spec = find_spec(package)
    if spec is None or spec.origin is None:
        raise UsageError(
            f"{source_name}/ is neither beside the package nor installed as {package}: reinstall turbotrain"
        )
    return Path(spec.origin).parent


def configs_folder() -> Path:
    return package_folder("turbotrain_configs", "configs")


def recipes_folder() -> Path:
    return package_folder("turbotrain_recipes", "recipes")


def recipe_names() -> list[str]:
    return sorted(path.stem for path in recipes_folder().glob("*.yaml"))


def compose(config_name: str, overrides: Sequence[str], schema: type[T]) -> T:
    """Compose `configs/<config_name>.yaml` with `overrides` into an instance of the dataclass `schema`.

    Raises:
        UsageError: an override that cannot be parsed, an unknown key or choice, a value of the wrong type.
    """
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.core.config_store import ConfigStore
    from hydra.core.global_hydra import GlobalHydra
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    known = sorted(_flat_keys(schema))
    _check_shape(overrides, known)
    store = ConfigStore.instance()
    # A configuration that lists `<name>_schema` first takes overrides of keys that no YAML mentions.
    store.store(name=f"{config_name}_schema", node=schema)
    for path in sorted(recipes_folder().glob("*.yaml")):
        store.store(group="recipe", name=path.stem, node=_recipe_node(path), package="_global_")
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(config_dir=str(configs_folder()), version_base="1.3"):
            composed = hydra_compose(config_name, overrides=list(overrides))
        merged = OmegaConf.merge(OmegaConf.structured(schema), composed)
        result = OmegaConf.to_object(merged)
    except (HydraException, OmegaConfBaseException) as error:
        raise UsageError(_one_line(error, overrides, known)) from error
    assert isinstance(result, schema)
    return result


def _recipe_node(path: Path) -> Any:
    from omegaconf import OmegaConf

    try:
        return OmegaConf.load(path)
    except Exception as error:
        raise UsageError(f"recipe {path.stem}: not readable YAML: {str(error).splitlines()[0]}") from error


def _flat_keys(schema: type, prefix: str = "") -> Iterable[str]:
    for name, kind in get_type_hints(schema).items():
        if name not in {field.name for field in fields(schema)}:
            continue
        yield prefix + name
        inner = [kind, *get_args(kind)]
        for candidate in inner:
            if is_dataclass(candidate) and isinstance(candidate, type) and not _is_list(kind):
                yield from _flat_keys(candidate, f"{prefix}{name}.")


def _is_list(kind: object) -> bool:
    return getattr(kind, "__origin__", None) is list


def _check_shape(overrides: Sequence[str], known: Sequence[str]) -> None:
    """Name an unknown key with the nearest known ones; Hydra's own message does not."""
    groups = {path.name for path in configs_folder().iterdir() if path.is_dir()} | {"recipe"}
    for override in overrides:
        if "=" not in override and not override.startswith("~"):
            raise UsageError(f"argument {override!r} is not of the form key=value")
        key, _, value = override.lstrip("+~").partition("=")
        if key == "recipe" and value not in recipe_names():
            reject(
                "recipe", value, f"unknown; choose one of {', '.join(recipe_names())}{_nearest(value, recipe_names())}"
            )
        root = key.partition("@")[0]
        if "/" in root or root in groups:
            continue
        if key not in known:
            raise UsageError(f"{key}: unknown key (value {value!r}){_nearest(key, known)}")


def _nearest(word: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(word, known, n=3, cutoff=0.5)
    tails = [name for name in known if name.rpartition(".")[2] == word.rpartition(".")[2]]
    names = list(dict.fromkeys([*tails, *close]))[:3]
    return f"; did you mean {' or '.join(names)}?" if names else ""


def _one_line(error: Exception, overrides: Sequence[str], known: Sequence[str]) -> str:
    from omegaconf.errors import OmegaConfBaseException

    if isinstance(error.__cause__, OmegaConfBaseException):
        error = error.__cause__  # Hydra's own text hides the field and the reason
    text = " ".join(str(error).split())
    key = getattr(error, "full_key", None) or ""
    if match := re.search(r"Could not find '([\w./@-]+)'", text):
        group, _, choice = match.group(1).rpartition("/")
        folder = configs_folder() / group
        options = sorted(path.stem for path in folder.glob("*.yaml")) if folder.is_dir() else recipe_names()
        return f"{group}={choice!r}: unknown; choose one of {', '.join(options)}"
    if key and "not in" in text:
        return f"{key}: unknown key{_nearest(key, known)}"
    if match := re.match(r"Ambiguous value for argument '([^=']+)=(.*?)' 1\. ", text):
        return _wants_list(*match.groups())
    cause = text.split(" full_key:")[0]
    given = next((item for item in overrides if key and item.lstrip("+~").startswith(f"{key}=")), "")
    if given and "is not a ListConfig" in cause:
        return _wants_list(key, given.partition("=")[2])
    return f"{given or key or 'configuration'}: {cause}" if (given or key) else cause


def _wants_list(key: str, value: str) -> str:
    """Hydra's advice here is a sweep, which neither train.py nor infer.py makes."""
    return f"{key}={value}: a list stands in brackets, with quotes for the shell: '{key}=[{value}]'"
