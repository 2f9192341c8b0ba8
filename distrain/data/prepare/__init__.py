"""Data set preparation: open images in any layout as a source, pack, index, verify."""
