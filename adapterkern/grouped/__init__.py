"""Many adapters in one batch: a second op, each file on the floor of its namesake."""
