"""From image files to pixels and crops."""
