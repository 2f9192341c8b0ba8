"""Section of a config: how gradients are added up."""

from typing import Literal

from distrain.fields import Section, result_field


class Reduction(Section):
    """How the gradients of the virtual workers are added up."""

    mode: Literal["exact", "fast"] = result_field("exact")
    """exact: fixed-point integers, the same bits in any order; fast: fp32, equal to rounding. [result]"""
    fraction_bits: int = result_field(48, ge=16, le=60)
    """Bits behind the point of the 64-bit fixed-point gradient of the mean loss. [result]"""
