"""Files and objects: read, written, cached."""
