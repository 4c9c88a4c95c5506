"""Sizes of requests that together use every compiled variant of every kernel.

Triton compiles a kernel once for each set of its constants, dtypes and specialized arguments. Sizes
that depend on a request are never specialized. Some of them select a constant, such as a tile or
the number of splits that are merged at once, or another kernel. A model that has run with all sizes
of this module compiles nothing for other sizes. The engine's ``runtime/warm_up.py`` runs it, and a
test compares with other sizes.
"""

import triton

from idefics2_kernels.attention import decode_attention, perceiver_attention, split_kv
from idefics2_kernels.gpu.target import current_arch
from idefics2_kernels.matmul.linear import FEW_ROWS
from idefics2_kernels.rotary import AT_ONCE

# Two rows are the fewest that are not a single one. With few query heads per key head, they are the
# smaller of ``paged_attention``'s tiles.
_DENSE = (1, 2, FEW_ROWS + 1, AT_ONCE + 1)
# The first rows of each tile and implementation of ``nf4_matmul``: rows of x are rounded up to a
# power of two of at least 8 for up to 64 rows, and to a multiple of 128 above.
_NF4 = (1, 2, 9, 17, 33, 65, 129, 257, 385, 513)


def row_counts(*, is_quantized: bool) -> tuple[int, ...]:
    """Return numbers of rows (tokens or patches) for every variant that depends on them.

    ``is_quantized`` is whether a weight is in NF4.
    """
    return tuple(sorted({*_DENSE, *(_NF4 if is_quantized else ())}))


def decode_sizes(H_KV: int) -> tuple[tuple[int, int], ...]:
    """Return numbers of sequences, and of pages of each, for every variant of a decode step.

    The programs that share the keys of a sequence are merged in powers of two.
    """
    most = min(decode_attention.PROGRAMS // H_KV, split_kv.MAX_SPLITS)
    pages = [1 << i for i in range(max(most - 1, 0).bit_length() + 1)]
    # So many sequences have a program per key head and do not share keys.
    unshared = decode_attention.PROGRAMS // (2 * H_KV) + 1
    return (*((1, count) for count in pages), (unshared, 1))


def image_sizes(
    L: int, H: int, H_KV: int, D: int, itemsize: int, *, is_quantized: bool
) -> tuple[tuple[int, int], ...]:
    """Return numbers of images, and of patches of each, for every variant of encoding images.

    ``L`` is the number of latents of an image. The perceiver has ``H`` heads and ``H_KV`` key heads
    of ``D`` columns of ``itemsize`` bytes.
    """
    rows = row_counts(is_quantized=is_quantized)
    config = perceiver_attention.launch_config(D, itemsize, current_arch())
    # The programs that share the keys of an image are merged in powers of two.
    latent_tiles = triton.cdiv(L, config.BLOCK_N)
    splits = [1 << i for i in range(perceiver_attention.MAX_SPLITS.bit_length())]
    patches = [(tiles - latent_tiles) * config.BLOCK_N for tiles in splits if tiles > latent_tiles]
    programs = triton.cdiv(L * (H // H_KV), config.BLOCK_M) * H_KV
    # So many images do not share keys.
    unshared = perceiver_attention.PROGRAMS // (2 * programs) + 1
    images = {unshared, *(triton.cdiv(count, L) for count in rows)}
    return (
        *((1, count) for count in sorted({*rows, *patches})),
        *((count, 1) for count in sorted(images - {1})),
    )
