"""What ``outgrow data detect`` is made of: looks at files, guesses of what their records are, patterns that name them."""
