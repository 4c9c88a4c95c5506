"""How long a job would take on a host whose Python is slower."""

from collections.abc import Mapping


def seconds_at_loop(
    wall: float,
    device: Mapping[str, float],
    thread_cpu: Mapping[str, float],
    loop: float,
    slow_loop: float,
) -> float:
    """Estimate the seconds of a job on a host whose Python is slower.

    The CPU seconds of the engine's thread grow with the loop, and those of the device do not. In
    each kind of step the two overlap, so the longer one counts. Image threads, which hold Python's
    lock at times, are not part of the estimate.

    Args:
        wall: Measured seconds.
        device: Device seconds by kind of step.
        thread_cpu: CPU seconds of the engine's thread by kind of step.
        loop: Seconds of the host's loop (``machine.loop_seconds``).
        slow_loop: Seconds of the loop on the other host.
    """
    slowdown = slow_loop / loop
    return wall + sum(
        max(device[kind], slowdown * cpu) - max(device[kind], cpu)
        for kind, cpu in thread_cpu.items()
    )
