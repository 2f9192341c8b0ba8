"""Config section of gradient reduction."""

from typing import Literal

from distrain.fields import Section, result_field


class Reduction(Section):
    """Summation of the gradients of all virtual workers."""

    mode: Literal["exact", "fast"] = result_field("exact")
    """exact: fixed-point integers, the same bits in any order of summation; fast: fp32,
    equal up to rounding. [result]"""
    fraction_bits: int = result_field(48, ge=16, le=60)
    """Fractional bits of the 64-bit fixed-point gradient of the mean loss, from 16 to
    60; exact mode only. More bits resolve smaller gradients, fewer leave room for
    larger ones. [result]"""
