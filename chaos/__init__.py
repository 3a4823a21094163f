"""What if time were ours, and things broke? Simulated worlds and injected faults."""
