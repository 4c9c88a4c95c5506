"""The gated MLP of the text layers, the modality projection and the perceiver."""

from torch import Tensor, nn

from idefics2_engine.model.linear import Linear
from idefics2_kernels import Ops


class GatedMLP(nn.Module):
    """down(silu(gate(x)) * up(x)), with gate and up in one product."""

    def __init__(self, hidden: int, intermediate: int, out: int, ops: Ops) -> None:
        super().__init__()
        self.gate_up_proj = Linear(hidden, 2 * intermediate, ops, bias=False)
        self.down_proj = Linear(intermediate, out, ops, bias=False)
        self.ops = ops

    def forward(self, x: Tensor) -> Tensor:
        """Map ``x`` (..., hidden) to (..., out)."""
        out: Tensor = self.down_proj(self.ops.silu_mul(self.gate_up_proj(x)))
        return out
