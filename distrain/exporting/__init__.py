"""Export of trained models to the files of other programs, with a proof."""
