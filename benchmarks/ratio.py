"""What every benchmark says of its ratios, in one shape: the suite, its check and its tables read it.

A ratio is of one pair, measured side by side in one run; what is reported is the median of the pairs, with all of them.
Floors and ceilings are only written down here; `benchmarks.suite check` holds the results against them.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from selfguide.environment import environment
from selfguide.progress import stderr_line


def ratio(values: Sequence[float], floor: float | None = None, ceiling: float | None = None) -> dict[str, Any]:
    return {**spread(values), "values": [round(one, 4) for one in values], "floor": floor, "ceiling": ceiling}


def spread(values: Sequence[float]) -> dict[str, float]:
    numbers = {"median": statistics.median(values), "min": min(values), "max": max(values)}
    return {name: round(number, 4) for name, number in numbers.items()}


def emit(name: str, config: Mapping[str, Any], ratios: Mapping[str, Mapping[str, Any]], **more: Any) -> None:
    """The benchmark's JSON on standard output, and a line for each ratio on standard error."""
    result = {"benchmark": name, "environment": environment(), "config": config, "ratios": ratios, **more}
    print(json.dumps(result, indent=2, default=str), flush=True)
    for key, one in ratios.items():
        bounds = [f"{word} {one[word]}" for word in ("floor", "ceiling") if one[word] is not None]
        spoken = f"{one['median']:.2f} ({one['min']:.2f} to {one['max']:.2f})"
        stderr_line(", ".join([f"{name} {key}: {spoken} of {len(one['values'])}", *bounds]))
