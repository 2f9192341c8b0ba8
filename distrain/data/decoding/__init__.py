"""Image files decoded to pixels, cropped and augmented."""
