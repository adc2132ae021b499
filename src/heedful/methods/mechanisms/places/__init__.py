"""Places: tokens mixed by weights of them or of frequencies, or told of them in another way."""
