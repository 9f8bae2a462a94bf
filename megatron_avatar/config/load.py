"""From a command line to a validated `Config`: Hydra's groups over the typed schema."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import InterpolationResolutionError, OmegaConfBaseException, ValidationError

from megatron_avatar.config.nearest import absent_stage, unknown
from megatron_avatar.config.paths import fill, home
from megatron_avatar.config.schema import Config
from megatron_avatar.config.validate import validate

CONFIG_DIR = Path(__file__).parent.resolve()

# Settings that say what a run is called, where it runs and what it writes, not what it computes.
_BOOKKEEPING = ("name", "output_dir", "log", "checkpoint", "parallel", "cluster", "dry_run", "continue_changed",
                "replay_step")  # fmt: skip
# Settings of time and memory alone (micro-batches change sums by rounding), and the shape that a plan is for.
_COST = ("data.workers", "data.decode_deadline_s", "rl.tokens_per_micro_batch", "model.shape", "model.cold_start",
         "judge.endpoint",
         "judge.concurrency", "judge.deadline_s", "judge.retries", "judge.wait_s", "judge.max_unscored")  # fmt: skip

_ADDED = re.compile(r"\+\+?stages\.([\w-]+)=\{")  # a whole new stage, which Hydra can't add over the schema
_ODD = re.compile(r"[^\w\s./:@%*?|+-]", re.ASCII)
_MEANS = re.compile(r"""['"\[\]{}(),=$\\]""")  # quotes, lists, dictionaries, functions, sweeps, interpolations
# key=value of one key with a plain value or a quoted text: no group, no + or ~, no interpolation.
_PLAIN = re.compile(r"(?:seed|name|output_dir|dry_run|continue_changed|replay_step|\w+(?:\.\w+)+)="
                    r'(?:[\w./:@-]+|\[[\w.,+-]*\]|"[^"\\$]*")')  # fmt: skip
_QUOTED = re.compile(r"""'.*'|".*"|null|.*\$\{.*""", re.DOTALL)  # what the user has written for Hydra
_MOST = 2**63  # whole numbers beyond it fit into no step, seed or size


def load_config(overrides: list[str]) -> Config:
    """Compose a recipe with `key=value` overrides and validate the result.

    `recipe=NAME` (required) selects config/recipe/NAME.yaml, `ablation=NAME` a change on top of it (null: none);
    every other override names a key of the schema (`rl.n_on=8`, `+stages.visual.rewards.self=0.4` to
    add an entry to a dictionary, `~stages.visual` to remove one, `+stages.NAME={kind: rl, ...}` to add a
    stage). Raises ValueError naming the key, the value's expected type or the nearest valid name, and the
    choices where a recipe or group is unknown.
    AVATAR_CLUSTER in the environment is the default of `cluster=`.
    """
    overrides = [_written(readable(item)) for item in overrides if item != "ablation=null"]  # Hydra's own default
    site = os.environ.get("AVATAR_CLUSTER")
    if site and not any(item.startswith("cluster=") for item in overrides):
        overrides = [*overrides, f"cluster={site}"]
    try:
        config = _load(overrides)
    except (HydraException, OmegaConfBaseException) as error:
        raise ValueError(_explain(error, overrides)) from error
    _check_numbers(config)
    if not config.dry_run:
        fill(config)
    validate(config)
    return config


def apply(tree: DictConfig, settings: list[str]) -> None:
    """Set keys of a typed tree as `load_config` reads them. Raises ValueError naming the key and the remedy."""
    settings = [_written(readable(item)) for item in settings]
    try:
        for item in OverridesParser.create().parse_overrides(settings):
            OmegaConf.update(tree, item.key_or_group, item.value(), force_add=False)
    except (HydraException, OmegaConfBaseException) as error:
        raise ValueError(_explain(error, settings)) from error


def _written(item: str) -> str:
    """A `key=value` whose text comes out as it is written: 1e3, 007 and a,b are no numbers and no list in a name."""
    key, equals, value = item.partition("=")
    name = key.lstrip("+")
    schema = _schema()
    kind = schema.get(_pattern(name)) or schema.get(f"{_pattern(name).rpartition('.')[0]}.*")
    if not equals or not value or kind not in ("str", "str | None") or _QUOTED.fullmatch(value):
        return item
    try:
        parsed = OverridesParser.create().parse_override(item)
        if not parsed.is_sweep_override() and parsed.value() == value:
            return item
    except HydraException:
        pass
    escaped = re.sub(r"(\\+)(?=\"|$)", r"\1\1", value).replace('"', '\\"')
    return f'{key}="{escaped}"'


def _check_numbers(group: Any, prefix: str = "") -> None:
    """ValueError for a number that isn't finite, and for a whole one that no machine counts to."""
    items = group.items() if isinstance(group, dict) else enumerate(group) if isinstance(group, list) else (
        (item.name, getattr(group, item.name)) for item in fields(group))  # fmt: skip
    for name, value in items:
        key = f"{prefix}[{name}]" if isinstance(group, list) else f"{prefix}.{name}" if prefix else str(name)
        if isinstance(value, dict | list) or is_dataclass(value):
            _check_numbers(value, key)
        elif isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{key}={value}: write a finite number")
        elif isinstance(value, int) and abs(value) >= _MOST:
            raise ValueError(f"{key}={value}: write a number below {_MOST}")


def readable(item: str) -> str:
    """A `key=value` of a command line as Hydra takes it: a value is quoted whose letters (ü, #) it has no place for,
    though they mean nothing to it."""
    key, equals, value = home(item).partition("=")
    odd = _ODD.search(value) and not _MEANS.search(value)
    return f'{key}{equals}"{value}"' if odd else f"{key}{equals}{value}"


def _load(overrides: list[str]) -> Config:
    """Compose; what only gives a key another value is set without Hydra, which takes a tenth of a second."""
    added = {match[1] for item in overrides if (match := _ADDED.match(item))}
    late = [item for item in overrides if _stage(item) in added]
    early = [item for item in overrides if item not in late]
    others = [item.lstrip("+~").partition("=")[0] for item in early if not _PLAIN.fullmatch(item)]
    # The last of several for one key counts: where Hydra reads one of them, it reads all.
    plain = [item for item in early if _PLAIN.fullmatch(item) and not _is_below(item.partition("=")[0], others)]
    tree, recipe = _compose(CONFIG_DIR, tuple(item for item in early if item not in plain))
    tree = deepcopy(tree)
    parser = OverridesParser.create()
    try:
        for item in parser.parse_overrides(plain):
            OmegaConf.update(tree, item.key_or_group, item.value(), force_add=False)
    except (HydraException, OmegaConfBaseException):  # its own words and order; and what it takes all the same
        tree, recipe = _compose(CONFIG_DIR, tuple(early))
        tree = deepcopy(tree)
    for text, item in zip(late, parser.parse_overrides(late), strict=True):
        tree = _with_stage(tree, text, item)
    tree.name = _run_name(tree.name or recipe, overrides)
    config = OmegaConf.to_object(tree)
    assert isinstance(config, Config)
    return config


def _stage(item: str) -> str:
    """The stage that an override is about; "" for any other."""
    group, _, rest = item.lstrip("+~").partition("=")[0].partition(".")
    return rest.partition(".")[0] if group == "stages" else ""


def _with_stage(tree: DictConfig, text: str, item: Override) -> DictConfig:
    """The tree with what an override says of a stage that the command line adds, in the order of the line."""
    key, name = item.key_or_group, _stage(text)
    if item.is_delete():
        raise ValueError(f"{text}: +stages.{name} of this command line adds it; leave it out there")
    if _ADDED.match(text):
        if name in tree.stages:
            raise ValueError(f"{text}: the recipe has a stage {name} already; write stages.{name}.KEY=VALUE, or "
                             f"~stages.{name} before it")  # fmt: skip
        OmegaConf.set_struct(tree, False)
        merged = OmegaConf.merge(tree, {"stages": {name: item.value()}})
        assert isinstance(merged, DictConfig)
        tree = merged
        OmegaConf.set_struct(tree, True)
    else:
        OmegaConf.update(tree, key, item.value(), force_add=item.is_add())
    return tree


def _is_below(key: str, others: list[str]) -> bool:
    """Whether one of the others sets this key too; groups, whose names have no dot, come before it anyway."""
    return any(key == other or ("." in other and key.startswith(f"{other}.")) for other in others)


@cache
def _compose(folder: Path, overrides: tuple[str, ...]) -> tuple[DictConfig, str]:
    """The tree over the schema, interpolations left as they are, and the recipe's name."""
    ConfigStore.instance().store(name="schema", node=Config)
    OmegaConf.register_new_resolver("for_shape", _for_shape, replace=True)
    with initialize_config_dir(str(folder), version_base=None):
        composed = compose("config", list(overrides), return_hydra_config=True)
    plain = OmegaConf.to_container(composed, resolve=False)
    assert isinstance(plain, dict)
    recipe = composed.hydra.runtime.choices.recipe
    del plain["hydra"]
    # Merging once more refuses unknown keys that a leading + slipped past the schema.
    tree = OmegaConf.merge(OmegaConf.structured(Config), plain)
    assert isinstance(tree, DictConfig)
    OmegaConf.set_struct(tree, True)
    return tree, recipe


def _for_shape(shape: str, layouts: DictConfig) -> Any:
    """The entry for model.shape in a table of a parallel/*.yaml."""
    if shape not in layouts:
        known = ", ".join(layouts)
        raise ValueError(f"model.shape='{shape}' is none of parallel=NAME's ({known}): choose one, or parallel=single")
    return layouts[shape]


def save_config(config: Config, path: Path) -> None:
    """Write the resolved configuration as YAML, every key named; a full disk leaves what was there."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        aside.write_text(OmegaConf.to_yaml(OmegaConf.structured(config)), encoding="utf-8")
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


def differences(path: Path, config: Config) -> dict[str, tuple[Any, Any]]:
    """Dotted key -> (saved, now) where a saved configuration and this one compute differently (layout,
    micro-batches, logging and checkpoint frequency don't count)."""

    def flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
        items: dict[str, Any] = {}
        for key, value in tree.items():
            items |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
        return items

    saved = flat(OmegaConf.to_container(OmegaConf.load(path)))  # type: ignore[arg-type]
    now = flat(OmegaConf.to_container(OmegaConf.structured(config)))  # type: ignore[arg-type]
    return {
        key: (saved.get(key), now.get(key)) for key in sorted(saved.keys() | now.keys())
        if saved.get(key) != now.get(key) and key.split(".")[0] not in _BOOKKEEPING and key not in _COST
    }


def _run_name(name: str, overrides: list[str]) -> str:
    """The recipe's name, with the ablation's behind it, so that their runs never share a folder."""
    chosen = dict(item.split("=", 1) for item in overrides if "=" in item)
    ablation = re.sub(r"\W+", "-", chosen.get("ablation", "")).strip("-")
    return name if "name" in chosen or not ablation else f"{name}-{ablation}"


def _explain(error: BaseException, overrides: list[str]) -> str:
    """A message for the user out of Hydra's and OmegaConf's chained exceptions."""
    if isinstance(error, InterpolationResolutionError):
        return str(error).splitlines()[0].rpartition("interpolation: ")[2]
    if isinstance(error, OverrideParseException):
        if error.override.startswith("--"):
            return f"'{error.override}': settings are written key=value, as dry_run=true"
        signs = list(dict.fromkeys(re.findall(r"""[^\w./:@%*?|+-]""", error.override.partition("=")[2], re.ASCII)))
        if not signs:
            return f"'{error.override}' is not a key=value"
        return f"'{error.override}': {' '.join(signs)} can't stand in this value without quotes: 'key=\"value\"'"
    if isinstance(error, MissingConfigException):
        group, _, name = (error.missing_cfg_file or "").rpartition("/")
        return f"{group}={name}: there is no such {group}. Choose one of: {', '.join(_options(group))}"
    if ambiguous := re.match(r"Ambiguous value for argument '(.+)'", str(error)):
        return f"{ambiguous[1]}: one value is wanted; a list is written key=[a,b]"
    if str(error).startswith("You must specify 'recipe'"):
        return f"recipe is missing. Write recipe=NAME with one of: {', '.join(_options('recipe'))}"

    if absent := re.match(r"Could not delete from config\. '(.+)' does not exist", str(error)):
        return f"~{absent[1]}: the recipe has no such entry to leave out; check its spelling"

    cause = next((e for e in _chain(error) if getattr(e, "full_key", None)), None)
    if cause is None:
        return str(error)
    key: str = cause.full_key  # type: ignore[attr-defined]  # OmegaConf's and Hydra's errors have it
    if any(item.lstrip("+").startswith(f"stages.{key}.") for item in overrides):  # of an added one: the last part alone
        key = f"stages.{key}"
    where = re.match(r"In '?([\w/]+)'?:", str(error))
    prefix = f"{where[1]}.yaml: " if where else ""
    expected = _schema().get(_pattern(key))
    if isinstance(cause, ValidationError) and expected is not None:
        value = next((item.split("=", 1)[1] for item in overrides if item.lstrip("+").startswith(f"{key}=")), None)
        got = f", got '{value}'" if value is not None else f" ({str(cause.msg).splitlines()[0]})"
        return f"{prefix}{key}: expected {expected}{got}"
    if (stage := re.fullmatch(r"stages\.([^.]+)", key)) and stage[1] not in (stages := _stages(overrides)):
        return prefix + absent_stage(stage[1], stages)
    parent = _schema().get(_pattern(key.rpartition(".")[0]), "")
    if parent.startswith("dict"):
        return f"{prefix}{key}: there is no such entry. To add one write +{key}=..."
    if expected is not None:
        return f"{prefix}{key} can't be removed: give it another value"
    return prefix + unknown(key, _pattern(key), _schema(), _stages(overrides))


def _stages(overrides: list[str]) -> list[str]:
    """The stages of the recipe that the command line names; none where it can't be read."""
    chosen = tuple(item for item in overrides if item.startswith("recipe="))
    try:
        return list(_compose(CONFIG_DIR, chosen)[0].stages)
    except (HydraException, OmegaConfBaseException):
        return []


def _options(group: str) -> list[str]:
    return sorted(path.stem for path in (CONFIG_DIR / group).glob("*.yaml"))


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


@cache
def _schema(cls: type = Config, prefix: str = "") -> dict[str, str]:
    """Every dotted key of the schema with its type in words; `stages.*.steps` stands for any stage."""
    hints = get_type_hints(cls)
    keys: dict[str, str] = {}
    for item in fields(cls):
        hint, key = hints[item.name], prefix + item.name
        keys[key] = _type_name(hint)
        if isinstance(hint, type) and is_dataclass(hint):
            keys |= _schema(hint, f"{key}.")
        elif get_origin(hint) is dict:
            value = get_args(hint)[1]
            nested = isinstance(value, type) and is_dataclass(value)
            keys |= _schema(value, f"{key}.*.") if nested else {f"{key}.*": _type_name(value)}
    return keys


def _type_name(hint: Any) -> str:
    if is_dataclass(hint):
        return f"a group of settings ({', '.join(f.name for f in fields(hint))})"
    if get_origin(hint) is dict and is_dataclass(get_args(hint)[1]):
        return "dict of named entries"
    return hint.__name__ if isinstance(hint, type) and not get_args(hint) else str(hint)


def _pattern(key: str) -> str:
    """The key with the names that the user gives, and places in a list, taken out."""
    key = re.sub(r"^stages\.[^.]+", "stages.*", re.sub(r"\[\d+\]$", "", key))
    key = re.sub(r"^rl\.rewards\.[^.]+", "rl.rewards.*", key)
    return re.sub(r"^stages\.\*\.rewards\.[^.]+", "stages.*.rewards.*", key)

