"""Training and evaluation: a controller starts one worker per device."""
