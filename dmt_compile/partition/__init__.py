"""Which tables form which tower, and which rank owns which table."""
