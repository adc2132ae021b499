"""What is measured of heedful: coverage, versions, speed and quality."""
