"""Rows of the catalog: the gradients, with the inputs of their operations and drawn ``dy``."""

from idefics2_kernels.catalog.backward.activation import ACTIVATION_GRADIENTS
from idefics2_kernels.catalog.backward.flash_attention import FLASH_ATTENTION_GRADIENT
from idefics2_kernels.catalog.backward.linear_cross_entropy import LINEAR_CROSS_ENTROPY
from idefics2_kernels.catalog.backward.lora_linear import LORA_LINEAR_GRADIENT
from idefics2_kernels.catalog.backward.norms import NORM_GRADIENTS
from idefics2_kernels.catalog.backward.products import PRODUCT_GRADIENTS
from idefics2_kernels.catalog.backward.rotary import ROTARY_GRADIENT

GRADIENT_CATALOG = (
    FLASH_ATTENTION_GRADIENT,
    *PRODUCT_GRADIENTS,
    LORA_LINEAR_GRADIENT,
    LINEAR_CROSS_ENTROPY,
    *NORM_GRADIENTS,
    *ACTIVATION_GRADIENTS,
    ROTARY_GRADIENT,
)

__all__ = ["GRADIENT_CATALOG"]
