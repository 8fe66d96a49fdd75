"""How the two ends reach each other: a stream for each kind of address."""
