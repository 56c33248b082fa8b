"""The stages of the compiler, in order, and the effects that a pass may have on numbers."""

from __future__ import annotations

from enum import IntEnum


class Stage(IntEnum):
    """What is true of the graph; ``verifier.RULES`` holds the rules of each stage."""

    CAPTURED = 0
    FLAT = 1
    TOWERED = 2
    DISTRIBUTED = 3
    LOWERED = 4


class Effect(IntEnum):
    """How far a pass may change the model's numbers; a pipeline's effect is the strongest that ran."""

    EXACT = 0
    REORDERED = 1
    LOSSY = 2
    MODEL = 3

    def explain(self) -> str:
        """Say the effect in words."""
        return {
            Effect.EXACT: "bitwise the flat model's numbers",
            Effect.REORDERED: "the same mathematics in another summation order or dense compiler",
            Effect.LOSSY: "lower precision on the wire",
            Effect.MODEL: "changes the model",
        }[self]
