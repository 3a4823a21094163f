"""Who decides, and what runs them: pure actors, the cell's step, replicas, drivers."""
