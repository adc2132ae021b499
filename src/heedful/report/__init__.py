"""The page and the plots of a profile: they draw the values of `core/figures.py` and know no method."""
