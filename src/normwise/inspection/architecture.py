"""The model that a checkpoint is of, without its weights: from transformers' ``config.json``, or from a function of yours."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from contextlib import nullcontext
from importlib import import_module
from importlib.machinery import PathFinder
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn

from normwise import files
from normwise.errors import DataError, NormwiseError, a_kind_of, need


def from_config(path: str | Path) -> nn.Module:
    """The class that the config names under ``architectures``, on the meta device. Only transformers' own: no code of a checkpoint is run.

    Raises:
        DataError: for a file that is no config, or one of a model that transformers does not have.
        MissingExtraError: without transformers.
    """
    need("inspect", "transformers", what="--config")
    transformers = import_module("transformers")
    path = Path(path) / "config.json" if files.what_is(path) == files.FOLDER else Path(path)
    try:
        content: Any = json.loads(files.content(path, 1 << 24, "a config.json of transformers"))
        named = content["architectures"][0]
        cls = getattr(transformers, named)
        config = cls.config_class.from_dict(content)
        with torch.device("meta"):
            model: nn.Module = cls(config)
    except DataError:
        raise
    except Exception as error:    # a config may be of anything, and its class raises what it likes
        raise DataError(
            f"{path}: transformers {transformers.__version__} makes no model of it ({type(error).__name__}: {str(error)[:150]}); "
            "its 'architectures' must name one of its own classes."
        ) from error
    return model


def from_function(where: str) -> nn.Module:
    """What ``package.module:function`` returns, called without arguments and on the meta device. It is your code, and runs.

    Raises:
        DataError: where there is no such function, or it makes no module.
    """
    model = called(where, "meta")
    if not isinstance(model, nn.Module):
        raise DataError(f"the model {where!r} is {a_kind_of(model)}: the function must return a torch.nn.Module.")
    return model


def called(where: str, device: str | None = None) -> Any:
    """What ``package.module:function`` returns, called without arguments. device: torch's default within the call, not in its module.

    Raises:
        DataError: where there is no such function, or it needs arguments, or raises.
    """
    sys.path.insert(0, "")
    try:
        function = function_of(where, "model")
        with nullcontext() if device is None else torch.device(device):
            return function()
    except NormwiseError:
        raise
    except (Exception, SystemExit) as error:    # the user's own code
        said = " ".join(str(error).split())[:200].rstrip(".")
        raise DataError(f"the model {where!r} cannot be made: {type(error).__name__}: {said}. It is called without arguments.") from error
    finally:
        sys.path.remove("")


def source_files(where: str) -> list[Path]:
    """The files that importing the module of ``package.module:function`` would run, found without running any; empty where it has none."""
    module, _, function = where.partition(":")
    steps = module.split(".")
    if not function or not all(steps):
        return []
    sys.path.insert(0, "")
    try:
        spec = find_spec(steps[0])
        found = [spec]
        for i in range(2, len(steps) + 1):
            spec = PathFinder.find_spec(".".join(steps[:i]), spec.submodule_search_locations) if spec is not None else None
            found.append(spec)
    except Exception:    # whatever a finder of another package raises; the import itself tells what is wrong
        return []
    finally:
        sys.path.remove("")
    return [Path(one.origin) for one in found if one is not None and one.has_location and one.origin is not None]


def function_of(where: str, what: str) -> Callable[..., Any]:
    """``package.module:function`` itself. what: it is called in messages. Importing its module runs the user's code.

    Raises:
        DataError: where there is no such function.
    """
    module, _, name = where.partition(":")
    if not module or not name:
        raise DataError(f"the {what} {where!r} is no function: give package.module:function.")
    try:
        function: Any = import_module(module)
        for part in name.split("."):
            function = getattr(function, part)
    except NormwiseError:
        raise
    except (Exception, SystemExit) as error:    # the user's own code
        raise DataError(f"the {what} {where!r} cannot be imported: {type(error).__name__}: {str(error)[:200]}.") from error
    if not callable(function):
        raise DataError(f"the {what} {where!r} is {a_kind_of(function)}: give a function.")
    return function
