"""Models that read images: what is looked at, and what is made up."""
