"""What the trained layers chose: ratios."""
