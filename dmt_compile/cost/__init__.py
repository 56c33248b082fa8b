"""What a plan costs: the bytes that cross each link in a training step."""
