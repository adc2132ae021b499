"""What is measured on a machine with a card: laws, kernel tests, block sizes, and speed against flash attention."""
