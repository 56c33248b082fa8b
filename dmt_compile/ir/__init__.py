"""The compiler's view of a model: stages, canonical operators, the embedding graph and the verifier."""
