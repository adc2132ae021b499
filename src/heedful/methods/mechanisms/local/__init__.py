"""Each token mixes with its neighbours alone: windows and convolutions."""
