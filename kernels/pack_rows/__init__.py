"""Rows of floating-point numbers in the form in which a slow link takes them."""
