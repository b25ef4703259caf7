"""Which layers must stay in 16 bit: sensitivity of every unit, and the search for a skip list."""
