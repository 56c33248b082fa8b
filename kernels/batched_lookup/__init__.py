"""All lookups of a rank in one operator."""
