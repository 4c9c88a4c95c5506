"""Counters of the engine's work, and of the seconds that it took."""

from dataclasses import dataclass


@dataclass
class EngineStats:
    """Totals since the engine was built.

    The engine's thread updates them after each step. ``dataclasses.replace(stats)`` is a copy; the
    difference of two copies is what happened in between.

    A step is of one of three kinds. An image step encodes tiles. A decode step computes one token
    of each sequence. All other steps are text steps.

    Attributes:
        decode_steps: Decode steps.
        text_steps: Text steps.
        image_steps: Image steps.
        computed_tokens: Tokens of prompts and answers, including image tokens and recomputed ones.
        generated_tokens: Tokens of answers.
        forced_tokens: Those of them that a constraint left no choice for, and that were not drawn.
        cached_tokens: Tokens that the prefix cache had when a sequence was admitted.
        encoded_tiles: Tiles that were encoded. Hits of the encoder cache do not count.
        encoded_patches: Patches of these tiles.
        cached_tiles: Tiles that the encoder cache had when they were needed, and tiles whose tokens
            are among ``cached_tokens``.
        padded_tokens: Tokens of padding that text and image steps computed.
        padded_patches: Patches of padding that image steps computed.
        cache_usage: Share of the KV cache's pages in use after the last step.
        plan_seconds: Time in which the engine's thread chose the tokens of steps.
        launch_seconds: Time in which it packed and launched steps.
        wait_seconds: Time in which it waited for the device.
        land_seconds: Time in which it appended tokens to sequences, with their text.
        output_seconds: Time in which it took requests and handed out outputs.
        idle_seconds: Time in which it had no request. These six add up to the thread's time.
        prepare_seconds: Time in which threads prepared rows of ``iterate``, added up over threads.
        decode_cpu_seconds: CPU time of the engine's thread in decode steps.
        text_cpu_seconds: The same in text steps.
        image_cpu_seconds: The same in image steps.
        decode_device_seconds: Device time of decode steps, from the first launch to the last
            result. 0 on a CPU, as are the next two. The last step is added after the next one.
        text_device_seconds: The same of text steps.
        image_device_seconds: The same of image steps.
    """

    decode_steps: int = 0
    text_steps: int = 0
    image_steps: int = 0
    computed_tokens: int = 0
    generated_tokens: int = 0
    forced_tokens: int = 0
    cached_tokens: int = 0
    encoded_tiles: int = 0
    encoded_patches: int = 0
    cached_tiles: int = 0
    padded_tokens: int = 0
    padded_patches: int = 0
    cache_usage: float = 0.0
    plan_seconds: float = 0.0
    launch_seconds: float = 0.0
    wait_seconds: float = 0.0
    land_seconds: float = 0.0
    output_seconds: float = 0.0
    idle_seconds: float = 0.0
    prepare_seconds: float = 0.0
    decode_cpu_seconds: float = 0.0
    text_cpu_seconds: float = 0.0
    image_cpu_seconds: float = 0.0
    decode_device_seconds: float = 0.0
    text_device_seconds: float = 0.0
    image_device_seconds: float = 0.0

    @property
    def steps(self) -> int:
        """Forward passes."""
        return self.decode_steps + self.text_steps + self.image_steps

    @property
    def thread_seconds(self) -> float:
        """Time of the engine's thread: the sum of its parts."""
        return (
            self.plan_seconds
            + self.launch_seconds
            + self.wait_seconds
            + self.land_seconds
            + self.output_seconds
            + self.idle_seconds
        )

    @property
    def device_seconds(self) -> float:
        """Device time of all steps."""
        return self.decode_device_seconds + self.text_device_seconds + self.image_device_seconds
