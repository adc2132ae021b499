"""Another way of attending, mostly for models that are trained with it."""
