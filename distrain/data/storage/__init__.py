"""Access to files and objects: reads, writes, retries and a disk cache."""
