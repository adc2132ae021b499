"""One file, one paper, one class."""
