"""Training and evaluation: one controller decides, one worker per device obeys."""
