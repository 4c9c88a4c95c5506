"""Reading of the values of a checkpoint's tensors, from files whose headers were checked."""

from collections.abc import Iterable, Iterator
from itertools import groupby

from safetensors import SafetensorError, safe_open
from torch import Tensor

from idefics2_engine.checkpoint.safetensors_header import StoredTensor
from idefics2_engine.errors import CheckpointError
from idefics2_engine.model_files import printable_path


def read_values(tensors: Iterable[StoredTensor]) -> Iterator[tuple[StoredTensor, Tensor]]:
    """Yield each of ``tensors`` with its values on the CPU, in the given order.

    A file is opened once for consecutive tensors.

    Raises:
        CheckpointError: A file cannot be read, for example because it was changed after its header
            was read.
    """
    for file, of_file in groupby(tensors, key=lambda tensor: tensor.file):
        try:
            with safe_open(file, framework="pt", device="cpu") as opened:
                for tensor in of_file:
                    yield tensor, opened.get_tensor(tensor.key)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"{printable_path(file)}: cannot be read as safetensors: {error}"
            ) from None
