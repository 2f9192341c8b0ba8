"""From what people have to data sets."""
