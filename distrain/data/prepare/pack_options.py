"""Options of a pack: the size and the encoding in which images are stored."""

from dataclasses import dataclass
from typing import Literal

from distrain.errors import UserError

DEFAULT_PIXEL_LIMIT = 50_000_000
"""Pixels per image; one that claims more is rejected before memory is allocated."""


# The fields of Geometry and PackOptions are keys of a pack's plan: renaming one would
# make every unfinished pack look like another one.
@dataclass(frozen=True)
class Geometry:
    """Size at which images are stored."""

    kind: Literal["keep", "short", "square"]
    """keep: as they are; short: resized to a short side of `side`; square: resized to
    that, then cut to the center square."""
    side: int = 0
    """Length in pixels."""

    @staticmethod
    def from_text(text: str) -> "Geometry":
        """Parse keep, short:N or square:N.

        Raises:
            UserError: the text is something else.
        """
        # From Python it may be a number.
        kind, _, side = str(text).partition(":")
        if text == "keep":
            return Geometry("keep")
        if kind in ("short", "square") and side.isdecimal() and int(side) > 0:
            return Geometry("short" if kind == "short" else "square", int(side))
        raise UserError(
            f"geometry {text} is not valid: use keep, short:N or square:N, "
            "with N in pixels"
        )


@dataclass(frozen=True)
class PackOptions:
    """Options of how images are stored."""

    geometry: Geometry = Geometry("square", 256)
    encoding: Literal["jpeg", "raw"] = "jpeg"
    """jpeg, or raw pixels (binary PPM, seven times the bytes; square geometry only)."""
    quality: int = 95
    """JPEG quality, 1 to 100."""
    pixel_limit: int = DEFAULT_PIXEL_LIMIT

    def __post_init__(self) -> None:
        """Check the values. Raises UserError."""
        if self.encoding not in ("jpeg", "raw"):
            raise UserError(f"encoding {self.encoding!r} is not valid: use jpeg or raw")
        if not 1 <= self.quality <= 100:
            raise UserError(f"quality {self.quality} is not valid: use 1 to 100")
        geometry = self.geometry
        if geometry.kind == "square" and geometry.side**2 > self.pixel_limit:
            raise UserError(
                f"geometry square:{geometry.side} is over the limit of "
                f"{self.pixel_limit:,} pixels per image: use a smaller square, or "
                "raise --pixel-limit (pixel_limit)"
            )
