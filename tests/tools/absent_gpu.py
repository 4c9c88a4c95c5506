"""A stand-in for a GPU, for which Triton compiles and computes keys."""

from triton.backends.compiler import GPUTarget


class AbsentGPU:
    """The answers that a driver would give to Triton."""

    def __init__(self, arch: int) -> None:
        self.target = GPUTarget("cuda", arch, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0
