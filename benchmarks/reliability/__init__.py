"""What happens to jobs that are killed, files that are damaged, and models that are used for long: `python -m ...`."""
