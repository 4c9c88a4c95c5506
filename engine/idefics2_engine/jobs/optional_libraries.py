"""Import of libraries that only some inputs and outputs need."""

import importlib
from typing import Any

from idefics2_engine.errors import ConfigError, install_extras


def import_extra(module: str, extra: str) -> Any:
    """Return ``module``, which an extra of this package installs.

    Raises:
        ConfigError: It is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        name = module.partition(".")[0]
        raise ConfigError(
            f"{name} must be installed for this job, got none: {install_extras(extra)}"
        ) from error
