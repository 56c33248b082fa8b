"""The tail of a cross layer: all of it but the matrix product."""
