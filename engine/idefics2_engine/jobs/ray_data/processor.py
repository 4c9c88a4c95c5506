"""Ray Data: datasets whose rows are answered by actors, with the names of ``ray.data.llm``."""

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from inspect import signature
from typing import TYPE_CHECKING, Any

from idefics2_engine.errors import ConfigError, PromptError, install_extras, short_repr
from idefics2_engine.jobs.ray_data.columns import (
    ERROR,
    ERROR_CODE,
    INPUTS,
    PACKED,
    pack,
    pack_error,
    unpack,
)
from idefics2_engine.jobs.ray_data.engine import Idefics2Engine, SubmitEngine, build_llm

if TYPE_CHECKING:
    import ray.data

RowFunction = Callable[[dict[str, Any]], Mapping[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Idefics2ProcessorConfig:
    """How a processor runs the model.

    Attributes:
        model_source: A checkpoint's folder or hub id. If ``None``, the demo checkpoint.
        engine_kwargs: Arguments of ``LLM``.
        concurrency: Actors: their number, or the smallest and the largest one.
        batch_size: Rows of a batch.
        max_concurrent_batches: Batches that an actor answers at once.
        max_tasks_in_flight_per_actor: Tasks that Ray Data sends to an actor, those that it runs
            among them. If ``None``, one more than ``max_concurrent_batches``: more would wait at
            one actor while another has none.
        should_continue_on_error: Whether a row without an answer becomes an error row. If not, its
            error ends the execution.
        max_task_retries: How often Ray repeats a task whose actor died. A row that kills its actor
            needs 3, and one more for each further such row among the batches of that actor. -1
            repeats without end.
        num_gpus: GPUs of an actor. If ``None``, 0 with ``device="cpu"`` and otherwise 1.
        num_cpus: CPUs of an actor. If ``None``, Ray Data's default.
        accelerator_type: The type of GPU that an actor needs.
        runtime_env: The environment of actors, as in ``ray.init``.
        deaths_folder: As in ``Idefics2Engine``. A folder that all machines share counts deaths on
            all of them.
        build: Loads the model, called as ``build(model_source, **engine_kwargs)``.

    Raises:
        ConfigError: A number is too small, or ``engine_kwargs`` name the model.
    """

    model_source: str | None = None
    engine_kwargs: Mapping[str, Any] = field(default_factory=dict)
    concurrency: int | tuple[int, int] = 1
    batch_size: int = 32
    max_concurrent_batches: int = 8
    max_tasks_in_flight_per_actor: int | None = None
    should_continue_on_error: bool = True
    max_task_retries: int = 3
    num_gpus: float | None = None
    num_cpus: float | None = None
    accelerator_type: str | None = None
    runtime_env: Mapping[str, Any] | None = None
    deaths_folder: str | None = None
    build: Callable[..., SubmitEngine] = build_llm

    def __post_init__(self) -> None:
        """Check the numbers."""
        for name in ("batch_size", "max_concurrent_batches"):
            _check_count(name, getattr(self, name))
        if self.max_tasks_in_flight_per_actor is not None:
            _check_count("max_tasks_in_flight_per_actor", self.max_tasks_in_flight_per_actor)
        sizes = self.pool_size
        _check_count("concurrency", sizes["min_size"])
        _check_count("concurrency", sizes["max_size"], sizes["min_size"])
        _check_count("max_task_retries", self.max_task_retries, -1)
        if "model" in self.engine_kwargs:
            raise ConfigError("engine_kwargs must not have 'model', got it; use model_source")

    @property
    def pool_size(self) -> dict[str, int]:
        """The smallest and the largest number of actors."""
        sizes = self.concurrency
        least, most = sizes if isinstance(sizes, tuple) else (sizes, sizes)
        return {"min_size": least, "max_size": most}

    @property
    def tasks_in_flight(self) -> int:
        """Most tasks at an actor."""
        return self.max_tasks_in_flight_per_actor or self.max_concurrent_batches + 1

    @property
    def gpus(self) -> float:
        """GPUs of an actor."""
        if self.num_gpus is not None:
            return self.num_gpus
        return 0.0 if self.engine_kwargs.get("device") == "cpu" else 1.0


class Processor:
    """Answers the rows of datasets. ``build_processor`` makes one."""

    def __init__(
        self,
        config: Idefics2ProcessorConfig,
        preprocess: RowFunction | None,
        postprocess: RowFunction | None,
        preprocess_map_kwargs: Mapping[str, Any] | None,
        postprocess_map_kwargs: Mapping[str, Any] | None,
    ) -> None:
        self.config = config
        self._before = preprocess and _Preprocess(preprocess)
        # What preprocess packed must be unpacked
        self._after = (preprocess or postprocess) and _Postprocess(
            postprocess, config.should_continue_on_error
        )
        self._before_kwargs = dict(preprocess_map_kwargs or {})
        self._after_kwargs = dict(postprocess_map_kwargs or {})

    def __call__(self, dataset: "ray.data.Dataset") -> "ray.data.Dataset":
        """Return the dataset with answers. Nothing runs before it is read."""
        from ray.data import ActorPoolStrategy

        config = self.config
        optional = {
            "num_cpus": config.num_cpus,
            "accelerator_type": config.accelerator_type,
            "runtime_env": None if config.runtime_env is None else dict(config.runtime_env),
        }
        if self._before:
            dataset = dataset.map(self._before, **self._before_kwargs)
        dataset = _map_batches(
            dataset,
            config.max_task_retries,
            fn_constructor_kwargs={
                "model_source": config.model_source,
                "engine_kwargs": dict(config.engine_kwargs),
                "should_continue_on_error": config.should_continue_on_error,
                "deaths_folder": config.deaths_folder,
                "build": config.build,
            },
            batch_size=config.batch_size,
            batch_format="pyarrow",
            compute=ActorPoolStrategy(
                **config.pool_size,
                max_tasks_in_flight_per_actor=config.tasks_in_flight,
                max_concurrent_calls_per_actor=config.max_concurrent_batches,
            ),
            udf_modifying_row_count=False,
            num_gpus=config.gpus,
            **{name: value for name, value in optional.items() if value is not None},
        )
        return dataset.map(self._after, **self._after_kwargs) if self._after else dataset


def build_processor(
    config: Idefics2ProcessorConfig,
    preprocess: RowFunction | None = None,
    postprocess: RowFunction | None = None,
    *,
    preprocess_map_kwargs: Mapping[str, Any] | None = None,
    postprocess_map_kwargs: Mapping[str, Any] | None = None,
) -> Processor:
    """Return a function that answers the rows of a dataset, like ``ray.data.llm``'s.

    Args:
        config: How the model is run.
        preprocess: Returns columns of a row, which are added to it: ``messages``, or ``prompt``
            with ``image``, and ``sampling_params``. Pictures are the bytes of their files, paths or
            URLs. If ``None``, the dataset has these columns.
        postprocess: Returns the columns of a row of the result, given all columns of an answered
            row. Rows with an error do not pass it: they keep all columns but those inputs that
            ``preprocess`` made.
        preprocess_map_kwargs: Arguments of ``Dataset.map`` for ``preprocess``.
        postprocess_map_kwargs: Arguments of ``Dataset.map`` for ``postprocess``.

    Raises:
        ConfigError: ``config`` is of another type.
        ImportError: Ray is not installed.
    """
    if not isinstance(config, Idefics2ProcessorConfig):
        raise ConfigError(f"config must be an Idefics2ProcessorConfig, got {short_repr(config)}")
    check_ray()
    return Processor(config, preprocess, postprocess, preprocess_map_kwargs, postprocess_map_kwargs)


def check_ray() -> None:
    """Raise an ``ImportError`` that says how to install Ray, if it is missing."""
    try:
        import ray.data  # noqa: F401
    except ImportError as error:
        raise ImportError(
            f"Ray Data is needed, got an environment without it: {install_extras('ray')}; {error}"
        ) from error


def _map_batches(dataset: "ray.data.Dataset", max_task_retries: int, **arguments: Any) -> Any:
    """Call ``dataset.map_batches`` with a number of retries, if this version of Ray lets one."""
    parameters = signature(dataset.map_batches).parameters.values()
    if any(p.kind is p.VAR_KEYWORD or p.name == "max_task_retries" for p in parameters):
        arguments["max_task_retries"] = max_task_retries
    with warnings.catch_warnings():
        # Ray 2.60 has no other way, and says that this one ends with Ray 2.64
        warnings.filterwarnings("ignore", ".*ray_remote_args")
        return dataset.map_batches(Idefics2Engine, **arguments)


class _Preprocess:
    """Calls the user's function, and packs the inputs that it makes into one binary column."""

    def __init__(self, function: RowFunction) -> None:
        self._convert = function

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        made = dict(self._convert(dict(row)))
        # A column of the dataset has a type already
        inputs = {
            name: made[name]
            for name in (*INPUTS, "id")
            if name in made and made[name] is not row.get(name)
        }
        try:
            packed = pack(inputs)
        except PromptError as error:
            packed = pack_error(error)
        columns = {**row, **made, PACKED: packed}
        return {
            name: value for name, value in columns.items() if name not in inputs or name == "id"
        }


class _Postprocess:
    """Calls the user's function for answered rows, with the inputs that ``preprocess`` made."""

    def __init__(self, function: RowFunction | None, reports_errors: bool) -> None:
        self._convert = function
        self._reports_errors = reports_errors

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        inputs = unpack(row.pop(PACKED, None) or pack({}))
        if row[ERROR]:
            return row
        columns = {**inputs, **row}
        if self._convert is not None:
            columns = dict(self._convert(columns))
        if self._reports_errors:
            columns |= {ERROR: "", ERROR_CODE: ""}
        return columns


def _check_count(name: str, value: Any, least: int = 1) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ConfigError(f"{name} must be an integer of at least {least}, got {short_repr(value)}")
