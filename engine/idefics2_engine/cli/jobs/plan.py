"""The command ``idefics2 plan``, which says what a job will take before it runs."""

import argparse
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from idefics2_engine.cli import streams
from idefics2_engine.cli.jobs import job_options
from idefics2_engine.cli.log_output import add_log_options
from idefics2_engine.errors import ConfigError

if TYPE_CHECKING:
    from idefics2_engine.jobs.plan.job_plan import PlanOptions
    from idefics2_engine.jobs.plan.plan_workers import PlannerRecipe
    from idefics2_engine.jobs.readers.job_input import JobInput
    from idefics2_engine.jobs.readers.rows.row_ids import RepeatedIds
    from idefics2_engine.model.config import ModelConfig
    from idefics2_engine.runtime.config import EngineConfig
    from idefics2_engine.sampling_params import SamplingParams

SOME_FAIL = 3
"""The exit code if some rows will fail."""
_BAD_INPUT = 2
_SHOWN_IDS = 5
_EPILOG = """\
example:
  idefics2 plan -i questions.jsonl --model HuggingFaceM4/idefics2-8b --rates results.json

exit codes: 0 all rows can be answered, 3 some will fail, 2 wrong usage or input
"""


def add_parser(commands: "argparse._SubParsersAction[Any]") -> None:
    """Add the command to the parser."""
    parser = commands.add_parser(
        "plan",
        help="say what a job will take: rows that fail, tokens, memory, time",
        description="Read the rows of a job and the headers of their images, and say which rows "
        "will fail, how many images, tokens and pages there are, and, with --rates, how long the job "
        "will take. Most options are those of idefics2 run. Neither a GPU nor the model's weights "
        "are needed.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    job_options.add_input_options(parser)
    parser.set_defaults(check_images="header")
    group = parser.add_argument_group("estimate")
    group.add_argument(
        "--rates",
        metavar="FILE",
        type=Path,
        action="append",
        default=[],
        help="a results file of idefics2 bench latency, or of bench offline with its rates, from "
        "the machine that will run the job; repeat it for rows in several files",
    )
    group.add_argument(
        "--expected-tokens",
        metavar="N",
        type=int,
        help="tokens that an answer is expected to have, if that is fewer than --max-tokens",
    )
    parser.add_argument("--json", action="store_true", help="print a JSON object, not a table")
    job_options.add_engine_options(parser)
    job_options.add_answer_options(parser)
    add_log_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the plan and return the exit code.

    Raises:
        Idefics2Error: An option or the input is invalid.
    """
    from idefics2_engine.jobs.job_errors import input_lost
    from idefics2_engine.jobs.readers.job_input import JobInput
    from idefics2_engine.jobs.readers.staged_input import with_staged_input

    if not args.inputs:
        raise ConfigError("a plan must have an input: -i IN")
    params = job_options.job_sampling(args)
    # Standard input is read twice if ids are repeated
    with TemporaryDirectory(prefix="idefics2-plan-") as folder:
        try:
            options = with_staged_input(job_options.input_options(args), Path(folder))
            return _print_plan(args, JobInput(options, params), params)
        except OSError as error:
            raise input_lost(error) from error


def _print_plan(args: argparse.Namespace, job_input: "JobInput", params: "SamplingParams") -> int:
    from tqdm import tqdm  # type: ignore[import-untyped]

    from idefics2_engine.checkpoint.hub import find_model_config
    from idefics2_engine.demo import DEMO_MODEL
    from idefics2_engine.jobs.plan.job_plan import plan_job
    from idefics2_engine.jobs.plan.plan_table import plan_lines
    from idefics2_engine.jobs.plan.plan_workers import plan_in_processes, usable_cores
    from idefics2_engine.jobs.plan.time_estimate import MeasuredRates
    from idefics2_engine.jobs.readers.rows.row_ids import IdHashes
    from idefics2_engine.model.config import ModelConfig

    folder = DEMO_MODEL if args.model is None else find_model_config(args.model)
    config = ModelConfig.load(folder)
    recipe, options = _prepared(args, folder, config, job_input, params)
    quantization = "nf4" if config.is_quantized else args.quantization
    rates = None
    if args.rates:
        rates = MeasuredRates.load(args.rates, config.vision.patch_size, quantization)
    hashes = IdHashes()
    # On a terminal only
    rows = tqdm(job_input.identified_rows(hashes.add), unit="row", leave=False, disable=None)
    plan = plan_job(plan_in_processes(rows, recipe, usable_cores()), options)
    repeated = job_input.find_repeated_ids(hashes, _SHOWN_IDS)
    time = None if rates is None else plan.estimate(rates)
    data = plan.to_dict(time) | {"repeated_ids": _repeated(repeated)}
    if args.json:
        streams.print_json(data)
    else:
        print("\n".join(plan_lines(data)))
        if time is None:
            print("time: not estimated; --rates FILE takes a results file of idefics2 bench")
    if repeated.num_rows:
        return _BAD_INPUT
    return SOME_FAIL if plan.num_failing else 0


def _prepared(
    args: argparse.Namespace,
    folder: Path,
    config: "ModelConfig",
    job_input: "JobInput",
    params: "SamplingParams",
) -> tuple["PlannerRecipe", "PlanOptions"]:
    """Return the planner's recipe and the options of the plan, for the checkpoint in ``folder``.

    Raises:
        ConfigError: An option is invalid.
    """
    from idefics2_engine.field_checks import OrNone, check
    from idefics2_engine.jobs.plan.image_check import ImageCheck
    from idefics2_engine.jobs.plan.job_plan import PlanOptions
    from idefics2_engine.jobs.plan.plan_workers import PlannerRecipe
    from idefics2_engine.runtime.config import AT_ONCE, default_num_seqs

    arguments = job_options.llm_arguments(args)
    # A plan may be made where the GPU of the job is not
    on_gpu = args.device != "cpu"
    engine = _engine_config(arguments, config, default_num_seqs(on_gpu=on_gpu))
    recipe = PlannerRecipe(
        folder,
        arguments["split_images"],
        job_options.job_media(args, job_input.media_root),
        engine.max_model_len,
        job_input.options,
        defaults=params,
        check=ImageCheck(args.check_images),
    )
    dtype = args.dtype
    if dtype == "auto":
        dtype = "bfloat16" if on_gpu else "float32"
    expected = check("expected_tokens", args.expected_tokens, OrNone(AT_ONCE), ConfigError)
    return recipe, PlanOptions(config.text, engine, dtype, expected)


def _engine_config(
    arguments: dict[str, Any], config: "ModelConfig", num_seqs: int
) -> "EngineConfig":
    """Return the sizes of the runtime. The KV cache has 0 tokens if its size is not given."""
    from idefics2_engine.field_checks import OrNone, check
    from idefics2_engine.runtime.config import (
        AT_ONCE,
        CACHE_TOKENS,
        LENGTH,
        EngineConfig,
        model_length,
    )

    def given(name: str, kind: Any, default: int | None) -> Any:
        return check(name, arguments.get(name, default), kind, ConfigError)

    length = given("max_model_len", OrNone(LENGTH), None)
    tokens = given("kv_cache_tokens", OrNone(CACHE_TOKENS), None)
    return EngineConfig(
        max_model_len=model_length(length, config.text.max_positions),
        max_num_seqs=given("max_num_seqs", AT_ONCE, num_seqs),
        kv_cache_tokens=tokens or 0,
        max_num_batched_tokens=given("max_num_batched_tokens", AT_ONCE, 8192),
    )


def _repeated(repeated: "RepeatedIds") -> dict[str, Any]:
    """Return rows with the identifier of an earlier row, for JSON."""
    return {"rows": repeated.num_rows, "examples": [one._asdict() for one in repeated.first]}
