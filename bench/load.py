"""Time how long a checkpoint takes from the page cache to the device; also ``idefics2 bench load``.

    idefics2 bench load                                                         # the demo checkpoint
    idefics2 bench load --random-weights tests/data/idefics2-8b --json bench/results/h200-load.json

Ours is ``load_checkpoint``, transformers' is ``from_pretrained`` with ``device_map``; they take turns, and each has run once
before, so that files are in memory and libraries set up. Random weights are written to a temporary folder first.
"""

import gc
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import report
import whole_model
from idefics2_engine.checkpoint import load_checkpoint, save_checkpoint
from idefics2_engine.config import PAGE_SIZE
from idefics2_engine.quantization import Quantization
from timing import alternate

Row = dict[str, Any]

_ROUNDS = 5
_WARM_UP = 1


def main() -> int:
    """Run as the command line says."""
    parser = whole_model.parser("load", __doc__)
    options = parser.parse_args()
    whole_model.resolve(options, parser)
    about = whole_model.about(options)
    llm = whole_model.load(
        options, max_model_len=PAGE_SIZE, max_num_seqs=1, kv_cache_tokens=PAGE_SIZE
    )
    head: Row = {"kernel": "load", "case": whole_model.case_name("load", options)}
    head |= whole_model.settings_of(llm, options)
    with TemporaryDirectory() as temporary:
        folder = whole_model.folder(options)
        if options.random_weights is not None:
            save_checkpoint(llm.model, temporary, config_from=folder)
            folder = Path(temporary)
        model = llm.model
        ops, device, dtype = model.ops, model.device, model.dtype
        quantization = Quantization.from_arguments(options.quantization, None, True)
        del llm, model  # and with it their memory
        gc.collect()

        def ours() -> None:
            load_checkpoint(folder, ops, device, dtype, quantization=quantization)

        def theirs() -> None:
            import transformers

            library: Any = transformers  # its classes are typed in part
            library.Idefics2ForConditionalGeneration.from_pretrained(
                folder, dtype=dtype, device_map=str(device)
            )

        calls: dict[str, Callable[[], object]] = {options.ops: ours}
        if options.peer is not None:
            calls[whole_model.PEER] = theirs
        times = alternate(calls, _ROUNDS, _WARM_UP, device)
    rows: list[Row] = [{**head, "impl": name, **asdict(time)} for name, time in times.items()]
    if options.peer is not None:
        ours_ms, theirs_ms = (time.ms for time in times.values())
        rows[0] |= {
            "peer": whole_model.PEER,
            "peer_ms": theirs_ms,
            "speedup": theirs_ms / ours_ms,
        }
    for row in rows:
        print(report.whole_line(row), flush=True)
    report.write_json(options.json, about, rows)
    whole_model.print_table(about, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
