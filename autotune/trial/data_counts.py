"""What a launch read: rows, what was left out and why, tokens, sequences."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class SourceCounts(BaseModel):
    """What became of the rows of one `datasets:` entry."""

    model_config = ConfigDict(extra="forbid")

    path: str
    type: str
    rows: int = 0
    """Rows read, those left out included."""
    dropped: dict[str, int] = {}
    """Rows left out, by reason."""
    truncated: int = 0
    """Rows whose end was cut off."""
    tokens: int = 0
    """Tokens of the rows that were kept."""
    trained_tokens: int = 0
    """Those of them that the loss is taken on."""
    complete: bool = True
    """False where reading stopped early because there was enough."""

    def drop(self, reason: str) -> None:
        """Count a row that is left out."""
        self.dropped[reason] = self.dropped.get(reason, 0) + 1


class DataCounts(BaseModel):
    """What a launch trains and evaluates on."""

    model_config = ConfigDict(extra="forbid")

    train: list[SourceCounts]
    test: list[SourceCounts] = []
    """Of `test_datasets`; without them the held-out sequences come out of `train`."""
    sequences: int
    held_out_sequences: int = 0
    seq_len: int
    padding_share: float
    """Share of the training sequences' tokens that are padding."""

    def words(self) -> str:
        """Return one line for people."""
        rows = sum(source.rows for source in self.train)
        tokens = sum(source.tokens for source in self.train)
        trained = sum(source.trained_tokens for source in self.train)
        parts = [f"{rows:,} rows read" + ("" if self._complete else " (enough, not all)")]
        dropped: dict[str, int] = {}
        for source in self.train:
            for reason, count in source.dropped.items():
                dropped[reason] = dropped.get(reason, 0) + count
        parts += [f"{count:,} left out ({reason})" for reason, count in dropped.items()]
        truncated = sum(source.truncated for source in self.train)
        if truncated:
            parts.append(f"{truncated:,} cut")
        parts.append(f"{tokens:,} tokens, {trained:,} of them trained on")
        held_out = f" and {self.held_out_sequences:,} held out" if self.held_out_sequences else ""
        parts.append(f"{self.sequences:,} sequences of {self.seq_len:,}{held_out}")
        parts.append(f"{self.padding_share:.1%} padding")
        return ", ".join(parts)

    @property
    def _complete(self) -> bool:
        return all(source.complete for source in self.train)
