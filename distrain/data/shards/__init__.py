"""A data set as it is stored and read: manifest, shards, row groups."""
