"""Both ends of replication."""
