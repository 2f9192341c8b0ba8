"""A data set as it is stored and read."""
