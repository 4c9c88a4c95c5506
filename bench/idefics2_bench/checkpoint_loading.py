"""Time loading a checkpoint from the page cache to the device: ``idefics2 bench load``.

    idefics2 bench load  # the demo checkpoint
    idefics2 bench load --random-weights tests/data/idefics2-8b --json h200-load.json

The engine's ``load_checkpoint`` alternates with transformers' ``from_pretrained`` with
``device_map``. Both run once before they are timed, so the files are in the page cache and the
libraries are initialized. Random weights are first written to a temporary folder.
"""

import gc
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from idefics2_bench import model_suite, report
from idefics2_bench.timing import alternate
from idefics2_engine.checkpoint.loader import load_checkpoint
from idefics2_engine.checkpoint.writer import save_checkpoint
from idefics2_engine.jobs.plan.device_rates import PEER
from idefics2_engine.model.quantization import Quantization
from idefics2_engine.runtime.config import PAGE_SIZE

Row = dict[str, Any]

_ROUNDS = 5
_WARM_UP = 1


def main(argv: Sequence[str] | None = None) -> int:
    """Run the suite with the arguments ``argv``, or those of the command line; return 0."""
    parser = model_suite.parser("load", __doc__)
    options = parser.parse_args(argv)
    model_suite.resolve(options, parser)
    about = model_suite.about(options)
    llm = model_suite.load(
        options, max_model_len=PAGE_SIZE, max_num_seqs=1, kv_cache_tokens=PAGE_SIZE
    )
    head: Row = {"kernel": "load", "case": model_suite.case_name("load", options)}
    head |= model_suite.settings_of(llm, options)
    with TemporaryDirectory() as temporary:
        folder = model_suite.folder(options)
        if options.random_weights is not None:
            save_checkpoint(llm.model, temporary, config_from=folder)
            folder = Path(temporary)
        model = llm.model
        ops, device, dtype = model.ops, model.device, model.dtype
        quantization = Quantization.from_arguments(options.quantization, None, True)
        # The weights are freed before other copies are loaded
        del llm, model
        gc.collect()

        def ours() -> None:
            load_checkpoint(folder, ops, device, dtype, quantization=quantization)

        def theirs() -> None:
            import transformers

            # transformers is only partly typed
            library: Any = transformers
            library.Idefics2ForConditionalGeneration.from_pretrained(
                folder, dtype=dtype, device_map=str(device)
            )

        calls: dict[str, Callable[[], object]] = {options.ops: ours}
        if options.peer is not None:
            calls[PEER] = theirs
        times = alternate(calls, _ROUNDS, _WARM_UP, device)
    rows: list[Row] = [{**head, "impl": name, **asdict(time)} for name, time in times.items()]
    if options.peer is not None:
        ours_ms, theirs_ms = (time.ms for time in times.values())
        rows[0] |= {
            "peer": PEER,
            "peer_ms": theirs_ms,
            "speedup": theirs_ms / ours_ms,
        }
    for row in rows:
        print(report.whole_line(row), flush=True)
    report.write_json(options.json, about, rows)
    model_suite.print_table(options, about, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
