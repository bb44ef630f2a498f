"""The filters, one small file each, and the entries by which a recipe lists them. The chain is in `chain`."""

from __future__ import annotations

from typing import Annotated, get_args

from pydantic import Field

from selfguide.filters.base import Context, FilterSpec, normalise
from selfguide.filters.consistency import Vote
from selfguide.filters.copies import EvaluationCopy, GoldCopy
from selfguide.filters.duplicates import Duplicate, NearDuplicate
from selfguide.filters.empty import Empty
from selfguide.filters.finish import Finished
from selfguide.filters.labels import Agreement, Balance, Margin, ValidLabel
from selfguide.filters.length import Length
from selfguide.filters.noise import Noise

__all__ = [
    "AnyInputFilter", "AnyRowFilter", "AnySetFilter", "Balance", "Context", "Duplicate", "EvaluationCopy", "Finished",
    "GoldCopy", "Length", "Margin", "Noise", "ValidLabel", "Vote", "filter_specs", "normalise",
]  # fmt: skip

AnyRowFilter = Annotated[
    Empty | Finished | Noise | Length | GoldCopy | EvaluationCopy | ValidLabel | Agreement, Field(discriminator="name")
]
AnyInputFilter = Annotated[
    Empty | Finished | Noise | Length | GoldCopy | EvaluationCopy | Duplicate, Field(discriminator="name")
]
AnySetFilter = Annotated[Duplicate | NearDuplicate | Balance | Margin, Field(discriminator="name")]


def filter_specs() -> list[type[FilterSpec]]:
    """Every filter that a recipe can list, row filters first, then set filters and the vote."""
    return [*get_args(get_args(AnyRowFilter)[0]), *get_args(get_args(AnySetFilter)[0]), Vote]
