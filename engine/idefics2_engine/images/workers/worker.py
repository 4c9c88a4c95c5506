"""A worker process: image files come in through a socket, pixels go out through shared memory.

It opens no file and no connection of its own: the engine's process reads and downloads files, by
the rules of ``loader``, and sends their bytes. The process ends when its socket closes, which
happens at the latest when the engine's process ends, in whatever way.
"""

import mmap
import os
import signal
import socket
from dataclasses import asdict
from typing import Any

import numpy as np
import numpy.typing as npt

from idefics2_engine.errors import ImageError
from idefics2_engine.images.file_tiles import PillowSwitches, TileRules, decoded_tiles
from idefics2_engine.images.parallel import keep_blocks
from idefics2_engine.images.policy import ImagePolicy
from idefics2_engine.images.tiling import ImageConfig, Tile
from idefics2_engine.images.workers.frames import receive, send

# Tiles start at multiples of a line of the CPU's cache
ALIGNMENT = 64


def main(connection_fd: int, memory_fd: int, memory_size: int) -> None:
    """Answer jobs until the connection closes.

    Args:
        connection_fd: A connected socket.
        memory_fd: The shared memory.
        memory_size: Its size in bytes.
    """
    # An interrupt is for the engine's process, which decides what becomes of the job
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    connection = socket.socket(fileno=connection_fd)
    memory = mmap.mmap(memory_fd, memory_size)
    os.close(memory_fd)
    keep_blocks(threads=1)
    try:
        send(connection, {"ready": True})
        while (job := receive(connection)) is not None:
            send(connection, _answer(*job, memory))
    except ConnectionError:
        # The engine's process ended while this one was decoding
        return


def job(name: str, rules: TileRules, begin: int, end: int) -> dict[str, Any]:
    """Return the message that asks for the tiles of a file, to be written between two places."""
    pillow = PillowSwitches.current()
    return {
        "name": name,
        "rules": asdict(rules),
        "pillow": asdict(pillow),
        "begin": begin,
        "end": end,
    }


def aligned(size: int) -> int:
    """Return ``size`` rounded up to the alignment of tiles."""
    return -(-size // ALIGNMENT) * ALIGNMENT


def _answer(job: dict[str, Any], data: bytes, memory: mmap.mmap) -> dict[str, Any]:
    """Return the reply to a job: where its tiles are, or why there are none."""
    PillowSwitches(**job["pillow"]).apply()
    try:
        tiles, info = decoded_tiles(data, job["name"], _rules(job["rules"]))
        return {
            "tiles": _write_tiles(tiles, memory, job["begin"], job["end"]),
            "info": asdict(info),
        }
    except ImageError as error:
        return {"error": str(error)}
    except Exception as error:
        return {"failure": type(error).__name__}


def _rules(fields: dict[str, Any]) -> TileRules:
    image_config = ImageConfig(**fields["image_config"])
    policy = ImagePolicy(fields["policy"])
    return TileRules(**fields | {"image_config": image_config, "policy": policy})


def _write_tiles(
    tiles: list[Tile], memory: mmap.mmap, begin: int, end: int
) -> list[dict[str, Any]]:
    """Write whole patches, one tile after the other, and return each one's shape and fingerprint."""
    written = []
    for tile in tiles:
        rows, columns = tile.grid
        shape = rows * tile.patch_size, columns * tile.patch_size, 3
        assert begin + shape[0] * shape[1] * 3 <= end
        target: npt.NDArray[np.uint8] = np.ndarray(shape, np.uint8, memory, begin)
        target[:] = tile.pixels[: shape[0], : shape[1]]
        fingerprint = Tile(target, tile.patch_size, tile.grid_side).fingerprint
        written.append({"shape": shape, "fingerprint": fingerprint.hex()})
        begin += aligned(target.nbytes)
    return written
