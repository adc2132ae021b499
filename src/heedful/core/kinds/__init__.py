"""What stands beside the attention call: siblings of `Method`, and what they edit, read and teach."""
