"""What the coordinator remembers through crashes: records in a database, vectors in files beside it."""
