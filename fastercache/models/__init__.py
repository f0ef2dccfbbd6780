"""What is particular to a model family, one file each, and calls of a model on shapes alone."""
