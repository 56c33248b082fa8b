"""What runs at each step: the program, sharded tables, collectives, gradient synchronisation and checkpoints."""
