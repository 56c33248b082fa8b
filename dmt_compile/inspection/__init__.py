"""What the compiler shows of its work: plans as tables, reports and dumps."""
