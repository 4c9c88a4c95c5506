"""Search for a checkpoint's image settings.

transformers 5 saves the image processor inside ``processor_config.json``. Earlier releases read
``preprocessor_config.json``. Releases up to 4.46 fail if ``processor_config.json`` has image
settings. If both files have them, transformers 5 reads ``processor_config.json``, and so does this
module.
"""

from pathlib import Path

from idefics2_engine.json_file import Section, read_json, read_json_if_there
from idefics2_engine.model_files import printable_path

PROCESSOR = "processor_config.json"
PREPROCESSOR = "preprocessor_config.json"
NESTED = "image_processor"


def image_settings(folder: Path) -> Section:
    """Return the image processor's settings, with the name of the file that holds them.

    Raises:
        ConfigError: Neither file has the settings, or a file is unreadable.
    """
    path = folder / PROCESSOR
    nested = read_json_if_there(path)
    if nested.get(NESTED) is not None:
        values = Section(printable_path(path), nested).section(NESTED).values
        return Section(f"{printable_path(path)}: {NESTED}", values)
    path = folder / PREPROCESSOR
    return Section(printable_path(path), read_json(path))
