"""Why a model said what it said: which tokens, heads and layers an answer came from."""
