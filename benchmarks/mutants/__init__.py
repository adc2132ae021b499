"""One change at a time to a method's formula, and whether that file's own tests see it."""
