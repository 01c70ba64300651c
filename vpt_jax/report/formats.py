# SPDX-License-Identifier: Apache-2.0
"""How tables and pages write their numbers."""

import math


def percent(mean: float, deviation: float | None, digits: int = 1) -> str:
    """A mean in per cent, with its deviation where there is one: "85.0 ± 0.3"."""
    text = f"{mean:.{digits}f}"
    return text if deviation is None else f"{text} ± {deviation:.{digits}f}"


def three_digits(value: float) -> str:
    """Three significant digits: 0.4216 is "0.422"."""
    return f"{value:#.3g}".rstrip(".")


def with_prefix(value: float) -> str:
    """Three digits and an SI prefix: 81240000 is "81.2 M"."""
    power = int(math.log10(max(value, 1)) // 3)
    prefix = ("", "k", "M", "G", "T", "P")[power]
    return f"{three_digits(value / 1000**power)} {prefix}"
