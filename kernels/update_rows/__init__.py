"""The optimizer's step on the rows that a batch looked up."""
