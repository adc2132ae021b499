"""The way in through torch's operations: its attention, or what a module writes out of them."""
