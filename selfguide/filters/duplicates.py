"""Texts that were there before: exactly (normalised), or nearly."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from selfguide.filters.base import Context, FilterSpec, normalised

if TYPE_CHECKING:
    import polars as pl


class Duplicate(FilterSpec):
    """Keeps the first of equal texts, compared without case and spacing (the authors compare exact strings)."""

    name: Literal["duplicate"] = "duplicate"

    def reasons(self, rows: pl.DataFrame, context: Context) -> pl.Series:
        import polars as pl

        first = normalised("text").is_first_distinct()
        return rows.select(pl.when(~first).then(pl.lit("seen before")).alias("reason"))["reason"]


class NearDuplicate(FilterSpec):
    """Keeps the first of texts whose word shingles overlap by `threshold` (Jaccard, estimated by MinHash)."""

    name: Literal["near_duplicate"] = "near_duplicate"
    threshold: float = Field(default=0.8, gt=0, le=1)
    """Jaccard similarity from which two texts count as one."""
    shingle_words: int = Field(default=3, ge=1)
    """Words in a shingle; a shorter text is one shingle."""
    permutations: int = Field(default=128, ge=16)
    """Hash functions: more are slower and exacter."""
    column: Literal["input", "text"] = "input"
    """Whether inputs or outputs are compared."""

    def reasons(self, rows: pl.DataFrame, context: Context) -> pl.Series:
        import polars as pl
        from datasketch import MinHash, MinHashLSH

        index = MinHashLSH(threshold=self.threshold, num_perm=self.permutations)
        sketches: dict[int, MinHash] = {}
        reasons: list[str | None] = []
        texts = rows.select(normalised(self.column)).to_series().to_list()
        for number, text in enumerate(texts):
            sketch = MinHash(num_perm=self.permutations, seed=1)
            sketch.update_batch([shingle.encode() for shingle in self._shingles(text)])
            # The index proposes; among what it proposes are texts below the threshold.
            near = [other for other in index.query(sketch) if sketches[other].jaccard(sketch) >= self.threshold]
            reasons.append(f"near row {rows['row'][min(near)]}" if near else None)
            if not near:
                index.insert(number, sketch)
                sketches[number] = sketch
        return pl.Series("reason", reasons, dtype=pl.String)

    def _shingles(self, text: str) -> set[str]:
        words = text.split()
        size = self.shingle_words
        return {" ".join(words[i : i + size]) for i in range(max(1, len(words) - size + 1))}
