"""What a model's attention does on a text: `heedful.diagnose` runs the measures, a `Profile` holds what they found."""
